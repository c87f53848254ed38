"""Tune prompts for image retrieval on a frozen vision transformer.

    accelerate launch train.py configs/cub_vits16.yaml --data_dir path/to/CUB_200_2011
    accelerate launch train.py configs/folder.yaml --data_dir path/to/folders --num_train_epochs 5

The YAML file and the options name fields of `VPTSPConfig` (what the model is), `VPTSPTrainingArguments` (how the run
goes) and `DataArguments` (what data); options win. `output_dir` gets the retriever, `all_results.json` and a picture.
"""

from __future__ import annotations

import difflib
import json
import os
import platform
import shlex
import statistics
import sys
import time
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from importlib import metadata
from pathlib import Path

import yaml

from vptsp.configuration_vptsp import VPTSPConfig
from vptsp.data_scripts import DataArguments, DataError, check_data_arguments
from vptsp.run_errors_vptsp import CheckpointError, CheckpointWriteError, TrainingInterrupted


# Fields of VPTSPConfig that follow from the data or the backbone and so are nobody's to set.
_DERIVED = ("num_classes", "backbone_fingerprint")


@dataclass
class RunArguments:
    """What is left: where results may go."""

    overwrite_output: bool = field(
        default=False, metadata={"help": "Write into an output_dir that holds an earlier run's results."}
    )
    picture_queries: int = field(
        default=8, metadata={"help": "Queries in the picture of neighbours; 0 for no picture."}
    )


class ConfigError(ValueError):
    """A configuration that can't work, with what to change."""


def model_arguments_class():
    """A dataclass of the fields of `VPTSPConfig` that a user may set, for `HfArgumentParser`."""
    from transformers import PreTrainedConfig

    inherited = {item.name for item in fields(PreTrainedConfig)} | set(_DERIVED)
    own = [item for item in fields(VPTSPConfig) if item.name not in inherited]
    help_texts = _documented_fields(VPTSPConfig)
    columns = []
    for item in own:
        kind = "str | None" if item.name == "backbone_config" else item.type
        default = None if item.default is MISSING else item.default
        columns.append((item.name, kind, field(default=default, metadata={"help": help_texts[item.name]})))
    return make_dataclass("ModelArguments", columns)


def _documented_fields(cls) -> dict[str, str]:
    """Field -> text, from the `Args` section of a class's docstring."""
    texts, name = {}, None
    for line in cls.__doc__.split("Args:")[1].split("Raises:")[0].splitlines():
        if line.startswith(" " * 8) and not line.startswith(" " * 9):
            name, _, text = line.strip().partition(": ")
            texts[name] = text
        elif name is not None and line.strip():
            texts[name] += " " + line.strip()
    return {name: text.replace("%", "%%") for name, text in texts.items()}


def parse_arguments(argv):
    """Command line -> (model fields that were given, training, data and run arguments).

    Raises:
        ConfigError: the YAML file can't be read, or it or the command line holds something unknown or out of range.
    """
    from transformers import HfArgumentParser

    from vptsp.training_args_vptsp import VPTSPTrainingArguments

    classes = (model_arguments_class(), VPTSPTrainingArguments, DataArguments, RunArguments)
    parser = HfArgumentParser(
        classes, prog="train.py", usage="%(prog)s [CONFIG.yaml] [--FIELD VALUE ...]", description=__doc__
    )
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
    if isinstance(model_fields["backbone_config"], str):
        try:
            model_fields["backbone_config"] = json.loads(model_fields["backbone_config"])
        except json.JSONDecodeError as error:
            raise ConfigError(f"backbone_config must be JSON with a model_type: {error}") from error
    return model_fields, training_args, data_args, run_args


