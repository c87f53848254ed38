"""Rounds of training on photos without labels: cluster, train on the clusters, embed anew, cluster anew.

The state of a run is the round it is in, the labels of its photos and what was reported of each round; it is a part of
every checkpoint, so a run that goes on has the labels that it had, and ends as if it had not been interrupted.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from ..data_scripts.unlabelled import ClusterBatchSampler
from ..files.atomic import write_json
from .checkpoints import load_tree, random_state, save_tree, set_random_state
from .class_rows import move_class_rows
from .photo_clusters import (
    ClusterPlan,
    MixedGroupError,
    class_of_groups,
    cluster_photos,
    follow_clusters,
    linked_groups,
)
from .run_errors import CheckpointError, ConfigError, TrainingError


CLUSTERS_NAME = "clusters"
ROUNDS_NAME = "rounds.json"
# Whose states have a row for each row of a parameter
ROW_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd", "rmsprop", "adagrad")
CLUSTER_ARGUMENTS = (
    "clustering",
    "clusters",
    "min_cluster_size",
    "cluster_dims",
    "cluster_keep",
    "rounds",
    "link_similarity",
)
"""Training arguments that mean something where photos lack labels."""

logger = logging.getLogger(__name__)


def refuse_cluster_arguments(args):
    """Refuse what only photos without labels give a meaning to.

    Raises:
        ValueError: such an argument is not at its default.
    """
    defaults = {name: item.default for name, item in type(args).__dataclass_fields__.items()}
    for name in CLUSTER_ARGUMENTS:
        if getattr(args, name) != defaults[name]:
            raise ValueError(f"{name} is of training without labels, got {getattr(args, name)!r} with labels given")


def check_cluster_arguments(args):
    """Refuse what does not go together, or what another argument leaves without a meaning.

    Raises:
        ValueError: with the arguments.
    """
    defaults = {name: item.default for name, item in type(args).__dataclass_fields__.items()}
    unread = {
        "kmeans": ("min_cluster_size",),
        "faiss": ("min_cluster_size",),
        "hdbscan": ("clusters", "cluster_keep"),
        "instances": ("clusters", "cluster_keep", "min_cluster_size", "cluster_dims", "rounds"),
    }
    for name in unread[args.clustering]:
        if getattr(args, name) != defaults[name]:
            raise ValueError(f"{name} is not read by clustering {args.clustering}, got {getattr(args, name)!r}")
    if args.rounds > 1 and args.max_steps <= 0 and args.rounds > args.num_train_epochs:
        raise ValueError(f"rounds must be at most the {args.num_train_epochs:g} epochs, got {args.rounds}")
    if args.rounds > 1 and (optim := str(getattr(args.optim, "value", args.optim))) not in ROW_OPTIMIZERS:
        raise ValueError(
            f"optim must be one of {', '.join(ROW_OPTIMIZERS)} with more than one round, got {optim}: what others "
            "keep of a class can't follow its cluster"
        )
    if args.rounds > 1 and args.dataloader_persistent_workers:
        raise ValueError("dataloader_persistent_workers keeps the labels of the first round: leave it out with rounds")


def check_groups(images):
    """Refuse groups with photos of two classes, which can be seen before anything is embedded.

    Args:
        images: A `ClusteredImages`.

    Raises:
        ConfigError: with the files and the classes.
    """
    if images.groups is None:
        return
    try:
        class_of_groups(linked_groups(np.empty((len(images), 0)), images.groups), images.given)
    except MixedGroupError as error:
        raise ConfigError(_mixed(error, images)) from error


def _mixed(error, images, rows=None):
    """What a [`MixedGroupError`] says, with the names of files and classes.

    Args:
        error: Its photos are numbers of rows, or (where they are given) of `rows`.
        images: The `ClusteredImages`.
        rows: `(m,)` int64.
    """
    photos = error.photos if rows is None else rows[list(error.photos)]
    names = [images.name_of(int(photo)) for photo in photos]
    return error.named(names, [repr(images.given_names[number]) for number in error.classes])


def first_clusters(images, embeddings, readable, args):
    """Cluster photos by what the backbone alone makes of them, and set their labels for the first round.

    Args:
        images: A `ClusteredImages`; also gets what always stays together as its `linked`.
        embeddings: `(n, E)` float array, L2-normalised.
        readable: `(n,)` bool array: photos that could be read; the others are left out.
        args: `VPTSPTrainingArguments`.

    Raises:
        ConfigError: they can't be clustered so.
    """
    check_cluster_arguments(args)
    if args.link_similarity is not None:
        rows = np.flatnonzero(readable)
        groups = None if images.groups is None else images.groups[rows]
        linked = np.full(len(images), -1, dtype=np.int64)
        linked[rows] = linked_groups(embeddings[rows], groups, args.link_similarity)
        images.linked = linked
    try:
        labels = _agreed(args, images, embeddings, readable, args.clusters)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    capacity = int(labels.max(initial=-1)) + 1
    num_given = len(images.given_names)
    if capacity == num_given:
        raise ConfigError(
            f"{args.clustering} found no cluster among {len(images)} photos: give --clustering kmeans, or a smaller "
            "--min_cluster_size"
        )
    if args.clustering == "hdbscan" and args.rounds > 1:  # rounds to come may find more
        capacity = num_given + int((images.given < 0).sum()) // args.min_cluster_size
    images.assign(labels, max(capacity, int(labels.max()) + 1))


def _agreed(args, images, embeddings, readable, num_clusters):
    """Labels of all photos, those that the first process finds.

    Raises:
        ValueError: see [`cluster_photos`]; on every process.
    """
    found = [None]
    if args.process_index == 0:
        plan = ClusterPlan(
            args.clustering, num_clusters, args.min_cluster_size, args.cluster_dims, args.cluster_keep, seed=args.seed
        )
        rows = np.flatnonzero(readable)
        groups = None if images.linked is None else images.linked[rows]
        labels = images.given.copy()
        try:
            labels[rows] = cluster_photos(embeddings[rows], plan, groups, images.given[rows], len(images.given_names))
            found = [labels]
        except MixedGroupError as error:
            found = [_mixed(error, images, rows)]
        except ValueError as error:
            found = [str(error)]
    (result,) = broadcast_object_list(found)
    if isinstance(result, str):
        raise ValueError(result)
    return result


def restore_clusters(images, folder):
    """Set the labels that a checkpoint has.

    Args:
        images: A `ClusteredImages`.
        folder: Of the checkpoint, which has been checked.

    Returns:
        Round and reports.

    Raises:
        CheckpointError: it has none, or those of other photos.
    """
    if not (Path(folder) / f"{CLUSTERS_NAME}.json").is_file():
        raise CheckpointError(f"{folder} is of a run with labels: it has no {CLUSTERS_NAME}.json")
    saved = load_tree(folder, CLUSTERS_NAME)
    try:
        images.assign(saved["labels"], saved["capacity"])
    except ValueError as error:
        raise CheckpointError(f"{folder} has clusters of other photos: {error}") from error
    images.linked = saved["linked"]
    return saved["round"], saved["reports"]


def round_report(number, epoch, labels, num_given, moved=None) -> dict:
    """What is told of a round: numbers of clusters, their sizes, photos that moved and that are left out."""
    sizes = np.bincount(labels[labels >= num_given])[num_given:]
    return {
        "round": number,
        "epoch": epoch,
        "given_classes": num_given,
        "clusters": len(sizes),
        "smallest": int(sizes.min(initial=len(labels))) if len(sizes) else 0,
        "median": float(np.median(sizes)) if len(sizes) else 0.0,
        "largest": int(sizes.max(initial=0)),
        "moved": moved,
        "left_out": int((labels < 0).sum()),
    }


def report_line(report) -> str:
    """A [`round_report`] as a line."""
    moved = "" if report["moved"] is None else f", {report['moved']:,} photos moved"
    given = f"{report['given_classes']:,} classes given, " if report["given_classes"] else ""
    return (
        f"{'round ' + str(report['round']):<18}{given}{report['clusters']:,} clusters of {report['smallest']:,} to "
        f"{report['largest']:,} photos (median {report['median']:g}){moved}, {report['left_out']:,} left out"
    )


class ClusterRounds(TrainerCallback):
    """Begins the rounds of a trainer whose photos lack labels, each at an epoch, and keeps account of them.

    Rounds begin at epochs `floor(E r / R)` of E, r = 0 ... R - 1. Rows of classes (proxies, their state, class
    prompts, what an optimiser knows of them) follow the clusters that share most photos.

    Args:
        trainer: A `VPTSPTrainer`, whose `train_dataset` is a `ClusteredImages` with the labels of the first round.

    Attributes:
        number: The present round, from 1.
        reports: [`round_report`] of each round so far.
        say: Called with a line on each round that begins, on the main process.

    Raises:
        ValueError: the arguments don't go together, or the loss keeps something of classes that can't follow them.
    """

    def __init__(self, trainer):
        self.trainer, self.images, self.say = trainer, trainer.train_dataset, logger.info
        check_cluster_arguments(trainer.args)
        criterion = trainer.model.criterion
        if trainer.args.rounds > 1 and criterion is not None and list(criterion.state_dict()):
            raise ValueError(
                f"rounds must be 1 with the loss {trainer.model.config.loss!r}, whose own weights can't follow "
                f"clusters, got {trainer.args.rounds}"
            )
        self.number = 1
        self.reports = [round_report(1, 0, self.images.labels, len(self.images.given_names))]
        self._set_active()

    def on_train_begin(self, args, state, control, **kwargs):
        if args.rounds > state.num_train_epochs:
            steps = f" (max_steps {args.max_steps})" if args.max_steps > 0 else ""
            raise ConfigError(f"rounds must be at most the {state.num_train_epochs} epochs{steps}, got {args.rounds}")

    def on_epoch_begin(self, args, state, control, **kwargs):
        epoch, count = int(state.epoch or 0), args.rounds
        due = sum(state.num_train_epochs * number // count <= epoch for number in range(count))
        if due > self.number:
            self._begin(due, epoch)

    def _begin(self, number, epoch):
        trainer, images = self.trainer, self.images
        before = images.labels
        num_given = len(images.given_names)
        random = random_state(trainer.args.device)  # as if nothing had been embedded
        embeddings, _, readable = trainer.embed(images.eval_view, f"Embedding for round {number}", True)
        set_random_state(random, trainer.args.device)
        num_clusters = self.reports[0]["clusters"]
        try:
            found = _agreed(trainer.args, images, embeddings.numpy(), readable.numpy(), num_clusters)
            labels, source, moved = follow_clusters(before, found, num_given)
            images.assign(labels)
            ClusterBatchSampler(images, **trainer.sampler_options())
        except ValueError as error:
            raise TrainingError(f"round {number} can't begin: {error}") from error
        move_class_rows(trainer.model, trainer.optimizer, source, seed=trainer.args.seed + 7919 * number)
        self._set_active()
        for callback in trainer.callback_handler.callbacks:
            if hasattr(callback, "on_classes_moved"):
                callback.on_classes_moved(source, trainer.model)
        self.number = number
        self.reports.append(round_report(number, epoch, labels, num_given, moved))
        if trainer.is_world_process_zero():
            self.say(report_line(self.reports[-1]))

    def _set_active(self):
        if hasattr(self.trainer.model, "proxies"):
            self.trainer.model.proxies.num_active = self.images.num_active

    def save(self, folder):
        """Write round, labels and reports into a checkpoint."""
        images = self.images
        saved = {"round": self.number, "labels": images.labels, "capacity": images.num_classes}
        save_tree(folder, CLUSTERS_NAME, {**saved, "linked": images.linked, "reports": self.reports})

    def load(self, folder):
        """Go on with those of a checkpoint.

        Raises:
            CheckpointError: see [`restore_clusters`].
        """
        self.number, self.reports = restore_clusters(self.images, folder)
        self._set_active()

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            write_json(Path(args.output_dir) / ROUNDS_NAME, self.reports)

    on_train_end = on_save


__all__ = [
    "CLUSTER_ARGUMENTS",
    "ClusterRounds",
    "check_cluster_arguments",
    "check_groups",
    "first_clusters",
    "refuse_cluster_arguments",
    "report_line",
    "restore_clusters",
    "round_report",
]
