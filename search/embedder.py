"""Images to embeddings, by a retriever or by a bare backbone: whatever form the images have.

    embedder = Embedder.from_pretrained("runs/photos")
    embedder.embed_images(["a.jpg", Path("b.png").read_bytes(), Image.open("c.png")])  # (3, E), L2-normalised

Shapes: B images of a batch, S side of what the model sees, E embedding width.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedConfig

from ..data_scripts.data_errors import ImageError
from ..data_scripts.image_formats import MAX_IMAGE_PIXELS, check_pixel_limit
from ..data_scripts.images import check_pixels, open_image, upright_rgb
from ..data_scripts.normalisation import Normalisation
from ..data_scripts.preprocessing import build_image_processor, load_image_processor
from ..data_scripts.transforms import central_crop, is_elongated
from ..loading_vptsp import name_today
from ..modeling_vptsp import VPTSPModel, refuse_other_adapters


# Entries of a saved image processor that say how it is run, not what it computes.
_NOT_PREPROCESSING = ("image_processor_type", "processor_class", "return_tensors", "device", "backend")
# Fields of configurations that change embeddings without changing tensors.
_BACKBONE_FIELDS = ("model_type", "num_attention_heads", "hidden_act", "layer_norm_eps", "image_size", "patch_size")
_ROTARY_FIELDS = ("rope_theta", "rope_parameters")
_TUNING_FIELDS = (
    "prompt_mode",
    "adapter_mode",
    "adapter_norm",
    "adapter_scale",
    "lora_alpha",
    "tuning",
    "tuning_kwargs",
)


class ImagePreprocessor:
    """An image in any form to the `pixel_values` of a model; picklable, so that workers can do it.

    Args:
        processor: Image processor of transformers, as saved beside a model.
        image_size: Side S that the model takes.
        max_image_pixels: An image of more can't be read.
    """

    def __init__(self, processor, image_size, max_image_pixels=MAX_IMAGE_PIXELS):
        self.processor = processor
        self.image_size = image_size
        self.max_image_pixels = check_pixel_limit(max_image_pixels)

    def __call__(self, image, name=None):
        """Read, resize, crop and normalise one image.

        Args:
            image: Path, contents of a file (bytes), PIL image, uint8 tensor `(3, H, W)` of an RGB image, or
                floating-point tensor `(3, S, S)` that is preprocessed already.
            name: What to call it in errors.

        Returns:
            `(3, S, S)` float32.

        Raises:
            ImageError: the image can't be read; the message names it.
            TypeError, ValueError: not an image in one of these forms.
        """
        if isinstance(image, torch.Tensor) and image.is_floating_point():
            expected = (3, self.image_size, self.image_size)
            if tuple(image.shape) != expected:
                raise ValueError(f"a preprocessed image must have shape {expected}, got {tuple(image.shape)}")
            return image.float()
        image, options = self._shorten(read_image(image, name, self.max_image_pixels))
        # copied: a small tensor that keeps a view of numpy's memory can't be shared with the main process
        return torch.tensor(self.processor(images=image, return_tensors="np", **options)["pixel_values"][0])

    def _shorten(self, image):
        """An elongated image, cut as the processor would cut it once it had resized all of it; what is left to do."""
        processor = self.processor
        short = dict(processor.size).get("shortest_edge") if processor.do_resize and processor.do_center_crop else None
        if short is None or max(self.image_size, processor.crop_size["height"]) > short:
            return image, {}
        if not is_elongated(*image.size, short, processor.crop_size["height"]):
            return image, {}
        image = central_crop(image, short, processor.crop_size["height"], Image.Resampling(processor.resample))
        return image, {"do_resize": False, "do_center_crop": False}


def read_image(image, name=None, max_image_pixels=MAX_IMAGE_PIXELS):
    """RGB and upright PIL image of a path, the contents of a file, a PIL image or a uint8 tensor `(3, H, W)`.

    Raises:
        ImageError: it can't be read; the message names it.
        TypeError: none of these.
        ValueError: a tensor of another shape, or a PIL image of too many pixels.
    """
    if isinstance(image, (str, os.PathLike, bytes, bytearray, memoryview)):
        return open_image(image, name, max_image_pixels)
    if isinstance(image, Image.Image):
        return upright_rgb(check_pixels(image, max_image_pixels))
    if isinstance(image, torch.Tensor) and image.dtype == torch.uint8:
        if image.dim() != 3 or image.shape[0] != 3:
            raise ValueError(f"a uint8 image must have shape (3, height, width), got {tuple(image.shape)}")
        return Image.fromarray(np.ascontiguousarray(image.cpu().permute(1, 2, 0).numpy()))
    got = f"a tensor of {image.dtype}" if isinstance(image, torch.Tensor) else type(image).__name__
    raise TypeError(f"expected a path, bytes, a PIL image or a uint8 or floating-point tensor, got {got}")


class Embedder:
    """Images to L2-normalised embeddings; see [`Embedder.from_pretrained`].

    Args:
        model: `VPTSPModel`, in float32.
        processor: Image processor of transformers.
        name: What the model is called in stores and indexes: its folder or its name on the Hub.
        backbone_only: Embed with the model's backbone alone, without prompts or head.
        device: Where to compute; None for the accelerator of this process, or the CPU.
        dtype: To compute in.
        batch_size: Images at a time.
        max_image_pixels: An image of more can't be read.

    Attributes:
        embedding_dim: E.
    """

    def __init__(
        self,
        model,
        processor,
        name,
        *,
        backbone_only=False,
        device=None,
        dtype=torch.float32,
        batch_size=64,
        max_image_pixels=MAX_IMAGE_PIXELS,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {batch_size}")
        refuse_other_adapters(model)
        Normalisation.of(processor)  # says so now if it gives what no model takes
        config = model.config
        self.name = str(name)
        self.backbone_only = backbone_only
        self.batch_size = batch_size
        self.dtype = dtype
        self.device = torch.device(device) if device is not None else default_device()
        self.preprocess = ImagePreprocessor(processor, config.backbone_config.image_size, max_image_pixels)
        self.embedding_dim = config.pooled_dim if backbone_only else config.embedding_dim
        self._fingerprint = model_fingerprint(model, processor, backbone_only)
        self.model = model.to(device=self.device, dtype=dtype).eval()
        self._weights = self._fingerprint if dtype == torch.float32 else self._digest()

    @property
    def fingerprint(self):
        """Digest of the weights that take part and of the preprocessing; the same for every device and dtype.

        Whoever has embeddings of the same fingerprint can compare them.

        Raises:
            ValueError: the weights have changed since the embedder was made.
        """
        if self._digest() != self._weights:
            raise ValueError(f"the weights of {self.name} have changed since this Embedder was made: make another")
        return self._fingerprint

    def _digest(self):
        return model_fingerprint(self.model, self.preprocess.processor, self.backbone_only)

    @classmethod
    def from_pretrained(cls, name, *, revision=None, resize_size=None, **options):
        """A retriever of this project, or a bare backbone (the zero-shot line), whichever `name` holds.

        A retriever's images go through the image processor saved beside it. A backbone's are cut as `train.py` cuts
        them for its `frozen` line: short side to `resize_size`, central square of the backbone's size, mean and std of
        the backbone's own image processor (0.5 where there certainly is none, which a warning says); the embedding is
        the CLS token after the last norm.

        Args:
            name: Folder or Hub name.
            revision: Commit, tag or branch on the Hub.
            resize_size: Short side in pixels, of a backbone only; None for 256 / 224 of its image size.
            **options: `device`, `dtype`, `batch_size` and `max_image_pixels`, as for [`Embedder`].

        Raises:
            OSError: a file is not to be had.
            ValueError: neither a retriever nor a supported backbone, or `resize_size` with a retriever.
        """
        name = str(name)
        if is_retriever(name, revision):
            if resize_size is not None:
                raise ValueError(
                    f"resize_size is for bare backbones: the retriever {name} has its own image processor"
                )
            processor = load_image_processor(name, revision)
            if processor is None:
                raise OSError(f"the retriever {name} has no image processor (preprocessor_config.json)")
            return cls(VPTSPModel.from_pretrained(name, revision=revision), processor, name, **options)
        # No prompts, and a head of width 1 that nothing uses
        model = VPTSPModel.from_backbone(name, revision=revision, prompt_depth=0, embedding_dim=1)
        size = model.config.backbone_config.image_size
        commit = model.config.backbone_revision
        processor = build_image_processor(size, resize_size or round(size * 256 / 224), name, commit)
        return cls(model, processor, name, backbone_only=True, **options)

    @torch.inference_mode()
    def embed_pixels(self, pixel_values):
        """`(B, 3, S, S)` preprocessed images -> `(B, E)` float32 on the CPU, L2-normalised."""
        pixel_values = pixel_values.to(self.device, self.dtype, non_blocking=True)
        if self.backbone_only:
            return self.model.embed_with_backbone(pixel_values).float().cpu()
        return self.model(pixel_values).embeddings.float().cpu()

    def embed_images(self, images):
        """Embed some images.

        Args:
            images: Iterable of images in any form that [`ImagePreprocessor`] takes, mixed as you like.

        Returns:
            `(n, E)` float32 on the CPU, L2-normalised.

        Raises:
            ImageError: an image can't be read; the message names it.
            TypeError, ValueError: not an image, or there are none.
        """
        if isinstance(images, (str, bytes, os.PathLike, torch.Tensor, Image.Image)):
            images = [images]
        images = list(images)
        if not images:
            raise ValueError("expected at least one image, got none")
        batches = [images[i : i + self.batch_size] for i in range(0, len(images), self.batch_size)]
        return torch.cat([self.embed_pixels(torch.stack([self.preprocess(i) for i in batch])) for batch in batches])

    def description(self):
        """Who made embeddings, for the files that hold them: dict of name, kind, fingerprint and dtype."""
        return {
            "name": str(Path(self.name).resolve()) if Path(self.name).is_dir() else self.name,
            "kind": "backbone" if self.backbone_only else "retriever",
            "fingerprint": self.fingerprint,
            "dtype": str(self.dtype).removeprefix("torch."),
        }


def is_retriever(name, revision=None):
    """Whether a folder or Hub name holds a retriever of this project, and not a bare backbone.

    Raises:
        OSError: there is no configuration to be had.
    """
    return PreTrainedConfig.get_config_dict(name, revision=revision or "main")[0].get("model_type") == "vptsp"


def default_device():
    """This process's accelerator (of several, that of `LOCAL_RANK`), or the CPU."""
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    return torch.device(torch.accelerator.current_accelerator().type, int(os.environ.get("LOCAL_RANK", "0")))