def read_config(path, known):
    """Fields of a YAML file.

    Raises:
        ConfigError: no such file, not YAML, not a mapping, or a field that does not exist.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
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
    from transformers import AutoConfig

    check_data_arguments(data_args)
    backbone = model_fields["backbone"]
    if backbone is None and model_fields["backbone_config"] is None:
        raise ConfigError("backbone must be the Hub name or the folder of a vision transformer, got None")
    if backbone is not None:
        _check_backbone_name(str(backbone))
    if backbone is not None and Path(backbone).is_dir():
        model_fields = {**model_fields, "backbone_config": AutoConfig.from_pretrained(backbone)}
    try:
        VPTSPConfig(**model_fields)
    except ValueError as error:
        raise ConfigError(str(error)) from error
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


def build_model(model_fields, num_classes):
    """The training model, on pretrained weights or (with `backbone_config` alone) on random ones."""
    from vptsp.modeling_metric_learning import VPTSPForMetricLearning

    values = {**model_fields, "num_classes": num_classes}
    backbone = values.pop("backbone")
    if backbone is None:
        return VPTSPForMetricLearning(VPTSPConfig(**values))
    revision = values.pop("backbone_revision")
    values.pop("backbone_config")
    return VPTSPForMetricLearning.from_backbone(backbone, revision=revision, **values)


def tuned_summary(model) -> dict[str, float]:
    """What is tuned: counts of parameters, the share of the retriever, and megabytes to ship."""
    retriever = model.retriever
    tuned = retriever.tuned_names()
    state = retriever.state_dict()
    shipped = sum(state[name].numel() for name in tuned)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "tuned_parameters": shipped,
        "retriever_parameters": sum(tensor.numel() for tensor in state.values()),
        "tuned_share": shipped / sum(tensor.numel() for tensor in state.values()),
        "training_only_parameters": trained - shipped,
        "shipped_megabytes": sum(state[name].numel() * state[name].element_size() for name in tuned) / 1e6,
    }


def print_summary(summary, images, training_args):
    lengths = {name: _length(part) for name, part in images.items()}
    sizes = ", ".join(f"{name} {'?' if length is None else f'{length:,}'}" for name, length in lengths.items())
    print(f"images            {sizes}")
    print(
        f"tuned             {summary['tuned_parameters']:,} of {summary['retriever_parameters']:,} parameters "
        f"({summary['tuned_share']:.2%}), {summary['shipped_megabytes']:.2f} MB to ship"
    )
    print(
        f"for training only {summary['training_only_parameters']:,} parameters (class prompts, proxies, their update)"
    )
    print(f"results           {training_args.output_dir}", flush=True)


def _length(dataset) -> int | None:
    """Number of images, None for a stream that does not know."""
    try:
        return len(dataset)
    except TypeError:
        return None


def print_scores(title, metrics, prefix):
    shown = {k.removeprefix(f"{prefix}_"): v for k, v in metrics.items() if "recall_at" in k or "map_at_r" in k}
    print(f"{title:<18}" + "  ".join(f"{name} {100 * value:.2f}" for name, value in shown.items()), flush=True)


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


def save_picture(path, trainer, dataset, count):
    """Grid of queries with their nearest neighbours, of the data set that `trainer` evaluated last."""
    from vptsp.eval.neighbours import nearest_neighbours
    from vptsp.eval.pictures import choose_queries, save_neighbour_grid

    queries = dataset["query"] if isinstance(dataset, dict) else dataset
    gallery = dataset["gallery"] if isinstance(dataset, dict) else dataset
    query_rows, query_embeddings, query_labels = _readable(*trainer.last_evaluated["query"])
    gallery_rows, gallery_embeddings, gallery_labels = query_rows, None, query_labels
    if gallery is not queries:
        gallery_rows, gallery_embeddings, gallery_labels = _readable(*trainer.last_evaluated["gallery"])
    most = len(gallery_labels) - int(gallery is queries)
    similarity, index = nearest_neighbours(query_embeddings, min(8, most), gallery_embeddings)
    chosen = choose_queries(query_labels, count, seed=trainer.args.seed)
    query_images = queries.open_images(query_rows[chosen].tolist())
    neighbour_images = gallery.open_images(set(gallery_rows[index[chosen]].flatten().tolist()))
    save_neighbour_grid(
        path,
        query_images=[query_images[int(query_rows[i])] for i in chosen],
        neighbour_images=[[neighbour_images[int(gallery_rows[j])] for j in index[i]] for i in chosen],
        query_names=[queries.class_names[int(query_labels[i])] for i in chosen],
        neighbour_names=[[gallery.class_names[int(gallery_labels[j])] for j in index[i]] for i in chosen],
        similarity=similarity[chosen],
        correct=gallery_labels[index[chosen]] == query_labels[chosen][:, None],
        title="Nearest neighbours of classes that training has not seen",
    )


def _readable(embeddings, labels):
    """Rows, embeddings and labels without the images that could not be read."""
    rows = (labels >= 0).nonzero().flatten()
    return rows, embeddings[rows], labels[rows]


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
    from vptsp.trainer_vptsp import VPTSPTrainer

    images = data_args.image_datasets()
    parts = {name: part for name, part in images.items() if name != "train"}
    timer, step_seconds = step_timer()
    set_seed(training_args.seed)
    try:
        model = build_model(model_fields, images["train"].num_classes)
        trainer = VPTSPTrainer(
            model=model,
            args=training_args,
            train_dataset=images["train"],
            eval_dataset=parts.get("test", parts),
            processing_class=build_image_processor(
                data_args.image_size, data_args.resize_size, model.config.backbone, model.config.backbone_revision
            ),
            callbacks=[timer],
        )
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error
    expected = model.config.backbone_config.image_size
    if expected != data_args.image_size:
        raise ConfigError(f"image_size is {data_args.image_size}, but the backbone takes {expected}")
    return trainer, images, step_seconds


def run(model_fields, training_args, data_args, run_args, command):
    """Train, evaluate and save; returns the results that `all_results.json` gets."""
    from accelerate.utils import gather_object

    trainer, images, step_seconds = prepare(model_fields, training_args, data_args)
    checkpoint = trainer.checkpoint_to_resume(training_args.resume_from_checkpoint)
    if checkpoint is None and run_args.overwrite_output:
        trainer.delete_checkpoints()
    is_main = trainer.is_world_process_zero()
    summary = tuned_summary(trainer.model)
    if is_main:
        print_summary(summary, images, training_args)

    frozen = trainer.evaluate_backbone()
    if is_main:
        print_scores("frozen backbone", frozen, "frozen")
    outcome = trainer.train(resume_from_checkpoint=checkpoint)
    final = trainer.evaluate(metric_key_prefix="final")
    trainer.save_model()
    skipped = set(gather_object([name for part in images.values() for name in part.skipped]))
    results = {
        "command": command,
        "seed": training_args.seed,
        "versions": versions(),
        "dataset": {
            "name": data_args.dataset_name,
            "train_classes": trainer.train_dataset.num_classes,
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
    return results


def write_results(results, trainer, run_args):
    """Write what the run came to into `output_dir`."""
    output = Path(trainer.args.output_dir)
    (output / "all_results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    written = "retriever, all_results.json"
    if run_args.picture_queries:
        written += ", neighbours.png"
        save_picture(output / "neighbours.png", trainer, trainer.eval_dataset, run_args.picture_queries)
    print(f"saved             {output}: {written}", flush=True)


def main(argv=None):
    """Entry point.

    Exit status 2 and a line on stderr where the configuration can't work, 1 where a checkpoint can't be written, and
    130 (143) after Ctrl-C (SIGTERM).
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        arguments = parse_arguments(argv)
        check_run(*arguments)
        run(*arguments, command=shlex.join(["train.py", *argv]))
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
