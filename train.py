"""Tune prompts for image retrieval on a frozen vision transformer.

    accelerate launch train.py configs/cub_vits16.yaml --data_dir path/to/CUB_200_2011
    accelerate launch train.py configs/folder.yaml --data_dir path/to/folders --num_train_epochs 5
    vptsp-train table1/vpt --data_dir path/to/CUB_200_2011 --backbone facebook/dino-vits16

The YAML file (or the name of one that the package brings) and the options name fields of `VPTSPConfig` (what the model
is), `VPTSPTrainingArguments` (how the run goes) and `DataArguments` (what data); options win. `output_dir` gets the
retriever, `all_results.json` and pictures.
"""

from __future__ import annotations

import difflib
import json
import os
import platform
import statistics
import sys
import time
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from importlib import metadata
from pathlib import Path

import yaml

from vptsp.command_help import documented_fields, help_text, option_groups
from vptsp.data_scripts import DataArguments, DataError, check_data_arguments, check_output_apart
from vptsp.run_errors_vptsp import CheckpointError, CheckpointWriteError, TrainingInterrupted


USAGE = "%(prog)s [CONFIG.yaml] [--FIELD VALUE ...]"


# Fields of VPTSPConfig that follow from the data or the backbone and so are nobody's to set.
_DERIVED = ("num_classes", "backbone_fingerprint", "format_version")
# Mappings, which the command line gives as JSON.
_MAPPINGS = ("backbone_config", "loss_kwargs", "miner_kwargs", "tuning_kwargs")


@dataclass
class RunArguments:
    """What is left: where results may go."""

    overwrite_output: bool = field(
        default=False, metadata={"help": "Write into an output_dir that holds an earlier run's results."}
    )
    picture_queries: int = field(
        default=8, metadata={"help": "Queries in the pictures of neighbours; 0 for no pictures at all."}
    )
    final_metrics: str = field(
        default="all", metadata={"help": "What the last evaluation computes; as eval_metrics of those before."}
    )


class ConfigError(ValueError):
    """A configuration that can't work, with what to change."""


def model_arguments_class():
    """A dataclass of the fields of `VPTSPConfig` that a user may set, for `HfArgumentParser`."""
    from transformers import PreTrainedConfig

    from vptsp.configuration_vptsp import VPTSPConfig

    inherited = {item.name for item in fields(PreTrainedConfig)} | set(_DERIVED)
    own = [item for item in fields(VPTSPConfig) if item.name not in inherited]
    help_texts = documented_fields(VPTSPConfig.__doc__)
    columns = []
    for item in own:
        kind = "str | None" if item.name in _MAPPINGS else item.type
        default = None if item.default is MISSING else item.default
        text = help_texts[item.name].replace("%", "%%")
        columns.append((item.name, kind, field(default=default, metadata={"help": text})))
    return make_dataclass("ModelArguments", columns)


