"""What of a run follows from its data: batches that can be drawn, a test that can be scored, or none at all.

It is looked at once the images are listed, before weights are loaded and before anything is written.
"""

from __future__ import annotations

import numpy as np
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ..data_scripts.streaming import StreamedImages
from ..data_scripts.unlabelled import ClusteredImages
from .run_errors import ConfigError


NO_TEST = "give --test_share 0 to train on all classes without a test"


def fit_to_data(training_args, images, final_metrics="all"):
    """Adapt a run to its data, or refuse it.

    Args:
        training_args: `VPTSPTrainingArguments`. The batch is made smaller where there are fewer classes than it asks
            for; without test images there are no evaluations.
        images: Data sets by split.
        final_metrics: What the last evaluation computes.

    Returns:
        Lines that say what was adapted.

    Raises:
        ConfigError: there are too few classes to train on, or to test on.
    """
    clustered = isinstance(images["train"], ClusteredImages)
    num_classes = images["train"].num_active if clustered else images["train"].num_classes
    if num_classes < 2:
        raise ConfigError(
            f"training needs at least two classes, got {num_classes} ({', '.join(images['train'].class_names)}): give "
            "more classes, another --test_share, or --test_share 0 to train on all of them"
        )
    notes = [_fit_batch(training_args, num_classes)]
    tests = {name: part for name, part in images.items() if name not in ("train", "validation")}
    if clustered:
        notes.append(_without_choice(training_args))
    if "validation" in images:
        notes.append(_check_validation(images["validation"], tests))
    elif not tests:
        kind = "no labelled images to test on" if clustered else f"all {num_classes} classes train"
        notes.append(_without_test(training_args, kind))
    if tests:
        _check_answered(tests, final_metrics)
    return [note for note in notes if note is not None]


def _fit_batch(args, num_classes):
    """Make the batch as small as the number of classes demands."""
    asked = args.train_batch_size * args.world_size
    if asked // args.images_per_class <= num_classes or args.n_gpu > 1:
        return None
    per_device = num_classes // args.world_size * args.images_per_class
    if not per_device:
        raise ConfigError(
            f"{args.world_size} processes need a class each, but there are {num_classes} training classes"
        )
    args.per_device_train_batch_size = per_device
    return (
        f"batch             {per_device * args.world_size} images, not {asked}: there are {num_classes} training "
        f"classes, and {args.images_per_class} images of each in a batch"
    )


def _without_choice(args):
    """Without labels the last model is the result: one chosen by test labels would have been trained on them."""
    if not args.load_best_model_at_end:
        return None
    args.load_best_model_at_end = False
    return "chosen            the last model: labels of test images choose none where training has no labels"


def _without_test(args, kind):
    if args.save_strategy == SaveStrategy.BEST:
        raise ConfigError("save_strategy must be epoch, steps or no where nothing is tested (test_share 0), got best")
    args.eval_strategy = IntervalStrategy.NO
    args.do_eval = False
    args.load_best_model_at_end = False
    return f"evaluation        none: {kind}"


def _check_validation(validation, tests):
    if np.unique(validation.labels, return_counts=True)[1].max() < 2:
        raise ConfigError("validation_share: no validation image can be found by another one, as no class has two")
    scored = "" if tests else "; nothing is tested"
    return (
        f"validation        {validation.num_classes} of the training classes, which don't train: the scores of epochs "
        f"are theirs, and choose the best{scored}"
    )


def _check_answered(images, final_metrics):
    parts = [images[name] for name in ("test", "query", "gallery") if name in images]
    if isinstance(parts[0], StreamedImages):
        found = sorted(parts[0].answered_classes(2, *parts[1:]))
    elif "query" in images:
        found = np.intersect1d(images["query"].labels, images["gallery"].labels)
    else:
        labels, counts = np.unique(images["test"].labels, return_counts=True)
        found = labels[counts > 1]
    if not len(found):
        raise ConfigError(
            "no test image can be found by another one, as no test class has two: give more images of a class, or "
            f"{NO_TEST}"
        )
    if final_metrics == "all" and len(found) < 2:
        raise ConfigError(
            "all metrics need at least two test classes whose queries can be answered, got 1; give more (by "
            f"--test_share or --test_classes), or --final_metrics retrieval, or {NO_TEST}"
        )


__all__ = ["fit_to_data"]
