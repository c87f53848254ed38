"""Images to embeddings, by a retriever or by a bare backbone: whatever form the images have.

    embedder = Embedder.from_pretrained("runs/photos")
    embedder.embed_images(["a.jpg", Path("b.png").read_bytes(), Image.open("c.png")])  # (3, E), L2-normalised

Shapes: B images of a batch, S side of what the model sees, E embedding width.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..backbones_vptsp import fastest_dtype
from ..data_scripts.data_errors import ImageError
from ..data_scripts.image_formats import MAX_IMAGE_PIXELS, check_pixel_limit
from ..data_scripts.images import check_pixels, open_image, upright_rgb
from ..data_scripts.normalisation import Normalisation
from ..data_scripts.preprocessing import build_image_processor, load_image_processor
from ..data_scripts.transforms import central_crop, is_elongated
from ..eval.embedding_loop import embed_batches
from ..loading_vptsp import read_config
from ..modeling_vptsp import VPTSPModel, refuse_other_adapters
from ..names.field_values import AT_LEAST_ONE, NOT_NEGATIVE, check_value
from .fingerprints import model_fingerprint
from .model_names import check_model_name
from .views import VIEWS, average_views, check_views, corner_crops


_AN_IMAGE = "a path, bytes, a file object, a PIL image, a uint8 array, or a uint8 or floating-point tensor"


class ImagePreprocessor:
    """An image in any form to the `pixel_values` of a model; picklable, so that workers can do it.

    Args:
        processor: Image processor of transformers, as saved beside a model.
        image_size: Side S that the model takes.
        max_image_pixels: An image of more can't be read.
        views: Of `VIEWS`: those with several crops give all of them.
    """

    def __init__(self, processor, image_size, max_image_pixels=MAX_IMAGE_PIXELS, views="one"):
        self.processor = processor
        self.image_size = image_size
        self.num_crops, _ = VIEWS[check_views(views, processor)]
        self.max_image_pixels = check_pixel_limit(max_image_pixels)

    def __call__(self, image, name=None, channel_order="rgb"):
        """Read, resize, crop and normalise one image.

        Args:
            image: What [`read_image`] takes, or floating-point tensor `(3, S, S)` that is preprocessed already.
            name: What to call it in errors.
            channel_order: As for [`read_image`].

        Returns:
            `(3, S, S)` float32; of several crops `(crops, 3, S, S)`.

        Raises:
            ImageError: the image can't be read; the message names it.
            TypeError, ValueError: not an image in one of these forms; or preprocessed already, where several crops
                are to be cut.
        """
        if isinstance(image, torch.Tensor) and image.is_floating_point():
            if self.num_crops > 1:
                raise ValueError(
                    "a preprocessed image can't be cropped at other places: views must be 'one' or 'flip'"
                )
            expected = (3, self.image_size, self.image_size)
            if tuple(image.shape) != expected:
                raise ValueError(f"a preprocessed image must have shape {expected}, got {tuple(image.shape)}")
            return image.float()
        image = read_image(image, name, self.max_image_pixels, channel_order)
        elongated = self._is_elongated(image)
        centre = self._central(image, elongated)
        if self.num_crops == 1:
            return centre
        size = self.processor.crop_size["height"]
        return torch.stack([centre, *corner_crops(image, self._resized, size, elongated)])

    def _is_elongated(self, image):
        """Whether all of an image, resized, would be many times what the processor then cuts out."""
        processor = self.processor
        short = dict(processor.size).get("shortest_edge") if processor.do_resize and processor.do_center_crop else None
        if short is None or max(self.image_size, processor.crop_size["height"]) > short:
            return False
        return is_elongated(*image.size, short, processor.crop_size["height"])

    def _central(self, image, elongated):
        """`(3, S, S)`; an elongated image is cut as the processor would cut it once it had resized all of it."""
        if not elongated:
            return self._process(image)
        size, short = self.processor.crop_size["height"], self.processor.size["shortest_edge"]
        image = central_crop(image, short, size, Image.Resampling(self.processor.resample))
        return self._process(image, do_resize=False, do_center_crop=False)

    def _resized(self, image):
        return self._process(image, do_center_crop=False)

    def _process(self, image, **options):
        # copied: a small tensor that keeps a view of numpy's memory can't be shared with the main process
        return torch.tensor(self.processor(images=image, return_tensors="np", **options)["pixel_values"][0])


def read_image(image, name=None, max_image_pixels=MAX_IMAGE_PIXELS, channel_order="rgb"):
    """RGB and upright PIL image of an image in any form.

    Args:
        image: Path, contents of a file (bytes), file object (binary), PIL image, uint8 tensor `(3, H, W)`, or uint8
            array of numpy `(H, W, 3)`, `(H, W, 4)` (the alpha channel is dropped) or `(H, W)`.
        name: What to call it in errors.
        max_image_pixels: An image of more can't be read.
        channel_order: Of arrays with colours: `rgb`, or `bgr` as OpenCV reads them.

    Raises:
        ImageError: it can't be read; the message names it.
        TypeError: none of these, or of another dtype.
        ValueError: an array or tensor of another shape, or an image of too many pixels.
    """
    if channel_order not in ("rgb", "bgr"):
        raise ValueError(f"channel_order must be 'rgb' or 'bgr', got {channel_order!r}")
    if hasattr(image, "read") and not isinstance(image, (str, os.PathLike)):
        name, image = name or getattr(image, "name", None), image.read()
        if isinstance(image, str):
            raise TypeError(f"{name or 'a file object'} must be opened in binary mode, 'rb'")
    if isinstance(image, (str, os.PathLike, bytes, bytearray, memoryview)):
        return open_image(image, name, max_image_pixels)
    if isinstance(image, Image.Image):
        return upright_rgb(check_pixels(image, max_image_pixels))
    if isinstance(image, np.ndarray) and image.dtype == np.uint8:
        return check_pixels(_of_array(image, channel_order), max_image_pixels)
    if isinstance(image, torch.Tensor) and image.dtype == torch.uint8:
        if image.dim() != 3 or image.shape[0] != 3:
            raise ValueError(f"a uint8 image must have shape (3, height, width), got {tuple(image.shape)}")
        return check_pixels(_of_array(image.cpu().permute(1, 2, 0).numpy(), "rgb"), max_image_pixels)
    got = f"one of {image.dtype}" if isinstance(image, (torch.Tensor, np.ndarray)) else type(image).__name__
    raise TypeError(f"expected {_AN_IMAGE}, got {got}")


def _of_array(pixels, channel_order):
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))) or 0 in pixels.shape:
        raise ValueError(f"an image array must have shape (height, width, 1, 3 or 4) or 2-D, got {pixels.shape}")
    if pixels.ndim == 2:
        return Image.fromarray(np.ascontiguousarray(pixels)).convert("RGB")
    colours = pixels[:, :, :3] if channel_order == "rgb" else pixels[:, :, 2::-1]
    return Image.fromarray(np.ascontiguousarray(colours))


class Embedder:
    """Images to L2-normalised embeddings; see [`Embedder.from_pretrained`].

    Args:
        model: `VPTSPModel`, in the dtype that it was saved in.
        processor: Image processor of transformers.
        name: What the model is called in stores and indexes: its folder or its name on the Hub.
        backbone_only: Embed with the model's backbone alone, without prompts or head.
        device: Where to compute; None for the accelerator of this process, or the CPU.
        dtype: To compute in; `auto` is bfloat16 where the device is fast at it, else float32.
        batch_size: Images at a time.
        max_image_pixels: An image of more can't be read.
        views: Whose embeddings are averaged: `one` (the central square), `flip` (and its mirror image), `five_crops`
            (the centre and the corners), `ten_crops` (and their mirror images). Part of the fingerprint.

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
        views="one",
    ):
        check_value("batch_size", batch_size, int, AT_LEAST_ONE)
        refuse_other_adapters(model)
        Normalisation.of(processor)  # says so now if it gives what no model takes
        config = model.config
        self.name = str(name)
        self.backbone_only = backbone_only
        self.views = views
        self.batch_size = batch_size
        self.device = default_device() if device is None else _check_device(device)
        self.dtype = dtype = fastest_dtype(self.device) if dtype == "auto" else dtype
        self.preprocess = ImagePreprocessor(processor, config.backbone_config.image_size, max_image_pixels, views)
        self.embedding_dim = config.pooled_dim if backbone_only else config.embedding_dim
        _check_crop(processor, config.backbone_config.image_size)
        self._fingerprint = model_fingerprint(model, processor, backbone_only, views)
        stays = {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()} <= {dtype}
        self.model = model.to(device=self.device, dtype=dtype).eval()
        self._running = threading.Lock()
        self._weights = self._fingerprint if stays else self._digest()

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
        return model_fingerprint(self.model, self.preprocess.processor, self.backbone_only, self.views)

    @classmethod
    def from_pretrained(cls, name, *, revision=None, backbone=None, image_size=None, resize_size=None, **options):
        """A retriever of this project, or a bare backbone (the zero-shot line), whichever `name` holds.

        A retriever's images go through the image processor saved beside it. A backbone's are cut as `train.py` cuts
        them for its `frozen` line: short side to `resize_size`, central square of the backbone's size, mean and std of
        the backbone's own image processor (0.5 where there certainly is none, which a warning says); the embedding is
        the CLS token after the last norm.

        Args:
            name: Folder or Hub name.
            revision: Commit, tag or branch on the Hub.
            backbone: Where a retriever's backbone is, folder or Hub name, if it isn't where the retriever says; its
                weights must be the same.
            image_size: Side in pixels of what the model sees, of a backbone only; None for the checkpoint's.
            resize_size: Short side in pixels, of a backbone only; None for 256 / 224 of its image size.
            **options: `device`, `dtype`, `batch_size`, `max_image_pixels` and `views`, as for [`Embedder`].

        Raises:
            DataError: the name is that of a folder, which is not there.
            OSError: a file is not to be had.
            ValueError: neither a retriever nor a supported backbone; `image_size` or `resize_size` with a retriever;
                `backbone` with a bare backbone; or the device is not there.
        """
        if options.get("device") is not None:
            _check_device(options["device"])
        name = check_model_name(name)
        if backbone is not None:
            backbone = check_model_name(backbone, "backbone")
        if is_retriever(name, revision):
            for option, value in (("image_size", image_size), ("resize_size", resize_size)):
                if value is not None:
                    raise ValueError(
                        f"{option} is for bare backbones: the retriever {name} has its own image processor"
                    )
            processor = load_image_processor(name, revision)
            if processor is None:
                raise OSError(f"the retriever {name} has no image processor (preprocessor_config.json)")
            model = VPTSPModel.from_pretrained(name, revision=revision, backbone=backbone)
            return cls(model, processor, name, **options)
        if backbone is not None:
            raise ValueError(f"backbone is for retrievers: {name} is a backbone itself")
        # No prompts, and a head of width 1 that nothing uses
        model = VPTSPModel.from_backbone(
            name, revision=revision, image_size=image_size, prompt_depth=0, embedding_dim=1
        )
        size = model.config.backbone_config.image_size
        commit = model.config.backbone_revision
        processor = build_image_processor(size, resize_size or round(size * 256 / 224), name, commit)
        return cls(model, processor, name, backbone_only=True, **options)

    @torch.inference_mode()
    def embed_pixels(self, pixel_values):
        """`(B, 3, S, S)` preprocessed images -> `(B, E)` float32 on the CPU, L2-normalised. Threads take turns.

        Of several crops, `(B, crops, 3, S, S)`.
        """
        with self._running:
            return average_views(self._embed_view, pixel_values, self.views)

    def _embed_view(self, pixel_values):
        pixel_values = pixel_values.to(self.device, self.dtype, non_blocking=True)
        if self.backbone_only:
            return self.model.embed_with_backbone(pixel_values).float().cpu()
        return self.model(pixel_values).embeddings.float().cpu()

    def embed_images(
        self, images, *, batch_size=None, num_workers=0, progress=False, channel_order="rgb", failed=None
    ):
        """Embed some images.

        Args:
            images: An image, or an iterable of images, in any form that [`ImagePreprocessor`] takes, mixed as you
                like. An array or tensor of four dimensions is a list of images.
            batch_size: Images at a time; None for the embedder's.
            num_workers: Threads that decode the next images while the model runs; 0: none.
            progress: Show a progress bar.
            channel_order: Of arrays: `rgb`, or `bgr` as OpenCV reads them.
            failed: Dict that takes the number of each image that can't be read, and its error; such an image is left
                out. None: the first one is an error.

        Returns:
            `(n, E)` float32 on the CPU, L2-normalised, of those that could be read.

        Raises:
            ImageError: an image can't be read; the message names it.
            TypeError, ValueError: not an image, there are none, or an option is out of range.
        """
        images, batch_size = _as_images(images), self.batch_size if batch_size is None else batch_size
        check_value("batch_size", batch_size, int, AT_LEAST_ONE)
        check_value("num_workers", num_workers, int, NOT_NEGATIVE)
        if not images:
            raise ValueError("expected at least one image, got none")

        def read(image):
            try:
                return self.preprocess(image, channel_order=channel_order)
            except ImageError as error:
                if failed is None:
                    raise
                return error

        def batches(pixels):
            batch, begin = [], 0
            for row, found in enumerate(pixels, 1):
                if isinstance(found, ImageError):
                    failed[row - 1] = found
                else:
                    batch.append(found)
                if batch and (len(batch) == batch_size or row == len(images)):
                    yield row - begin, torch.stack(batch)
                    batch, begin = [], row

        with _ahead(read, images, num_workers, 2 * batch_size) as pixels:
            embedded = embed_batches(batches(pixels), self.embed_pixels, total=len(images), hidden=not progress)
            return torch.cat([torch.empty(0, self.embedding_dim), *(embeddings for _, embeddings in embedded)])

    def description(self):
        """Who made embeddings, for the files that hold them: dict of name, kind, fingerprint, dtype and views."""
        return {
            "name": str(Path(self.name).resolve()) if Path(self.name).is_dir() else self.name,
            "kind": "backbone" if self.backbone_only else "retriever",
            "fingerprint": self.fingerprint,
            "dtype": str(self.dtype).removeprefix("torch."),
            "views": self.views,
        }


