"""A run: data, model and Trainer put together, scores before and after training, results written."""

from __future__ import annotations

import os
import statistics
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from accelerate.utils import gather_object
from tqdm.auto import tqdm
from transformers import TrainerCallback, set_seed
from transformers.utils import logging

from ..configuration_vptsp import VPTSPConfig
from ..data_scripts.hub_places import hub_places
from ..data_scripts.image_datasets import image_datasets
from ..data_scripts.preprocessing import build_image_processor
from ..data_scripts.split_record import SPLITS_NAME, has_seen_classes, record_splits
from ..data_scripts.torch_dataset import ImageDataset
from ..data_scripts.unlabelled import ClusteredImages
from ..eval.evaluated_images import EvaluatedImages
from ..loading_vptsp import resized_config
from .cluster_rounds import report_line
from .fitting import fit_to_data
from .model import VPTSPForMetricLearning
from .offloading import describe_class_prompts
from .output_folder import check_output_folder, output_held
from .progress import RunProgress, ScoreTable
from .proxy_movement import FILE_NAME, ProxyMovement, read_proxy_movement
from .run_arguments import check_model_on_hub
from .run_errors import ConfigError
from .run_pictures import draw_run
from .run_record import record_data_arguments, versions
from .trainer import VPTSPTrainer
from .tuned_counts import tuned_counts
from .unlabelled_run import prepare_clusters, scores_line, scores_without_labels, warn_if_no_gain


def build_model(model_fields, num_classes, image_size, token=None):
    """The training model, on pretrained weights or (with `backbone_config` alone) on random ones.

    `token` is that of the Hub, for a backbone that is not public.
    """
    values = {**model_fields, "num_classes": num_classes}
    backbone = values.pop("backbone")
    if backbone is None:
        config = VPTSPConfig(**values)
        config.backbone_config = resized_config(config.backbone_config, image_size)
        return VPTSPForMetricLearning(config)
    revision = values.pop("backbone_revision")
    values.pop("backbone_config")
    return VPTSPForMetricLearning.from_backbone(
        backbone, revision=revision, image_size=image_size, token=token, **values
    )


def test_images(images):
    """The data set that tests, a dict of query and gallery, or None; of all data sets by split."""
    parts = {name: part for name, part in images.items() if name not in ("train", "validation")}
    return parts.get("test", parts) or None


def check_classes_answered(tests, last_evaluated):
    """Refuse, before training, a test set that has no distances between classes and no intervals.

    Raises:
        ConfigError: fewer than two classes of the queries that were evaluated last can be answered.
    """
    evaluated = EvaluatedImages(tests, last_evaluated)
    answered = evaluated.query_labels[evaluated.num_relevant > 0].unique()
    if len(answered) < 2:
        raise ConfigError(
            f"all metrics need at least two test classes whose queries can be answered, got {len(answered)}; "
            "give more, or --final_metrics retrieval"
        )


def describe_backbone(config) -> str:
    """One line: name, family, size, patches, pixels and pooling of a `VPTSPConfig`'s backbone."""
    own = config.backbone_config
    return (
        f"{config.backbone or 'random weights'}: {own.model_type}, {own.num_hidden_layers} layers of width "
        f"{own.hidden_size}, patches of {own.patch_size}, images of {own.image_size} pixels, pooling {config.pooling}"
    )


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


