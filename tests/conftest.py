"""Fixtures shared by all tests: a tiny random vision transformer, offline and seeded."""

import gc
import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch
from trainer_fixtures import eval_dataset, splits, train_dataset  # noqa: F401 (fixtures)
from transformers import ViTConfig, ViTModel

from vptsp import VPTSPModel, build_image_processor
from vptsp.backbones_vptsp import linear_products


# Tiny products are PyTorch's own, which would leave the others untested; and processes are compared to the bit.
linear_products.library = os.environ["VPTSP_LINEAR"] = linear_products.available[-1]


def pytest_collection_modifyitems(items):
    """Files with tests of several processes first: they last longest, and what comes last runs on one worker alone."""
    slow = {item.path for item in items if item.get_closest_marker("distributed")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish():
    """Every training run ends with a garbage collection, which need not look through all that is imported."""
    gc.freeze()


def tiny_vit_config(**overrides):
    values = {
        "hidden_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "intermediate_size": 40,
        "image_size": 16,
        "patch_size": 8,
        # so that differences between layers and tokens aren't lost in rounding
        "initializer_range": 0.3,
    }
    return ViTConfig(**{**values, **overrides})


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # tiny tensors, and tests run side by side


@pytest.fixture
def vit_config():
    return tiny_vit_config()


@pytest.fixture(scope="session")
def backbone_folder(tmp_path_factory):
    """A tiny pretrained-looking ViT on disk, as `ViTModel.save_pretrained` writes it."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("backbone")
    backbone = ViTModel(tiny_vit_config())
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    backbone.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def retriever_folder(backbone_folder, tmp_path_factory):
    """A retriever on that backbone, for images of 16 pixels, with embeddings of width 8 and its image processor."""
    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("retriever")
    VPTSPModel.from_backbone(backbone_folder, num_prompts=2, embedding_dim=8).save_pretrained(folder)
    build_image_processor(16, 18).save_pretrained(folder)
    return folder