def model_fingerprint(model, processor, backbone_only=False):
    """Digest of everything that an embedding depends on beside the image.

    All values of all weights that take part (prompts, head, backbone), the layout of the prompts, the pooling, and the
    preprocessing. Two seconds per gigabyte of weights at most.

    Args:
        model: `VPTSPModel` in float32.
        processor: Image processor of transformers.
        backbone_only: Whether prompts and head take no part.

    Returns:
        64 hexadecimal digits.
    """
    config = model.config
    preprocessing = {
        key: value
        for key, value in processor.to_dict().items()
        if not key.startswith("_") and key not in _NOT_PREPROCESSING and value is not None
    }
    # what changes the embeddings, but neither names nor values of tensors
    architecture = {name: getattr(config.backbone_config, name) for name in _BACKBONE_FIELDS}
    rotary = (name for name in _ROTARY_FIELDS if hasattr(config.backbone_config, name))
    architecture |= {name: getattr(config.backbone_config, name) for name in rotary}
    architecture |= {"pooling": config.pooling, "preprocessing": preprocessing}
    if not backbone_only:
        architecture["prompts"] = list(config.prompt_lengths)
        architecture |= {name: getattr(config, name) for name in _TUNING_FIELDS}
    digest = hashlib.blake2b(digest_size=32)
    digest.update(json.dumps(architecture, sort_keys=True, default=str).encode())
    model_type = config.backbone_config.model_type  # whose tensors transformers has renamed
    state_dict = {
        name_today(name, model_type): tensor
        for name, tensor in (model.backbone if backbone_only else model).state_dict().items()
    }
    for name in sorted(state_dict):
        tensor = state_dict[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


__all__ = [
    "Embedder",
    "ImageError",
    "ImagePreprocessor",
    "default_device",
    "is_retriever",
    "model_fingerprint",
    "read_image",
]
