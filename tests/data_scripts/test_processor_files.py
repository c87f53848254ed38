"""Image processors on disk that don't say what they do, and look-ups whose arguments are slips."""

import json

import pytest
from conftest import tiny_vit_config
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from vptsp.data_scripts.normalisation import Normalisation
from vptsp.data_scripts.preprocessing import build_image_processor, load_image_processor, normalisation_for
from vptsp.loading_vptsp import find_backbone, open_backbone
from vptsp.modeling_vptsp import VPTSPModel


MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
KIND = {"image_processor_type": "ViTImageProcessorPil"}


def write_processor(folder, values):
    tiny_vit_config().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    "values, missing",
    [
        ({}, "image_mean, image_std"),
        (KIND, "image_mean, image_std"),
        ({**KIND, "image_mean": None, "image_std": STD}, "image_mean"),
        ({**KIND, "image_mean": MEAN, "size": 224}, "image_std"),
    ],
)
def test_mean_and_std_must_be_in_the_file(values, missing, tmp_path):
    write_processor(tmp_path, values)
    for load in (load_image_processor, lambda folder: build_image_processor(16, 18, folder)):
        with pytest.raises(ValueError, match=rf"{tmp_path}.* can't be used: its file does not say {missing}"):
            load(tmp_path)


def test_what_is_not_used_need_not_be_said(tmp_path):
    write_processor(tmp_path, {**KIND, "do_normalize": False, "do_resize": False})
    assert load_image_processor(tmp_path).do_normalize is False
    write_processor(tmp_path, {**KIND, "image_mean": MEAN, "image_std": STD})  # a backbone's sizes are not taken
    assert build_image_processor(16, 18, tmp_path).image_mean == tuple(MEAN)
    with pytest.raises(ValueError, match="its file does not say size"):
        load_image_processor(tmp_path)
    ViTImageProcessorPil(image_mean=MEAN, image_std=STD).save_pretrained(tmp_path)
    assert load_image_processor(tmp_path).image_mean == tuple(MEAN)


@pytest.mark.parametrize(
    "look_up",
    [
        lambda folder, **options: build_image_processor(16, 18, **options),
        lambda folder, **options: build_image_processor(16, 18, folder, **options),
        load_image_processor,
        lambda folder, **options: normalisation_for(Normalisation(), None, **options),
        find_backbone,
        lambda folder, **options: open_backbone(find_backbone(folder), **options),
    ],
)
def test_arguments_of_a_look_up_that_do_not_exist(look_up, backbone_folder):
    with pytest.raises(TypeError, match="there is no argument tokn of a look-up on the Hub; did you mean 'token'"):
        look_up(backbone_folder, tokn="hf_secret")


def test_arguments_of_saving_that_do_not_exist(backbone_folder, tmp_path):
    model = VPTSPModel.from_backbone(backbone_folder)
    with pytest.raises(TypeError, match="save_pretrained takes no save_backbonee"):
        model.save_pretrained(tmp_path / "new", save_backbonee=True)
    with pytest.raises(ValueError, match="leave variant out"):
        model.save_pretrained(tmp_path / "new", variant="fp16")
    assert not (tmp_path / "new").exists()
    model.save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="num_promptz"):
        VPTSPModel.from_pretrained(tmp_path, num_promptz=3)


@pytest.mark.parametrize("side", [-16, 0])
@pytest.mark.parametrize(
    "field, size",
    [("size", "shortest_edge"), ("size", "height"), ("crop_size", "height"), ("crop_size", "width")],
)
@pytest.mark.parametrize("kind", ["ViTImageProcessor", "DINOv3ViTImageProcessorFast"])
def test_sizes_that_no_image_has_are_refused(tmp_path, kind, field, size, side):
    square = {"height": 16, "width": 16}
    values = {"image_processor_type": kind, "image_mean": MEAN, "image_std": STD, "resample": 2, "size": square}
    values |= {
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "do_center_crop": True,
        "crop_size": square,
    }
    write_processor(tmp_path, values)
    load_image_processor(tmp_path)
    write_processor(tmp_path, values | {field: {size: side} if size == "shortest_edge" else {**square, size: side}})
    for load in (load_image_processor, lambda folder: build_image_processor(backbone=folder)):
        with pytest.raises(ValueError, match=rf"{tmp_path}.* {field}\.{size} must be an integer >= 1, got {side}"):
            load(tmp_path)