def parse_arguments(argv):
    """Command line -> (model fields that were given, training, data and run arguments).

    Raises:
        ConfigError: the YAML file can't be read, or it or the command line holds something unknown or out of range.
    """
    from transformers import HfArgumentParser

    from vptsp.training_args_vptsp import VPTSPTrainingArguments

    classes = (model_arguments_class(), VPTSPTrainingArguments, DataArguments, RunArguments)
    parser = HfArgumentParser(classes, prog="train.py", usage=USAGE)
    known = {item.name for cls in classes for item in fields(cls) if item.init}
    if argv and not argv[0].startswith("-"):
        values = read_config(argv[0], known)
        argv = argv[1:]
        parser.set_defaults(**values)
    try:
        model_args, training_args, data_args, run_args = parser.parse_args_into_dataclasses(
            argv, look_for_args_file=False
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    model_fields = vars(model_args)
    for name in _MAPPINGS:
        if isinstance(model_fields[name], str):
            try:
                model_fields[name] = json.loads(model_fields[name])
            except json.JSONDecodeError as error:
                holds = "JSON with a model_type" if name == "backbone_config" else "a JSON mapping"
                raise ConfigError(f"{name} must be {holds}: {error}") from error
    return model_fields, training_args, data_args, run_args


def read_config(path, known):
    """Fields of a YAML file, or of one of the package's own `configs` by its name (`cub_vits16`, `table1/vpt`).

    Raises:
        ConfigError: no such file, not YAML, not a mapping, or a field that does not exist.
    """
    preset = Path(__file__).parent / "configs" / f"{path}.yaml"
    file = preset if preset.is_file() and not Path(path).is_file() else Path(path)
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"the configuration {path} can't be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"the configuration {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"the configuration {path} must hold 'field: value' lines, got {type(values).__name__}")
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            raise ConfigError(f"{path}: there is no field {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    return values


def check_run(model_fields, training_args, data_args, run_args):
    """Refuse what can't work, before anything heavy is loaded.

    Raises:
        ConfigError or DataError: with the field or folder, and what was expected.
    """
    from vptsp.configuration_vptsp import VPTSPConfig
    from vptsp.loss_registry_vptsp import check_loss
    from vptsp.open_backbone_vptsp import open_config, resized_config
    from vptsp.training_args_vptsp import EVAL_METRICS

    check_data_arguments(data_args)
    check_output_apart(data_args, training_args.output_dir)
    if run_args.final_metrics not in EVAL_METRICS:
        raise ConfigError(f"final_metrics must be one of {', '.join(EVAL_METRICS)}, got {run_args.final_metrics!r}")
    backbone = model_fields["backbone"]
    if backbone is None and model_fields["backbone_config"] is None:
        raise ConfigError("backbone must be the Hub name or the folder of a vision transformer, got None")
    if backbone is not None:
        _check_backbone_name(str(backbone))
    try:
        if backbone is not None and Path(backbone).is_dir():
            model_fields = {**model_fields, "backbone_config": open_config(backbone)}
        config = VPTSPConfig(**model_fields)
        if config.backbone_config is not None:
            resized_config(config.backbone_config, data_args.image_size)
        check_loss(config)
    except (ValueError, ImportError) as error:
        raise ConfigError(str(error)) from error
    if training_args.push_to_hub and not model_fields["save_backbone"] and backbone and Path(backbone).is_dir():
        raise ConfigError(
            f"push_to_hub: the backbone is the local folder {backbone}, which others don't have. Give --backbone its "
            "name on the Hub, or --save_backbone true to push it along"
        )
    _check_output(Path(training_args.output_dir), training_args.resume_from_checkpoint, run_args.overwrite_output)


def _check_backbone_name(backbone):
    folder = Path(backbone)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"backbone: the folder {backbone} holds no config.json")
        return
    if folder.is_absolute() or backbone.startswith(".") or backbone.count("/") > 1:
        raise ConfigError(f"backbone: there is no folder {backbone}")
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(backbone)
    except HFValidationError as error:
        raise ConfigError(f"backbone is neither a folder nor a Hub name: {backbone!r}") from error


def _check_output(folder, resume, overwrite):
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir must be a folder, {folder} is a file")
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(f"output_dir {folder} can't be written: no permission in {parent}")
    results = [folder / "all_results.json", *folder.glob("checkpoint-*")] if folder.is_dir() else []
    if any(path.exists() for path in results) and not (resume or overwrite):
        raise ConfigError(
            f"output_dir {folder} holds an earlier run. Give another output_dir, --resume_from_checkpoint true to "
            "go on with it, or --overwrite_output to replace it"
        )


def build_model(model_fields, num_classes, image_size):
    """The training model, on pretrained weights or (with `backbone_config` alone) on random ones."""
    from vptsp.configuration_vptsp import VPTSPConfig
    from vptsp.modeling_metric_learning import VPTSPForMetricLearning
    from vptsp.open_backbone_vptsp import resized_config

    values = {**model_fields, "num_classes": num_classes}
    backbone = values.pop("backbone")
    if backbone is None:
        config = VPTSPConfig(**values)
        config.backbone_config = resized_config(config.backbone_config, image_size)
        return VPTSPForMetricLearning(config)
    revision = values.pop("backbone_revision")
    values.pop("backbone_config")
    return VPTSPForMetricLearning.from_backbone(backbone, revision=revision, image_size=image_size, **values)


def check_classes_answered(trainer):
    """Refuse, before training, a test set that has no distances between classes and no intervals.

    Raises:
        ConfigError: fewer than two classes of the queries that `trainer` evaluated last can be answered.
    """
    from vptsp.eval.metrics import count_relevant
    from vptsp.eval.run_pictures import EvaluatedImages

    evaluated = EvaluatedImages(trainer.eval_dataset, trainer.last_evaluated)
    _, query_labels, *gallery = evaluated.sets
    answered = query_labels[count_relevant(query_labels, *gallery[1:]) > 0].unique()
    if len(answered) < 2:
        raise ConfigError(
            f"all metrics need at least two test classes whose queries can be answered, got {len(answered)}; "
            "give more, or --final_metrics retrieval"
        )


def tuned_summary(model) -> dict[str, float]:
    """What is tuned, what is shipped and what only training needs: counts of parameters, and megabytes to ship."""
    retriever = model.retriever
    state, tuned = retriever.state_dict(), retriever.tuned_names()
    whole = model.config.save_backbone or model.config.backbone is None
    shipped = [tensor for name, tensor in state.items() if whole or name in tuned]
    num_tuned = sum(state[name].numel() for name in tuned)
    num_all = sum(tensor.numel() for tensor in state.values())
    num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if model.offloaded_class_prompts is not None:
        num_trained += model.config.class_prompt_bytes // 4
    return {
        "tuned_parameters": num_tuned,
        "retriever_parameters": num_all,
        "tuned_share": num_tuned / num_all,
        "shipped_parameters": sum(tensor.numel() for tensor in shipped),
        "shipped_megabytes": sum(tensor.numel() * tensor.element_size() for tensor in shipped) / 1e6,
        "training_only_parameters": num_trained - num_tuned,
    }


def print_summary(summary, images, training_args, class_prompts):
    lengths = {name: _length(part) for name, part in images.items()}
    sizes = ", ".join(f"{name} {'?' if length is None else f'{length:,}'}" for name, length in lengths.items())
    print(f"images            {sizes}")
    print(
        f"tuned             {summary['tuned_parameters']:,} of {summary['retriever_parameters']:,} parameters "
        f"({summary['tuned_share']:.2%})"
    )
    print(f"to ship           {summary['shipped_parameters']:,} parameters, {summary['shipped_megabytes']:.2f} MB")
    print(f"for training only {summary['training_only_parameters']:,} parameters (proxies, and what updates them)")
    print(f"class prompts     {class_prompts}")
    print(f"results           {training_args.output_dir}", flush=True)


def _length(dataset) -> int | None:
    """Number of images, None for a stream that does not know."""
    try:
        return len(dataset)
    except TypeError:
        return None


def print_scores(title, metrics, prefix):
    """Recall@K and MAP@R in percent, with their confidence intervals where there are any."""
    shown = []
    for name, value in metrics.items():
        short = name.removeprefix(f"{prefix}_")
        if short.startswith(("recall_at_", "map_at_r")) and not short.endswith(("_low", "_high")):
            low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
            interval = "" if low is None else f" ({100 * low:.1f} to {100 * high:.1f})"
            shown.append(f"{short} {100 * value:.2f}{interval}")
    print(f"{title:<18}" + "  ".join(shown), flush=True)


def versions() -> dict[str, str]:
    names = ("torch", "transformers", "datasets", "accelerate", "huggingface_hub", "safetensors", "numpy", "pillow")
    return {
        "python": platform.python_version(),
        "vptsp": metadata.version("vptsp"),
        **{n: metadata.version(n) for n in names},
    }


def peak_memory_megabytes() -> float:
    """Of the accelerator, or of this process where there is none."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / 1e6
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, kilobytes elsewhere
    return peak / (1e6 if sys.platform == "darwin" else 1e3)


def step_timer():
    """A callback that notes the seconds of every training step, data loading included; and the list of them."""
    from transformers import TrainerCallback

    seconds, last = [], [None]

    class StepTimer(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            now = time.perf_counter()
            if last[0] is not None:
                seconds.append(now - last[0])
            last[0] = now

        def on_evaluate(self, args, state, control, **kwargs):
            last[0] = None  # evaluation and saving are no steps

        on_save = on_evaluate

    return StepTimer(), seconds


def draw_pictures(folder, trainer, frozen, count):
    """Pictures of the evaluation that `trainer` made last, and of its training; says which and where.

    Returns:
        Names of the files.
    """
    from vptsp.eval.run_pictures import EvaluatedImages, draw_run
    from vptsp.proxy_movement_vptsp import FILE_NAME, read_proxy_movement

    movement = Path(trainer.args.output_dir) / FILE_NAME
    written, problems = draw_run(
        folder,
        EvaluatedImages(trainer.eval_dataset, trainer.last_evaluated),
        trainer.model.retriever.eval(),
        trainer.processing_class,
        [{"step": 0, "epoch": 0.0, **frozen}, *trainer.state.log_history],
        read_proxy_movement(movement) if movement.is_file() else [],
        count=count,
        seed=trainer.args.seed,
    )
    print(f"pictures          {folder}: {', '.join(path.name for path in written)}", flush=True)
    for name, problem in problems.items():
        print(f"no {name}.png: {problem}", file=sys.stderr)
    return {path.name for path in written}


def prepare(model_fields, training_args, data_args):
    """Load data and model and put them together.

    Returns:
        trainer: Ready to train; its `eval_dataset` is one data set, or a dict of query and gallery.
        images: All data sets, by split.
        step_seconds: A list that training fills.

    Raises:
        ConfigError or DataError: data, model and batches don't fit together.
    """
    from transformers import set_seed

    from vptsp.image_processor_vptsp import build_image_processor
    from vptsp.proxy_movement_vptsp import ProxyMovement
    from vptsp.trainer_vptsp import VPTSPTrainer

    images = data_args.image_datasets()
    parts = {name: part for name, part in images.items() if name != "train"}
    timer, step_seconds = step_timer()
    set_seed(training_args.seed)
    try:
        model = build_model(model_fields, images["train"].num_classes, data_args.image_size)
        trainer = VPTSPTrainer(
            model=model,
            args=training_args,
            train_dataset=images["train"],
            eval_dataset=parts.get("test", parts),
            processing_class=build_image_processor(
                data_args.image_size, data_args.resize_size, model.config.backbone, model.config.backbone_revision
            ),
            callbacks=[timer, ProxyMovement()] if hasattr(model, "proxies") else [timer],
        )
    except (ValueError, OSError, ImportError) as error:
        raise ConfigError(str(error)) from error
    return trainer, images, step_seconds


def run(model_fields, training_args, data_args, run_args, command):
    """Train, evaluate and save; returns the results that `all_results.json` gets."""
    from accelerate.utils import gather_object

    from vptsp.offloading_vptsp import describe_class_prompts

    trainer, images, step_seconds = prepare(model_fields, training_args, data_args)
    checkpoint = trainer.checkpoint_to_resume(training_args.resume_from_checkpoint)
    if checkpoint is None and run_args.overwrite_output:
        trainer.delete_checkpoints()
    is_main = trainer.is_world_process_zero()
    summary = tuned_summary(trainer.model)
    if is_main:
        print_summary(summary, images, training_args, describe_class_prompts(trainer.model))

    frozen = trainer.evaluate_backbone()
    if run_args.final_metrics == "all":
        check_classes_answered(trainer)
    if is_main:
        print_scores("frozen backbone", frozen, "frozen")
    outcome = trainer.train(resume_from_checkpoint=checkpoint)
    final = trainer.evaluate(metric_key_prefix="final", eval_metrics=run_args.final_metrics)
    trainer.save_model(_internal_call=True)  # nothing is uploaded before the scores are there
    skipped = set(gather_object([name for part in images.values() for name in part.skipped]))
    results = {
        "command": command,
        "seed": training_args.seed,
        "versions": versions(),
        "dataset": {
            "name": data_args.dataset_name,
            "repo": data_args.dataset_repo,
            "revision": data_args.dataset_revision,
            **{f"{name}_classes": part.num_classes for name, part in images.items()},
            **{f"{name}_images": _length(part) for name, part in images.items()},
            "skipped_images": sorted(skipped),
        },
        **summary,
        **frozen,
        **final,
        "best_step": trainer.state.best_global_step,
        "train_runtime": outcome.metrics["train_runtime"],
        "steps": outcome.global_step,
        "median_step_seconds": statistics.median(step_seconds) if step_seconds else None,
        "train_loss": outcome.training_loss,
        "peak_memory_megabytes": peak_memory_megabytes(),
    }
    if is_main:
        print_scores("frozen backbone", frozen, "frozen")
        print_scores("tuned", final, "final")
        write_results(results, trainer, run_args)
    trainer.results = results
    trainer.create_model_card()
    if training_args.push_to_hub and (commit := trainer.push_to_hub()):  # None on all processes but the first
        print(f"pushed            {commit.commit_url}", flush=True)
    return results


def write_results(results, trainer, run_args):
    """Write scores and pictures into `output_dir`; `results` gets the name of the picture that is to be shared."""
    output = Path(trainer.args.output_dir)
    (output / "all_results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"saved             {output}: retriever, README.md, all_results.json", flush=True)
    if run_args.picture_queries:
        frozen = {name: value for name, value in results.items() if name.startswith("frozen_")}
        drawn = draw_pictures(output / "pictures", trainer, frozen, run_args.picture_queries)
        results["picture"] = "pictures/neighbours.png" if "neighbours.png" in drawn else None


def main(argv=None):
    """Entry point.

    Exit status 2 and a line on stderr where the configuration can't work, 1 where a checkpoint can't be written, and
    130 (143) after Ctrl-C (SIGTERM).
    """
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        print(help_text("train.py", USAGE, __doc__, option_groups(_DERIVED, RunArguments)))
        return
    from vptsp.model_card_vptsp import without_tokens

    try:
        arguments = parse_arguments(argv)
        check_run(*arguments)
        run(*arguments, command=without_tokens(["train.py", *argv], arguments[1].hub_token))
    except (ConfigError, DataError, CheckpointError) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except CheckpointWriteError as error:
        print(f"train.py: error: {error.strerror or error}", file=sys.stderr)
        raise SystemExit(1) from error
    except TrainingInterrupted:  # has said all
        raise
    except KeyboardInterrupt:
        print("train.py: interrupted; what was saved before stays", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