def peak_memory_megabytes() -> float:
    """Of the accelerator, or of this process where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 1e6
    import resource  # there is none on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, kilobytes elsewhere
    return peak / (1e6 if sys.platform == "darwin" else 1e3)


class StepTimer(TrainerCallback):
    """Notes the seconds of every training step, data loading included, in `seconds`."""

    def __init__(self):
        self.seconds = []
        self._last = None

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter()
        if self._last is not None:
            self.seconds.append(now - self._last)
        self._last = now

    def on_evaluate(self, args, state, control, **kwargs):
        self._last = None  # evaluation and saving are no steps

    on_save = on_evaluate


def draw_pictures(folder, trainer, tests, results, frozen_evaluated, run_args):
    """Pictures of the evaluation that `trainer` made last, and of its training; says which and where.

    Args:
        folder: Where to.
        trainer: After training.
        tests: The data set, or dict of query and gallery, that was evaluated.
        results: Of the run, the frozen backbone's scores among them.
        frozen_evaluated: `trainer.last_evaluated` of the frozen backbone.
        run_args: [`RunArguments`].

    Returns:
        Names of the files.
    """
    frozen = {name: value for name, value in results.items() if name.startswith("frozen_")}
    on = "frozen_validation_"  # where there are, curves are of these classes
    frozen |= {f"frozen_{name.removeprefix(on)}": value for name, value in frozen.items() if name.startswith(on)}
    seen = (trainer.split_record or {}).get("seen_classes")
    subject = {"subject": "classes that training has seen"} if seen else {}
    movement = Path(trainer.args.output_dir) / FILE_NAME
    records = read_proxy_movement(movement) if movement.is_file() else []
    written, problems = draw_run(
        folder,
        EvaluatedImages(tests, trainer.last_evaluated, **subject),
        trainer.model.retriever.eval(),
        trainer.processing_class,
        [{"step": 0, "epoch": 0.0, **frozen}, *trainer.state.log_history],
        records if run_args.picture_proxies else None,
        count=run_args.picture_queries,
        seed=trainer.args.seed,
        frozen=EvaluatedImages(tests, frozen_evaluated),
    )
    print(f"pictures          {folder}: {', '.join(path.name for path in written)}", flush=True)
    for name, problem in problems.items():
        print(f"no {name}.png: {problem}", file=sys.stderr)
    return {path.name for path in written}


def prepare(model_fields, training_args, data_args, images=None):
    """Load data and model and put them together.

    Args:
        model_fields, training_args, data_args: What the run is asked to do.
        images: The data sets by split, where they are loaded already.

    Returns:
        trainer: Ready to train; its `eval_dataset` is what chooses the best epoch: the validation images, where there
            are, else the test images.
        images: All data sets, by split.
        step_seconds: A list that training fills.

    Raises:
        ConfigError or DataError: data, model and batches don't fit together.
    """
    images = image_datasets(data_args) if images is None else images
    tests = test_images(images)
    timer = StepTimer()
    set_seed(training_args.seed)
    try:
        token = training_args.hub_token
        model = build_model(model_fields, images["train"].num_classes, data_args.image_size, token)
        trainer = VPTSPTrainer(
            model=model,
            args=training_args,
            train_dataset=images["train"],
            eval_dataset=images.get("validation", tests),
            processing_class=build_image_processor(
                data_args.image_size,
                data_args.resize_size,
                model.config.backbone,
                model.config.backbone_revision,
                token=token,
            ),
            data_settings=record_data_arguments(data_args),
            callbacks=[timer, ProxyMovement()] if hasattr(model, "proxies") else [timer],
        )
    except (ValueError, OSError, ImportError) as error:
        raise ConfigError(str(error)) from error
    trainer.split_record = record_splits(data_args, images)
    return trainer, images, timer.seconds


@contextmanager
def _hub_token(token):
    """The token for what takes none of its own, such as data sets on the Hub, which may be read as they are needed."""
    before = os.environ.get("HF_TOKEN")
    if token is not None:
        os.environ["HF_TOKEN"] = token
    try:
        yield
    finally:
        if token is not None:
            os.environ.pop("HF_TOKEN")
            if before is not None:
                os.environ["HF_TOKEN"] = before


def run(model_fields, training_args, data_args, run_args, command):
    """Train, evaluate and save; returns the results that `all_results.json` gets.

    Raises:
        InUseError: another run uses `output_dir`.
    """
    logging.disable_progress_bar()  # of loading and writing a few files
    training_args.disable_tqdm |= not sys.stderr.isatty()  # in a log, bars are noise
    with _hub_token(training_args.hub_token):
        check_model_on_hub(model_fields, training_args, data_args)
        images = image_datasets(data_args)
        for part in images.values():
            if isinstance(part, ImageDataset):  # a stream is read as it comes
                part.check_headers()
        if isinstance(images["train"], ClusteredImages):
            fields = {**model_fields, "proxy_update": "none"}  # whose class prompts nobody needs yet
            token = training_args.hub_token
            prepare_clusters(
                images["train"],
                training_args,
                data_args,
                lambda num_classes: build_model(fields, num_classes, data_args.image_size, token),
            )
        notes = fit_to_data(training_args, images, run_args.final_metrics)
        return _run(model_fields, training_args, data_args, run_args, command, images, notes)


def _run(model_fields, training_args, data_args, run_args, command, images, notes):
    with output_held(training_args):
        # again, for what another run may have done since, and now nobody can
        resume, overwrite = training_args.resume_from_checkpoint, run_args.overwrite_output
        check_output_folder(training_args.output_dir, model_fields["backbone"], resume, overwrite)
        trainer, images, step_seconds = prepare(model_fields, training_args, data_args, images)
        if trainer.is_world_process_zero() and has_seen_classes(data_args, images):
            notes.append("test              classes that train too, asked for by other images of them")
        for note in notes if trainer.is_world_process_zero() else ():
            print(note, flush=True)
        results, frozen_evaluated = train_and_evaluate(trainer, images, step_seconds, run_args)
        results = {"command": command, "seed": training_args.seed, **described_data(data_args, images), **results}
        save_results(results, trainer, run_args, frozen_evaluated, test_images(images))
        if training_args.push_to_hub and (
            commit := trainer.push_to_hub(results=results)
        ):  # None on all processes but the first
            print(f"pushed            {commit.commit_url}", flush=True)
    return results


def train_and_evaluate(trainer, images, step_seconds, run_args):
    """Scores of the frozen backbone, training, scores of what it gave.

    Returns:
        A part of the results, and what the frozen backbone was evaluated on (`trainer.last_evaluated`).
    """
    checkpoint = trainer.checkpoint_to_resume(trainer.args.resume_from_checkpoint)
    if checkpoint is None and run_args.overwrite_output:
        trainer.replace_checkpoints()
    is_main = trainer.is_world_process_zero()
    summary = tuned_counts(trainer.model)
    if is_main:
        print(f"backbone          {describe_backbone(trainer.model.config)}")
        print_summary(summary, images, trainer.args, describe_class_prompts(trainer.model))

    table = ScoreTable(trainer.args.recall_at, write=tqdm.write if is_main else lambda line: None)
    RunProgress.of(trainer, table)
    tests = test_images(images)
    frozen, chosen_on = {}, {}
    if "validation" in images:  # where the curves of its scores start
        chosen_on = trainer.evaluate_backbone(metric_key_prefix="frozen_validation")
    if tests is not None:
        frozen = trainer.evaluate_backbone(tests)
    frozen_evaluated = trainer.last_evaluated
    if tests is not None and run_args.final_metrics == "all":
        check_classes_answered(tests, frozen_evaluated)
    if trainer.rounds is not None:
        with trainer.backbone_alone():
            frozen |= scores_without_labels(trainer, "frozen")
        table.say(scores_line("frozen backbone", frozen, "frozen"))
        trainer.rounds.say = table.say
        table.say(report_line(trainer.rounds.reports[0]))
    table.header()
    if tests is not None:
        table.rows("frozen backbone", without_prefix(frozen, "frozen"))
    if chosen_on:
        table.rows("  validation", without_prefix(chosen_on, "frozen_validation"))
    outcome = trainer.train(resume_from_checkpoint=checkpoint or False)
    final = {}
    if tests is not None:
        final = trainer.evaluate(tests, metric_key_prefix="final", eval_metrics=run_args.final_metrics)
        print_comparison(table, frozen, final, trainer, "validation" in images)
    if trainer.rounds is not None:
        final |= scores_without_labels(trainer, "final") | {"rounds": trainer.rounds.reports}
        table.say(scores_line("frozen backbone", frozen, "frozen"))
        table.say(scores_line("tuned", final, "final"))
        if is_main:
            warn_if_no_gain({**frozen, **final}, outcome.global_step)
    results = {
        **summary,
        **frozen,
        **chosen_on,
        **final,
        "best_step": trainer.state.best_global_step,
        "train_runtime": outcome.metrics["train_runtime"],
        "steps": outcome.global_step,
        "median_step_seconds": statistics.median(step_seconds) if step_seconds else None,
        "train_loss": outcome.training_loss,
        "peak_memory_megabytes": peak_memory_megabytes(),
    }
    return results, frozen_evaluated


def print_comparison(table, frozen, final, trainer, validates):
    """What tuning brought, in the table's last lines."""
    args, state = trainer.args, trainer.state
    step = state.best_global_step if args.load_best_model_at_end else state.global_step
    table.header(after_others=True)
    table.rows("frozen backbone", without_prefix(frozen, "frozen"))
    table.rows("tuned", without_prefix(final, "final"), step)
    if args.load_best_model_at_end:
        where = (
            "images of the validation classes, not on these test images"
            if validates
            else "these same test images, which flatters it (--validation_share 0.2 chooses on training classes, "
            "--load_best_model_at_end false keeps the last)"
        )
        table.say(f"chosen            the best of its evaluations by {args.metric_for_best_model}, on {where}")


