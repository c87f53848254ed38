"""The image processor that is saved beside a retriever: evaluation's geometry and the backbone's mean and std."""

from __future__ import annotations

from transformers import AutoImageProcessor
from transformers.image_utils import PILImageResampling
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil


# Of the "augreg" ViT checkpoints and of a ViT trained from scratch here.
DEFAULT_MEAN = DEFAULT_STD = (0.5, 0.5, 0.5)


def build_image_processor(image_size=224, resize_size=256, backbone=None, revision=None):
    """Processor that scales the short side to `resize_size` (bilinear) and cuts out a central square of `image_size`.

    Args:
        image_size: Side of what the model sees, in pixels.
        resize_size: Short side before the crop, in pixels.
        backbone: Hub name or folder whose preprocessor says mean and std; without one they are 0.5.
        revision: Of `backbone` on the Hub.

    Returns:
        A `ViTImageProcessorPil`, which needs no torchvision.
    """
    mean, std = DEFAULT_MEAN, DEFAULT_STD
    if backbone is not None:
        try:
            saved = AutoImageProcessor.from_pretrained(backbone, revision=revision or "main", backend="pil")
            mean, std = saved.image_mean, saved.image_std
        except OSError:  # a backbone saved without a preprocessor
            pass
    return ViTImageProcessorPil(
        do_convert_rgb=True,
        size={"shortest_edge": resize_size},
        do_center_crop=True,
        crop_size={"height": image_size, "width": image_size},
        resample=PILImageResampling.BILINEAR,
        image_mean=list(mean),
        image_std=list(std),
    )


__all__ = ["build_image_processor"]
