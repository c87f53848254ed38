"""What a run on photos without labels does besides: its first clusters, and scores that need no labels."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from torch.utils.data import Subset

from ..data_scripts.preprocessing import build_image_processor
from ..eval.without_labels import cluster_stability, view_agreement
from .arguments import VPTSPTrainingArguments
from .checkpoints import check_files, last_checkpoint
from .cluster_rounds import check_cluster_arguments, check_groups, first_clusters, restore_clusters
from .photo_clusters import ClusterPlan, cluster_photos
from .run_errors import ConfigError
from .trainer import VPTSPTrainer


FEW_STEPS = 100
"""With less, scores that are no better say nothing of the method."""
MOST_PHOTOS = 1000
"""Photos that scores without labels are taken of, at most, evenly spaced."""
# Of a run's arguments, those by which images are embedded.
_EMBEDDING_ARGUMENTS = (
    "output_dir",
    "per_device_eval_batch_size",
    "use_cpu",
    "bf16",
    "fp16",
    "seed",
    "disable_tqdm",
    "dataloader_num_workers",
    "dataloader_prefetch_factor",
    "dataloader_pin_memory",
    "ddp_backend",
)


def prepare_clusters(images, training_args, data_args, build):
    """Set the labels that photos begin with: a checkpoint's, or clusters of what the backbone alone makes of them.

    Args:
        images: A `ClusteredImages`.
        training_args, data_args: Of the run.
        build: Makes a training model of so many classes.

    Raises:
        ConfigError: photos can't be clustered so.
        CheckpointError: the checkpoint to go on from has no clusters, or those of other photos.
    """
    try:
        check_cluster_arguments(training_args)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    check_groups(images)
    resume = training_args.resume_from_checkpoint
    if resume:
        folder = last_checkpoint(training_args.output_dir) if resume is True else Path(resume)
        check_files(folder)
        restore_clusters(images, folder)
        return
    options = {name: getattr(training_args, name) for name in _EMBEDDING_ARGUMENTS}
    try:
        model = build(2)
        trainer = VPTSPTrainer(
            model=model,
            args=VPTSPTrainingArguments(**options, eval_strategy="no", save_strategy="no"),
            processing_class=build_image_processor(
                data_args.image_size,
                data_args.resize_size,
                model.config.backbone,
                model.config.backbone_revision,
                token=training_args.hub_token,
            ),
        )
    except (ValueError, OSError, ImportError) as error:
        raise ConfigError(str(error)) from error
    with trainer.backbone_alone():
        embeddings, _, readable = trainer.embed(images.eval_view, "Embedding to cluster", with_unreadable=True)
    first_clusters(images, embeddings.numpy(), readable.numpy(), training_args)


def scores_without_labels(trainer, prefix):
    """`{prefix}_view_agreement` and `{prefix}_cluster_stability` of a trainer's photos, in 0..1 and up to 1.

    The stability is that of k-means, with as many clusters as the first round has, under two seeds.
    """
    images, args = trainer.train_dataset, trainer.args
    rows = np.unique(np.linspace(0, len(images) - 1, min(len(images), MOST_PHOTOS)).astype(int))
    if images.skip_corrupt:  # in a view, another photo would take its place
        _, _, readable = trainer.embed(Subset(images.eval_view, rows.tolist()), "Embedding photos", True)
        rows = rows[readable.numpy()]
    views = [trainer.embed(images.augmented_view(rows, seed), "Embedding views")[0] for seed in (1, 2)]
    clusters = max(min(trainer.rounds.reports[0]["clusters"], len(rows) // 2), 2)
    seeds = (args.seed, args.seed + 1)
    plans = [ClusterPlan(num_clusters=clusters, dims=args.cluster_dims, seed=seed) for seed in seeds]
    found = [cluster_photos(views[0].numpy(), plan) for plan in plans]
    return {
        f"{prefix}_view_agreement": view_agreement(*views),
        f"{prefix}_cluster_stability": cluster_stability(*found),
    }


def scores_line(label, scores, prefix) -> str:
    """The scores of [`scores_without_labels`] as a line."""
    agreement, stability = (scores[f"{prefix}_{name}"] for name in ("view_agreement", "cluster_stability"))
    return f"{label:<18}two views agree {100 * agreement:.1f} %, clusters of two seeds {stability:.2f}"


def warn_if_no_gain(results, steps):
    """Say it where tuning seems not to have helped: by MAP@R on labelled images, else by agreement of views.

    After few steps it is only said that they are few.

    Args:
        results: Scores of the run, in 0..1.
        steps: Of training.
    """
    name = "map_at_r" if "final_map_at_r" in results else "view_agreement"
    before, after = results[f"frozen_{name}"], results[f"final_{name}"]
    if after > before:
        return
    shown = {"map_at_r": "MAP@R", "view_agreement": "agreement of views"}[name]
    scores = f"{shown} {100 * before:.1f} with the backbone alone, {100 * after:.1f} tuned"
    if steps < FEW_STEPS:
        text = f"whether tuning helps, so few steps ({steps}) can't tell: {scores}. Give more --num_train_epochs"
    else:
        text = f"tuning seems not to have helped: {scores}. Try other --clusters, or index with the backbone as it is"
    print(text, file=sys.stderr)


__all__ = ["prepare_clusters", "scores_line", "scores_without_labels", "warn_if_no_gain"]
