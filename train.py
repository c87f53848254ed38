"""Tune prompts for image retrieval on a frozen vision transformer.

    accelerate launch train.py configs/cub_vits16.yaml --data_dir path/to/CUB_200_2011
    accelerate launch train.py configs/folder.yaml --data_dir path/to/folders --num_train_epochs 5
    vptsp train table1/vpt --data_dir path/to/CUB_200_2011 --backbone facebook/dino-vits16

The YAML file (or the name of one that the package brings) and the options name fields of `VPTSPConfig` (what the model
is), `VPTSPTrainingArguments` (how the run goes) and `DataArguments` (what data); options win. `output_dir` gets the
retriever, `all_results.json` and pictures.
"""

from __future__ import annotations

import platform
import statistics
import sys
import time
from importlib import metadata
from pathlib import Path

from vptsp.data_scripts.data_errors import DataError
from vptsp.files.locks import InUseError
from vptsp.training.command_help import help_text, option_groups
from vptsp.training.output_folder import OutputFolderError, check_output_folder, output_held
from vptsp.training.run_arguments import (
    DERIVED,
    USAGE,
    ConfigError,
    RunArguments,
    check_run,
    parse_arguments,
)
from vptsp.training.run_errors import CheckpointError, CheckpointWriteError, TrainingError, TrainingInterrupted


def build_model(model_fields, num_classes, image_size):
    """The training model, on pretrained weights or (with `backbone_config` alone) on random ones."""
    from vptsp.configuration_vptsp import VPTSPConfig
    from vptsp.loading_vptsp import resized_config
    from vptsp.training.model import VPTSPForMetricLearning

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
    from vptsp.eval.run_pictures import EvaluatedImages

    evaluated = EvaluatedImages(trainer.eval_dataset, trainer.last_evaluated)
    answered = evaluated.query_labels[evaluated.num_relevant > 0].unique()
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
    from vptsp.training.proxy_movement import FILE_NAME, read_proxy_movement

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

    from vptsp.data_scripts.image_datasets import image_datasets
    from vptsp.data_scripts.preprocessing import build_image_processor
    from vptsp.training.proxy_movement import ProxyMovement
    from vptsp.training.run_record import record_data_arguments
    from vptsp.training.trainer import VPTSPTrainer

    images = image_datasets(data_args)
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
    trainer.data_settings = record_data_arguments(data_args)
    return trainer, images, step_seconds


def run(model_fields, training_args, data_args, run_args, command):
    """Train, evaluate and save; returns the results that `all_results.json` gets.

    Raises:
        InUseError: another run uses `output_dir`.
    """
    with output_held(training_args):
        # again, for what another run may have done since, and now nobody can
        resume, overwrite = training_args.resume_from_checkpoint, run_args.overwrite_output
        check_output_folder(training_args.output_dir, model_fields["backbone"], resume, overwrite)
        trainer, images, step_seconds = prepare(model_fields, training_args, data_args)
        results = train_and_evaluate(trainer, images, step_seconds, run_args)
        results = {"command": command, "seed": training_args.seed, **described_data(data_args, images), **results}
        save_results(results, trainer, run_args)
        if training_args.push_to_hub and (commit := trainer.push_to_hub()):  # None on all processes but the first
            print(f"pushed            {commit.commit_url}", flush=True)
    return results


def train_and_evaluate(trainer, images, step_seconds, run_args):
    """Scores of the frozen backbone, training, scores of what it gave; as a part of the results."""
    from vptsp.training.offloading import describe_class_prompts

    checkpoint = trainer.checkpoint_to_resume(trainer.args.resume_from_checkpoint)
    if checkpoint is None and run_args.overwrite_output:
        trainer.replace_checkpoints()
    is_main = trainer.is_world_process_zero()
    summary = tuned_summary(trainer.model)
    if is_main:
        print_summary(summary, images, trainer.args, describe_class_prompts(trainer.model))

    frozen = trainer.evaluate_backbone()
    if run_args.final_metrics == "all":
        check_classes_answered(trainer)
    if is_main:
        print_scores("frozen backbone", frozen, "frozen")
    outcome = trainer.train(resume_from_checkpoint=checkpoint or False)
    final = trainer.evaluate(metric_key_prefix="final", eval_metrics=run_args.final_metrics)
    if is_main:
        print_scores("frozen backbone", frozen, "frozen")
        print_scores("tuned", final, "final")
    return {
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


def described_data(data_args, images):
    """The data set and what was left out of it, and versions; as a part of the results."""
    from accelerate.utils import gather_object

    skipped = set(gather_object([name for part in images.values() for name in part.skipped]))
    dataset = {
        "name": data_args.dataset_name,
        "repo": data_args.dataset_repo,
        "revision": data_args.dataset_revision,
        **{f"{name}_classes": part.num_classes for name, part in images.items()},
        **{f"{name}_images": _length(part) for name, part in images.items()},
        "skipped_images": sorted(skipped),
    }
    return {"versions": versions(), "dataset": dataset}


def save_results(results, trainer, run_args):
    """Put retriever, scores and model card into `output_dir`, all at once, then pictures.

    `results` gets the name of the picture that is to be shared.
    """
    trainer.results = results
    trainer.save_model(_internal_call=True)  # nothing is uploaded before all is there
    trainer.delete_replaced()
    if not trainer.is_world_process_zero():
        return
    output = Path(trainer.args.output_dir)
    print(f"saved             {output}: retriever, README.md, all_results.json", flush=True)
    if run_args.picture_queries:
        frozen = {name: value for name, value in results.items() if name.startswith("frozen_")}
        drawn = draw_pictures(output / "pictures", trainer, frozen, run_args.picture_queries)
        results["picture"] = "pictures/neighbours.png" if "neighbours.png" in drawn else None
        trainer.create_model_card()


def main(argv=None):
    """Entry point.

    Exit status 2 and a line on stderr where the configuration can't work, 1 where a checkpoint can't be written, and
    130 (143) after Ctrl-C (SIGTERM).
    """
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        print(help_text("train.py", USAGE, __doc__, option_groups(DERIVED, RunArguments)))
        return
    from vptsp.training.model_card import without_tokens

    try:
        arguments = parse_arguments(argv)
        check_run(*arguments)
        run(*arguments, command=without_tokens(["train.py", *argv], arguments[1].hub_token))
    except (ConfigError, DataError, CheckpointError, InUseError, OutputFolderError, TrainingError) as error:
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