def _as_images(images):
    """A list of images, of one image or an iterable."""
    if isinstance(images, (torch.Tensor, np.ndarray)):
        return list(images) if images.ndim == 4 else [images]
    if isinstance(images, (str, bytes, bytearray, memoryview, os.PathLike, Image.Image)) or hasattr(images, "read"):
        return [images]
    if isinstance(images, Mapping) or not isinstance(images, Iterable):
        raise TypeError(f"images must be {_AN_IMAGE}, or an iterable of such, got {type(images).__name__}")
    return list(images)


@contextmanager
def _ahead(compute, items, num_workers, depth):
    """What `compute` gives of each item, in order, as an iterator; computed by threads, so many items ahead."""
    if not num_workers:
        yield map(compute, items)
        return

    def results():
        waiting = deque()
        for item in items:
            waiting.append(threads.submit(compute, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    threads = ThreadPoolExecutor(num_workers)
    try:
        yield results()
    finally:
        threads.shutdown(cancel_futures=True)


def is_retriever(name, revision=None):
    """Whether a folder or Hub name holds a retriever of this project, and not a bare backbone.

    Raises:
        OSError: there is no configuration to be had.
        ValueError: it is damaged.
    """
    return read_config(name, revision)[1].get("model_type") == "vptsp"


def default_device():
    """This process's accelerator (of several, that of `LOCAL_RANK`), or the CPU."""
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    return torch.device(torch.accelerator.current_accelerator().type, int(os.environ.get("LOCAL_RANK", "0")))


def _check_crop(processor, image_size):
    """Raise a `ValueError` if an image processor cuts squares of another size than the model takes."""
    crop = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else None
    if crop is not None and (crop["height"], crop["width"]) != (image_size, image_size):
        raise ValueError(
            f"the image processor (preprocessor_config.json) makes images of {crop['height']} x {crop['width']} "
            f"pixels, but the model takes {image_size} x {image_size}"
        )


def _check_device(device):
    """The device of a name; a ValueError unless it is there."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be cpu or an accelerator such as cuda:1, got {device!r}") from error
    available = torch.accelerator.is_available()
    known = torch.accelerator.current_accelerator().type if available else "cpu"
    count = torch.accelerator.device_count() if available else 1
    if found.type != "cpu" and (found.type != known or (found.index or 0) >= count):
        there = f"{count} {known}" if available else "only the CPU"
        raise ValueError(f"there is no device {str(device)!r}: PyTorch {torch.__version__} sees {there}")
    return found


__all__ = [
    "Embedder",
    "ImageError",
    "ImagePreprocessor",
    "default_device",
    "is_retriever",
    "read_image",
]
