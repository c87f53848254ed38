"""The image processor that is shipped: same pixels as evaluation during training, mean and std of the backbone."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from vptsp import EvalTransform
from vptsp.data_scripts.preprocessing import build_image_processor


@pytest.mark.parametrize("width, height", [(500, 300), (301, 333), (77, 100), (64, 64), (601, 1000)])
def test_same_pixels_as_evaluation(width, height, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    build_image_processor(image_size=56, resize_size=64).save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    shipped = processor(images=Image.fromarray(pixels), return_tensors="pt").pixel_values[0]
    evaluated = EvalTransform(resize=64, size=56)(Image.fromarray(pixels))
    torch.testing.assert_close(shipped, (evaluated / 255 - 0.5) / 0.5)


def test_mean_and_std_come_from_the_backbone(tmp_path):
    assert tuple(build_image_processor(backbone=tmp_path).image_mean) == (0.5, 0.5, 0.5)
    ViTImageProcessorPil(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(tmp_path)
    processor = build_image_processor(image_size=56, resize_size=64, backbone=tmp_path)
    assert tuple(processor.image_mean) == (0.1, 0.2, 0.3)
    assert tuple(processor.image_std) == (0.4, 0.5, 0.6)
    assert processor.crop_size["height"] == 56
    assert processor.size["shortest_edge"] == 64
