"""What the image processors of well-known checkpoints say, as their authors publish it, is what is done."""

import json

import pytest
from transformers.image_utils import PILImageResampling

from vptsp.data_scripts.preprocessing import build_image_processor


IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
OPENAI = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
HALF = ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])
BILINEAR, BICUBIC, LANCZOS = PILImageResampling.BILINEAR, PILImageResampling.BICUBIC, PILImageResampling.LANCZOS
COMMON = {"do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255}


def square(side):
    return {"height": side, "width": side}


def saved(kind, normalisation, size, crop=None, resample=3, **others):
    values = {"image_processor_type": kind, "image_mean": normalisation[0], "image_std": normalisation[1], **COMMON}
    values |= {"size": size, "resample": resample, **others}
    return values | ({} if crop is None else {"do_center_crop": True, "crop_size": square(crop)})


# Name -> what is saved beside it; mean and std, side, short side in front of the crop, interpolation.
PROCESSORS = {
    "google/vit-base-patch16-224": (
        saved("ViTImageProcessor", HALF, square(224), resample=2),
        HALF,
        224,
        224,
        BILINEAR,
    ),
    "facebook/deit-base": (saved("DeiTImageProcessor", IMAGENET, square(256), 224), IMAGENET, 224, 256, BICUBIC),
    "facebook/vit-msn-small": (
        saved("ViTImageProcessor", IMAGENET, square(224), resample=2),
        IMAGENET,
        *(224, 224, BILINEAR),
    ),
    "facebook/ijepa": (saved("ViTImageProcessor", IMAGENET, square(224), resample=2), IMAGENET, 224, 224, BILINEAR),
    "facebook/dinov2": (
        saved("BitImageProcessor", IMAGENET, {"shortest_edge": 256}, 224),
        IMAGENET,
        *(224, 256, BICUBIC),
    ),
    "facebook/dinov3": (
        saved("DINOv3ViTImageProcessorFast", IMAGENET, square(224), resample=2),
        IMAGENET,
        *(224, 224, BILINEAR),
    ),
    "openai/clip-vit-large-patch14-336": (
        saved("CLIPImageProcessor", OPENAI, {"shortest_edge": 336}, 336),
        OPENAI,
        *(336, 336, BICUBIC),
    ),
    "openai/clip of earlier versions": (
        {
            **COMMON,
            **{"feature_extractor_type": "CLIPFeatureExtractor", "size": 224, "crop_size": 224, "resample": 3},
            **{"do_center_crop": True, "image_mean": OPENAI[0], "image_std": OPENAI[1]},
        },
        OPENAI,
        *(224, 224, BICUBIC),
    ),
    "DeepGlint-AI/mlcd": (
        saved("CLIPImageProcessor", OPENAI, {"shortest_edge": 336}, 336),
        OPENAI,
        *(336, 336, BICUBIC),
    ),
    "google/siglip-so400m-patch14-384": (
        saved("SiglipImageProcessor", HALF, square(384)),
        HALF,
        *(384, 384, BICUBIC),
    ),
    "google/siglip2-base-patch16-256": (
        saved("SiglipImageProcessor", HALF, square(256), resample=2),
        HALF,
        *(256, 256, BILINEAR),
    ),
    "google/siglip2-base-patch16-naflex": (
        {
            **{"image_processor_type": "Siglip2ImageProcessor", "image_mean": HALF[0], "image_std": HALF[1]},
            **{**COMMON, "resample": 2, "patch_size": 16, "max_num_patches": 256},
        },
        HALF,
        *(256, 256, BILINEAR),
    ),
    "one that reduces with Lanczos": (
        saved("BitImageProcessor", IMAGENET, {"shortest_edge": 250}, 200, resample=1),
        IMAGENET,
        *(200, 250, LANCZOS),
    ),
}


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_processors_of_families(tmp_path, name, file):
    values, (mean, std), side, short, resample = PROCESSORS[name]
    nested = file == "processor_config.json"  # as processors of images and texts are saved
    (tmp_path / file).write_text(json.dumps({"image_processor": values} if nested else values))
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    processor = build_image_processor(backbone=tmp_path)
    assert (list(processor.image_mean), list(processor.image_std)) == (mean, std)
    assert processor.rescale_factor == 1 / 255
    assert (processor.crop_size["height"], processor.crop_size["width"]) == (side, side)
    assert processor.size["shortest_edge"] == short
    assert processor.resample == resample
    larger = build_image_processor(2 * side, backbone=tmp_path)
    assert (larger.crop_size["height"], larger.size["shortest_edge"]) == (2 * side, 2 * short)
    as_evaluated = build_image_processor(224, 256, backbone=tmp_path)
    assert (as_evaluated.size["shortest_edge"], as_evaluated.resample) == (256, BILINEAR)
    assert (list(as_evaluated.image_mean), list(as_evaluated.image_std)) == (mean, std)


@pytest.mark.parametrize(
    "changes",
    [
        {"size": {"height": 224, "width": 112}},
        {"size": {"shortest_edge": 224}},
        {"size": {"shortest_edge": 224}, "do_center_crop": True, "crop_size": {"height": 224, "width": 112}},
        {"do_resize": False},
    ],
)
def test_a_processor_that_makes_no_squares_needs_sizes(tmp_path, changes):
    values = {**saved("ViTImageProcessor", HALF, square(224)), **changes}
    if "do_center_crop" in changes:
        values["image_processor_type"] = "BitImageProcessor"
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    for sizes in ({}, {"image_size": 224}, {"resize_size": 256}):
        with pytest.raises(ValueError, match=r"can't be used: it makes no squares of one size .* give both sizes"):
            build_image_processor(**sizes, backbone=tmp_path)
    assert build_image_processor(224, 256, backbone=tmp_path).crop_size["height"] == 224


def test_a_processor_for_torchvision_alone(tmp_path):
    """DINOv3's is read without it; where it does not say what its defaults are, it is refused."""
    (tmp_path / "config.json").write_text('{"model_type": "dinov3_vit"}')
    values = PROCESSORS["facebook/dinov3"][0]
    for field in ("image_mean", "image_std", "size", "resample", "do_rescale"):
        short = {key: value for key, value in values.items() if key != field}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(short))
        with pytest.raises(ValueError, match=rf"a DINOv3ViTImageProcessorFast, lacks {field}$"):
            build_image_processor(224, 256, backbone=tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**values, "do_rescale": False}))
    assert build_image_processor(224, 256, backbone=tmp_path).rescale_factor == 1
    other = {**values, "image_processor_type": "Sam2ImageProcessorFast"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"can't be used: (?s:.)*Sam2ImageProcessor requires the Torchvision library"):
        build_image_processor(224, 256, backbone=tmp_path)
