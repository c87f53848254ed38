"""The image processor that is saved beside a retriever: evaluation's geometry and the backbone's mean and std."""

from __future__ import annotations

import math
from typing import NamedTuple

from transformers import AutoImageProcessor
from transformers.image_utils import PILImageResampling
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from .open_backbone_vptsp import read_timm_config
from .timm_checkpoints_vptsp import timm_preprocessing


# Of the "augreg" ViT checkpoints and of a ViT trained from scratch here.
DEFAULT_MEAN = DEFAULT_STD = (0.5, 0.5, 0.5)


class _Preprocessing(NamedTuple):
    """How a backbone wants its images; the defaults stand where its checkpoint does not say."""

    mean: tuple[float, ...] = DEFAULT_MEAN
    std: tuple[float, ...] = DEFAULT_STD
    image_size: int = 224
    crop_share: float = 224 / 256
    resample: PILImageResampling = PILImageResampling.BILINEAR


def build_image_processor(image_size=None, resize_size=None, backbone=None, revision=None):
    """Processor that scales the short side to `resize_size` and cuts out a central square of `image_size`.

    Args:
        image_size: Side of what the model sees, in pixels. None: that of a timm checkpoint, else 224.
        resize_size: Short side before the crop, in pixels, to which images are resized bilinearly, as the method
            evaluates. None: a timm checkpoint's own crop and interpolation, else `image_size * 256 / 224`, bilinear.
        backbone: Hub name or folder; mean and std are those of its timm `pretrained_cfg`, or of the preprocessor that
            is saved beside it. Without any they are 0.5.
        revision: Of `backbone` on the Hub.

    Returns:
        A `ViTImageProcessorPil`, which needs no torchvision.

    Raises:
        ValueError: a timm checkpoint does not say how it wants its images.
    """
    own = _Preprocessing() if backbone is None else _preprocessing_of(backbone, revision)
    image_size = own.image_size if image_size is None else image_size
    resample = PILImageResampling.BILINEAR
    if resize_size is None:
        resize_size, resample = math.floor(image_size / own.crop_share), own.resample
    return ViTImageProcessorPil(
        do_convert_rgb=True,
        size={"shortest_edge": resize_size},
        do_center_crop=True,
        crop_size={"height": image_size, "width": image_size},
        resample=resample,
        image_mean=list(own.mean),
        image_std=list(own.std),
    )


def _preprocessing_of(backbone, revision):
    try:
        timm_config = read_timm_config(backbone, revision)
        if timm_config is None:
            saved = AutoImageProcessor.from_pretrained(backbone, revision=revision or "main", backend="pil")
            return _Preprocessing(saved.image_mean, saved.image_std)
    except OSError:  # a backbone saved without a preprocessor
        return _Preprocessing()
    own = timm_preprocessing(timm_config, backbone)
    resample = PILImageResampling[own.interpolation.upper()]
    return _Preprocessing(own.mean, own.std, own.image_size, own.crop_share, resample)


__all__ = ["build_image_processor"]
