"""The image processor that is saved beside a retriever: evaluation's geometry and the backbone's mean and std."""

from __future__ import annotations

import logging
import math
import os
import textwrap
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from transformers import AutoImageProcessor
from transformers.image_utils import PILImageResampling
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from ..files.json_files import JsonError, read_json_object
from ..loading_vptsp import check_hub_arguments, read_timm_config, timm_preprocessing
from .normalisation import Normalisation
from .transforms import EvalTransform


# Where transformers keeps image processors.
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
# Kinds that transformers has for torchvision alone, and that do what ViT's does: DINOv3's, under its earlier name too.
_LIKE_VIT = ("DINOv3ViTImageProcessor", "DINOv3ViTImageProcessorFast")
# Fields in which their defaults are others.
_NEEDED_OF_THEM = ("do_normalize", "do_rescale", "do_resize", "image_mean", "image_std", "resample", "size")

_MAX_SIDE = 1 << 15  # in pixels, beyond any model's

logger = logging.getLogger(__name__)


class _Preprocessing(NamedTuple):
    """How a backbone wants its images; the defaults stand where its checkpoint does not say."""

    normalisation: Normalisation
    image_size: int = 224
    crop_share: float = 224 / 256
    resample: PILImageResampling = PILImageResampling.BILINEAR


def build_image_processor(image_size=None, resize_size=None, backbone=None, revision=None, **hub_kwargs):
    """Processor that scales the short side to `resize_size` and cuts out a central square of `image_size`.

    Args:
        image_size: Side of what the model sees, in pixels. None: that of the backbone's checkpoint, else 224.
        resize_size: Short side before the crop, in pixels, to which images are resized bilinearly, as the method
            evaluates. None: the backbone's own crop and interpolation, else `image_size * 256 / 224`, bilinear. (Where
            its processor makes any image a square, there is no crop: here the short side becomes `image_size`.)
        backbone: Hub name or folder; pixels are treated (mean, std, scale) as its timm `pretrained_cfg` says, or as by
            the image processor that is saved beside it. Without a backbone, or where one certainly has no processor
            (which a warning says), mean and std are 0.5.
        revision: Of `backbone` on the Hub.
        **hub_kwargs: `cache_dir`, `token`, `local_files_only` and the like.

    Returns:
        A `ViTImageProcessorPil`, which needs no torchvision.

    Raises:
        OSError: the backbone's image processor can't be read, or nobody can say whether there is one.
        ValueError: the backbone does not say how it wants its images, or wants what is not done here.
    """
    check_hub_arguments(hub_kwargs)
    own = _Preprocessing(Normalisation())
    if backbone is not None:
        own = _preprocessing_of(backbone, revision, hub_kwargs, with_geometry=None in (image_size, resize_size))
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
        rescale_factor=own.normalisation.scale,
        image_mean=list(own.normalisation.mean),
        image_std=list(own.normalisation.std),
    )


def load_image_processor(name, revision=None, **hub_kwargs):
    """The image processor that is saved beside a model. Custom code is never run.

    Args:
        name: Hub name or local folder.
        revision: Commit, tag or branch on the Hub.
        **hub_kwargs: `cache_dir`, `token`, `local_files_only` and the like.

    Returns:
        The processor, by PIL; None where there certainly is none.

    Raises:
        OSError: it can't be read, or nobody can say whether there is one.
        ValueError: it is damaged, of an unknown kind, has code of its own, needs a package that is not installed, or
            does not say the mean, std and size that it takes.
    """
    return _load_processor(name, revision, hub_kwargs, ("image_mean", "image_std", "size"))


# What an image processor does with a value; where it does not, none is missed.
_USED_BY = {"image_mean": "do_normalize", "image_std": "do_normalize", "size": "do_resize"}