def without_prefix(metrics, prefix):
    return {name.removeprefix(f"{prefix}_"): value for name, value in metrics.items()}


def described_data(data_args, images):
    """The data set and what was left out of it, and versions; as a part of the results."""
    skipped = set(gather_object([name for part in images.values() for name in part.skipped]))
    places = hub_places(data_args, data_args.data_dir) if data_args.dataset_name == "hub" else {}
    train = places.pop("train", None)
    dataset = {
        "name": data_args.dataset_name,
        "labels": data_args.labels,
        "repo": None if train is None or train.is_folder else train.name,
        "revision": None if train is None else train.revision,
        "tested_on": [  # of a folder the last part alone, as results are shared
            {
                "name": Path(place.name).name if place.is_folder else place.name,
                "repo": None if place.is_folder else place.name,
                "revision": place.revision,
            }
            for place in places.values()
        ],
        **{f"{name}_classes": part.num_classes for name, part in images.items()},
        **{f"{name}_images": _length(part) for name, part in images.items()},
        "skipped_images": sorted(skipped),
        "seen_classes": has_seen_classes(data_args, images),
    }
    return {"versions": versions(), "dataset": dataset}


def save_results(results, trainer, run_args, frozen_evaluated, tests):
    """Put retriever, scores and model card into `output_dir`, all at once, then pictures.

    `results` gets the name of the picture that is to be shared.
    """
    trainer.save_retriever(results=results)
    trainer.delete_replaced()
    if not trainer.is_world_process_zero():
        return
    output = Path(trainer.args.output_dir)
    print(f"saved             {output}: retriever, README.md, all_results.json, {SPLITS_NAME}", flush=True)
    if run_args.picture_queries and tests is None:
        print("no pictures: there are no test images")
    elif run_args.picture_queries:
        drawn = draw_pictures(output / "pictures", trainer, tests, results, frozen_evaluated, run_args)
        results["picture"] = "pictures/neighbours.png" if "neighbours.png" in drawn else None
        trainer.create_model_card(results=results)


__all__ = ["build_model", "prepare", "run"]
