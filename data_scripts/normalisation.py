"""From the pixels of an image to what a model sees: the one way, in training, evaluation and pictures.

Embedding runs the saved image processor itself, which does the same.
"""

from __future__ import annotations

import numpy as np
import torch


__all__ = ["Normalisation"]

# Of image processors: other changes of the values, which are not done here.
_OTHER_CHANGES = ("do_flip_channel_order", "rescale_offset", "offset")


class Normalisation:
    """`(pixels * scale - mean) / std` per channel, as image processors of transformers do it, bit for bit for 1 / 255.

    The defaults are those of the "augreg" ViT checkpoints and of a ViT trained from scratch here.

    Args:
        mean: Of red, green and blue, after scaling; one number for all three, or three.
        std: Likewise, not 0.
        scale: Factor on the pixels, > 0.

    Attributes:
        mean: Three floats.
        std: Three floats.
        scale: Float.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, mean=0.5, std=0.5, scale=1 / 255):
        self.mean, self.std = _three("image_mean", mean), _three("image_std", std)
        if 0 in self.std:
            raise ValueError(f"image_std must not hold 0, got {self.std}")
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < float("inf"):
            raise ValueError(f"rescale_factor must be a number > 0, got {scale!r}")
        self.scale = float(scale)
        self._tensors = {}

    @classmethod
    def of(cls, processor):
        """What an image processor of transformers does, its `do_rescale` and `do_normalize` included.

        Raises:
            ValueError: it has no mean and std, changes pixels in yet another way, or gives unchanged integers.
        """
        name = type(processor).__name__
        changes = [change for change in _OTHER_CHANGES if getattr(processor, change, False)]
        if changes:
            raise ValueError(f"the image processor {name} has {changes[0]}, which training does not do")
        do_rescale, do_normalize = (getattr(processor, field, None) for field in ("do_rescale", "do_normalize"))
        if not (do_rescale or do_normalize):
            raise ValueError(
                f"the image processor {name} must rescale or normalise, got do_rescale {do_rescale!r} and "
                f"do_normalize {do_normalize!r}: the model takes no integers"
            )
        mean, std, scale = (getattr(processor, field, None) for field in ("image_mean", "image_std", "rescale_factor"))
        return cls(mean if do_normalize else 0, std if do_normalize else 1, scale if do_rescale else 1)

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """`(..., 3, H, W)` of 0..255, any dtype -> the same shape in float32, on the same device."""
        if pixels.device not in self._tensors:
            self._tensors[pixels.device] = [
                torch.tensor(values, dtype=torch.float32, device=pixels.device).view(3, 1, 1)
                for values in (self.mean, self.std)
            ]
        mean, std = self._tensors[pixels.device]
        return pixels.to(torch.float32, copy=True).div_(1 / self.scale).sub_(mean).div_(std)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(mean={self.mean}, std={self.std}, scale={self.scale:.6g})"


def _three(field, value) -> tuple[float, float, float]:
    try:
        numbers = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        numbers = np.empty(0)
    if numbers.shape not in ((), (3,)) or not np.isfinite(numbers).all():
        raise ValueError(f"{field} must be a number or three of them, got {value!r}")
    return tuple(np.broadcast_to(numbers, 3).tolist())