def _load_processor(name, revision, hub_kwargs, needed):
    """As [`load_image_processor`]; of `_USED_BY`, only what is needed has to be in the file: its class has defaults
    for everything, which are somebody else's."""
    check_hub_arguments(hub_kwargs)
    revision = revision or "main"
    try:
        _check_file(name, revision, hub_kwargs)
        processor = AutoImageProcessor.from_pretrained(
            name, revision=revision, backend="pil", trust_remote_code=False, **hub_kwargs
        )
        said, _ = type(processor).get_image_processor_dict(name, revision=revision, **hub_kwargs)
        missing = [key for key in needed if said.get(key) is None and getattr(processor, _USED_BY[key], True)]
        if missing and not (missing == ["size"] and said.get("max_num_patches")):  # NaFlex: as many for any shape
            raise ValueError(f"its file does not say {', '.join(missing)}")
        _check_sizes(processor)
        return processor
    except ImportError as error:
        return _without_torchvision(name, revision, hub_kwargs, error)
    except JsonError as error:
        raise OSError(f"the image processor of {str(name)!r} can't be read: {error}") from error
    except OSError as error:
        if all(_is_absent(name, file, revision, hub_kwargs) for file in PROCESSOR_FILES):
            return None
        file = "" if Path(name).is_dir() else f" ({PROCESSOR_FILES[0]} of that repository is not to be had)"
        reason = " ".join(str(error).split())
        raise OSError(f"the image processor of {str(name)!r} can't be read{file}: {reason}") from error
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        reason = textwrap.shorten(str(error), 400)  # transformers lists all kinds that it knows
        raise ValueError(f"the image processor of {str(name)!r} can't be used: {reason}") from error


def _check_file(name, revision, hub_kwargs):
    """Raise a `ValueError` if what transformers will read is no JSON object, of which it says nothing that helps."""
    subfolder = hub_kwargs.get("subfolder") or ""
    for file in PROCESSOR_FILES:
        path = Path(name, subfolder, file)
        if not Path(name).is_dir():
            path = try_to_load_from_cache(
                str(name), (PurePosixPath(subfolder) / file).as_posix(), hub_kwargs.get("cache_dir"), revision
            )
        if isinstance(path, (str, Path)) and Path(path).is_file():
            read_json_object(path, "the fields of an image processor")


def _without_torchvision(name, revision, hub_kwargs, error):
    """A processor of `_LIKE_VIT`, by PIL: but for rounding, the same."""
    values, _ = ViTImageProcessorPil.get_image_processor_dict(name, revision=revision, **hub_kwargs)
    if (kind := values.get("image_processor_type")) not in _LIKE_VIT:
        raise ValueError(f"the image processor of {str(name)!r} can't be used: {error}") from error
    if missing := [field for field in _NEEDED_OF_THEM if field not in values]:
        raise ValueError(f"the image processor of {str(name)!r}, a {kind}, lacks {', '.join(missing)}") from error
    processor = ViTImageProcessorPil.from_dict(values)
    try:
        _check_sizes(processor)
    except ValueError as bad:
        raise ValueError(f"the image processor of {str(name)!r} can't be used: {bad}") from bad
    return processor


def _check_sizes(processor):
    """Raise a `ValueError` for sizes that no image has, where they are used."""
    for field, used_by in (("size", "do_resize"), ("crop_size", "do_center_crop")):
        size = getattr(processor, field, None) or {}
        sides = {name: size.get(name) for name in ("shortest_edge", "longest_edge", "height", "width")}
        for name, side in sides.items():
            if side is None or not getattr(processor, used_by, True):
                continue
            if not isinstance(side, int) or isinstance(side, bool) or side < 1:
                raise ValueError(f"{field}.{name} must be an integer >= 1, got {side!r}")
            if side > _MAX_SIDE:
                raise ValueError(f"{field}.{name} must be at most {_MAX_SIDE}, got {side}")
    if getattr(processor, "do_center_crop", False):
        crop = getattr(processor, "crop_size", None) or {}
        if crop.get("height") is None or crop.get("width") is None:
            raise ValueError(f"crop_size must have height and width with do_center_crop, got {dict(crop)}")


def _is_absent(name, file, revision, hub_kwargs) -> bool:
    """Whether it is certain that a folder or repository lacks a file; being offline is no answer."""
    hub_kwargs = {**hub_kwargs}
    file = (PurePosixPath(hub_kwargs.pop("subfolder", None) or "") / file).as_posix()
    if Path(name).is_dir():
        return not os.path.lexists(Path(name, file))  # a link that leads nowhere is no answer
    try:
        hf_hub_download(name, file, revision=revision, **hub_kwargs)
    except LocalEntryNotFoundError:
        cached = try_to_load_from_cache(name, file, cache_dir=hub_kwargs.get("cache_dir"), revision=revision)
        return not isinstance(cached, (str, type(None)))  # an earlier look found that there is none
    except EntryNotFoundError:
        return True
    except (OSError, ValueError):
        return False
    return False


