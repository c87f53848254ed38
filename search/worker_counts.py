"""How many workers decode images while a model runs. Nothing here imports torch."""

from __future__ import annotations

import os


FEW_IMAGES = 64
"""Fewer images are decoded where the model runs, unless somebody says otherwise: starting workers takes longer."""


def choose_workers(num_images):
    """How many workers decode a number of images: one less than the CPUs of this process (which has the model to
    run), or than its share of them under `torchrun`, 1 to 8; 0 for less than `FEW_IMAGES`."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cpus //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return 0 if num_images < FEW_IMAGES else min(max(cpus - 1, 1), 8)


__all__ = ["FEW_IMAGES", "choose_workers"]
