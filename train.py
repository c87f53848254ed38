"""Tune prompts for image retrieval on a frozen vision transformer.

    accelerate launch train.py configs/cub_vits16.yaml --data_dir path/to/CUB_200_2011
    accelerate launch train.py configs/folder.yaml --data_dir path/to/folders --num_train_epochs 5
    vptsp train table1/vpt --data_dir path/to/CUB_200_2011 --backbone facebook/dino-vits16

The YAML file (or the name of one that the package brings) and the options name fields of `VPTSPConfig` (what the model
is), `VPTSPTrainingArguments` (how the run goes) and `DataArguments` (what data); options win. `output_dir` gets the
retriever, `all_results.json` and pictures.
"""

from __future__ import annotations

import sys

from vptsp.data_scripts.data_errors import DataError
from vptsp.files.closed_pipes import ended_by_closed_pipes
from vptsp.files.locks import InUseError
from vptsp.training.command_help import help_text
from vptsp.training.output_folder import OutputFolderError
from vptsp.training.run_errors import CheckpointError, CheckpointWriteError, ConfigError, TrainingError
from vptsp.training.termination import ended_by_signals


def main(argv=None, prog="train.py"):
    """Entry point.

    Args:
        argv: The command line after `prog`; None takes that of the process.
        prog: What was typed, for the help, errors and the results' `command`.

    Exit status 2 and a line on stderr where the configuration can't work, 1 where a checkpoint can't be written, and
    130 (143) after Ctrl-C (SIGTERM).
    """
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        print(help_text(prog), end="")
        return
    arguments = None
    try:
        with ended_by_signals(prog, lambda: arguments and arguments[1].output_dir):
            arguments = _parsed(argv, prog)
            if arguments is not None:
                _run(arguments, argv, prog)
    except (ConfigError, DataError, CheckpointError, InUseError, OutputFolderError, TrainingError) as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except CheckpointWriteError as error:
        print(f"{prog}: error: {error.strerror or error}", file=sys.stderr)
        raise SystemExit(1) from error
    except OSError as error:  # of a disk that is full, say; what is wrong with the data or the model has its own
        print(f"{prog}: error: {error}", file=sys.stderr)
        raise SystemExit(1) from error


def _parsed(argv, prog):
    """The arguments of a run, checked; None where only the help was asked for."""
    # PyTorch and transformers' models, which take seconds, are loaded neither for the help nor for what is wrong with
    # the file, the data or the place of the results
    if "--help-all" not in argv:
        from vptsp.training.command_line import check_early

        check_early(argv)
    from vptsp.training.run_arguments import all_options_text, check_run, parse_arguments

    if "--help-all" in argv:
        print(all_options_text(prog), end="")
        return None
    arguments = parse_arguments(argv, prog)
    check_run(*arguments)
    return arguments


def _run(arguments, argv, prog):
    from vptsp.training.model_card import without_tokens
    from vptsp.training.run import run

    run(*arguments, command=without_tokens([*prog.split(), *argv], arguments[1].hub_token))


if __name__ == "__main__":
    with ended_by_closed_pipes():
        main()