def normalisation_for(processor, config, **hub_kwargs) -> Normalisation:
    """What is done to the pixels of a model's images.

    Args:
        processor: Its image processor; None for what its backbone wants.
        config: Its `VPTSPConfig`, which names the backbone.
        **hub_kwargs: `cache_dir`, `token`, `local_files_only` and the like.

    Raises:
        OSError: the backbone's image processor can't be read, or nobody can say whether there is one.
        ValueError: the processor does what is not done here.
    """
    check_hub_arguments(hub_kwargs)
    if processor is not None:
        return Normalisation.of(processor)
    if config.backbone is not None:
        return _preprocessing_of(config.backbone, config.backbone_revision, hub_kwargs).normalisation
    logger.warning("there is neither an image processor nor the name of a backbone: mean and std of images are 0.5")
    return Normalisation()


def check_geometry(processor, transform):
    """Refuse an image processor that cuts images in another way than they are evaluated.

    Args:
        processor: Image processor of transformers that is to be saved.
        transform: What evaluation does; anything but an [`EvalTransform`] can't be compared and passes.

    Raises:
        ValueError: sizes, order of steps or interpolation differ.
    """
    if not isinstance(transform, EvalTransform):
        return
    size, crop = (getattr(processor, name, None) or {} for name in ("size", "crop_size"))
    resized = size.get("shortest_edge") if getattr(processor, "do_resize", False) else None
    cropped = (crop.get("height"), crop.get("width")) if getattr(processor, "do_center_crop", False) else None
    resample = PILImageResampling(getattr(processor, "resample", PILImageResampling.BILINEAR)).name.lower()
    if (resized, cropped, resample) != (transform.resize, (transform.size, transform.size), "bilinear"):
        raise ValueError(
            f"the image processor cuts images in another way than {transform}, by which they are evaluated: short "
            f"side {resized}, centre {cropped}, {resample}; build_image_processor makes one that fits"
        )


def geometry_of(processor, image_size):
    """How an image processor cuts images: side of what the model sees, and short side before the crop.

    Args:
        processor: Image processor of transformers; None, or one of other steps, for those of evaluation.
        image_size: The model's, where the processor does not say it; None where nobody knows.
    """
    size, crop = (getattr(processor, name, None) or {} for name in ("size", "crop_size"))
    image_size = crop.get("height") or size.get("height") or image_size
    return image_size, size.get("shortest_edge") or (image_size and round(image_size * 256 / 224))


def _preprocessing_of(backbone, revision, hub_kwargs, with_geometry=False):
    timm_config = read_timm_config(backbone, revision, **hub_kwargs)
    if timm_config is not None:
        own = timm_preprocessing(timm_config, backbone)
        resample = PILImageResampling[own.interpolation.upper()]
        return _Preprocessing(Normalisation(own.mean, own.std), own.image_size, own.crop_share, resample)
    needed = ("image_mean", "image_std", *(["size"] if with_geometry else []))
    saved = _load_processor(backbone, revision, hub_kwargs, needed)
    if saved is None:
        logger.warning(f"the backbone {str(backbone)!r} has no image processor: mean and std of images are 0.5")
        return _Preprocessing(Normalisation())
    try:
        return _Preprocessing(Normalisation.of(saved), *(_geometry(saved) if with_geometry else ()))
    except ValueError as error:
        raise ValueError(f"the image processor of {str(backbone)!r} can't be used: {error}") from error


def _geometry(processor):
    """Side of what the model sees, share of the short side that it is of, and interpolation, as a processor has them.

    Raises:
        ValueError: it makes no squares of one size.
    """
    resample = PILImageResampling(getattr(processor, "resample", None) or PILImageResampling.BILINEAR)
    size, crop = (getattr(processor, name, None) or {} for name in ("size", "crop_size"))
    resized = {size.get(name) for name in ("shortest_edge", "height", "width")} - {None}
    if (patches := getattr(processor, "max_num_patches", None)) and not resized:  # NaFlex: as many for a square
        return processor.patch_size * math.isqrt(patches), 1.0, resample
    if getattr(processor, "do_center_crop", False):
        cropped = {crop.get("height"), crop.get("width")}
    else:
        cropped = set() if size.get("shortest_edge") else resized
    if not getattr(processor, "do_resize", False) or len(resized) != 1 or len(cropped) != 1 or None in cropped:
        raise ValueError(f"it makes no squares of one size (size {size}, crop_size {crop}): give both sizes yourself")
    (side,), (short,) = cropped, resized
    return side, side / short, resample


__all__ = ["build_image_processor", "check_geometry", "geometry_of", "load_image_processor", "normalisation_for"]
