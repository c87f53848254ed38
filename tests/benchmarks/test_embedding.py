"""The benchmark of embedding: contenders that compute the same, over all families."""

import importlib
import sys
from argparse import Namespace
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from vptsp import backbones_vptsp


BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
with mock.patch("sys.path", [str(BENCHMARKS), *sys.path]):  # it imports its neighbours
    embedding = importlib.import_module("embedding")
TINY = {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 40}


def test_all_families_are_compared_once():
    compared = embedding.all_families()
    assert set(compared) == set(backbones_vptsp.FAMILIES) - {"mlcd"}  # mlcd_vision_model's second name


@pytest.mark.parametrize("family", embedding.all_families())
def test_frozen_contenders_give_the_same_embeddings(monkeypatch, family):
    monkeypatch.setattr(embedding, "SIZES", {"s": TINY})
    monkeypatch.setattr(backbones_vptsp.linear_products, "_library", "torch")  # contenders set it
    pixels, args = torch.randn(2, 3, 224, 224), Namespace(device="cpu", dtype="float32")
    with torch.inference_mode():
        contenders = embedding.make_family_contenders(family, 0, pixels, args)
        ours = contenders["ours"]()
        theirs = F.normalize(contenders["transformers"](), dim=-1)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
        torch.testing.assert_close(contenders["blas"](), theirs, rtol=0, atol=1e-5)
        prompted = embedding.make_family_contenders(family, 3, pixels, args)["ours"]()
    assert prompted.shape == (2, 384)
