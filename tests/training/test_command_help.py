"""The help pages, against the options that the parser really has."""

import re
import subprocess
import sys
from dataclasses import MISSING, fields

import pytest
from transformers import HfArgumentParser

from vptsp import DataArguments, VPTSPTrainingArguments, train
from vptsp.training.command_help import HELP, help_text
from vptsp.training.command_line import SHORT_NAMES, check_early
from vptsp.training.run_arguments import ConfigError, RunArguments, model_arguments_class, parse_arguments
from vptsp.training.unsupported_arguments import NOT_OFFERED, REFUSED_FIELDS


CLASSES = (model_arguments_class(), VPTSPTrainingArguments, DataArguments, RunArguments)
FIELDS = {item.name: item for cls in CLASSES for item in fields(cls) if item.init}


def test_help_shows_forty_options_on_one_screen():
    shown = re.findall(r"^  --(\w+)", HELP, re.MULTILINE)
    assert len(shown) == len(set(shown)) == 40
    assert set(shown) <= set(FIELDS) - NOT_OFFERED
    assert len(HELP.splitlines()) <= 55
    assert max(map(len, HELP.splitlines())) <= 118


def test_the_defaults_that_it_shows_are_those_of_the_classes():
    lines = re.findall(r"^  --(\w+) .*\[([^][]*)\]$", HELP, re.MULTILINE)
    assert len(lines) > 20
    for name, default in lines:
        item = FIELDS[name]
        expected = item.default if item.default_factory is MISSING else item.default_factory()
        assert default == str(getattr(expected, "value", expected)), name


def test_help_comes_before_anything_heavy_is_imported():
    code = (
        "import sys; from vptsp.train import main; main(['--help']);"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == help_text("train.py")


def test_help_all_lists_every_option_once_with_a_text(capsys):
    train.main(["--help-all"])
    page = capsys.readouterr().out
    listed = re.findall(r"^  --(\w+)\n {8}(.*)", page, re.MULTILINE)
    assert sorted(name for name, _ in listed) == sorted(set(FIELDS) - NOT_OFFERED)
    theirs = page.index("the run, from transformers.TrainingArguments:")
    ours = [text for name, text in listed if page.index(f"--{name}\n") < theirs]
    assert len(ours) > 90 and not [text for text in ours if text.startswith("(")]
    assert "<class" not in page and "factory" not in page and " at 0x" not in page and "transformers.t" not in page
    assert "%%" not in page


def test_its_types_and_defaults(capsys):
    HfArgumentParser(VPTSPTrainingArguments)  # changes the types of the fields
    train.main(["--help-all"])
    page = " ".join(capsys.readouterr().out.split())
    assert "--learning_rate Of everything but the original proxies. (float; default: 0.0005)" in page
    assert "--save_total_limit Checkpoints to keep. (int | None; default: 2)" in page  # ours, not transformers'
    assert "--recall_at The K of Recall@K. (list[int]; default: [1, 2, 4, 8])" in page
    assert "--resize_size Short side before the centre crop in evaluation; by default image_size * 256 / 224." in page
    assert "--bitfit Tune every bias of the backbone that takes part. (bool; default: True)" in page
    assert "VPTSP-G with relu or tanh candidate" in page


@pytest.mark.parametrize("name", sorted(REFUSED_FIELDS))
def test_refused_fields_are_not_offered(name):
    assert (name in NOT_OFFERED) == (name != "debug")  # of which one value is honoured


def test_what_other_commands_call_an_option_is_understood():
    words = ["--backbone", "b", "--batch_size", "6", "--num-workers=1"]
    _, args, _, _ = parse_arguments(words)
    assert (args.per_device_train_batch_size, args.dataloader_num_workers) == (6, 1)
    for twice in (["--per_device_train_batch_size", "4"], ["--per-device-train-batch-size=4"]):
        with pytest.raises(ConfigError, match="--batch_size is --per_device_train_batch_size: give one of them"):
            parse_arguments([*words, *twice])
        with pytest.raises(ConfigError, match="give one of them"):
            check_early([*words, *twice])
    with pytest.raises(ConfigError, match="there is no option --no_batch_size"):
        check_early(["--no_batch_size"])
    for short, name in SHORT_NAMES.items():
        assert short not in FIELDS and name in FIELDS
        assert f"in short {short} [" in re.search(rf"--{name} .*", HELP)[0]
