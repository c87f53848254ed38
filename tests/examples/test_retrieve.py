"""The example that retrieves, on a tiny retriever of random weights."""

import re

import numpy as np
import torch

from vptsp import Embedder, VPTSPModel, load_splits
from vptsp.data_scripts.preprocessing import build_image_processor
from vptsp.examples import retrieve


def test_it_draws_and_scores_what_was_saved(backbone_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    folder = tmp_path / "retriever"
    VPTSPModel.from_backbone(backbone_folder, embedding_dim=8).save_pretrained(folder)
    build_image_processor(16, 18).save_pretrained(folder)
    retrieve.main([str(folder), "--seed", "1"])
    assert (folder / "pictures" / "neighbours.png").stat().st_size > 10_000

    test = load_splits("digits", train_classes=list("3456"), test_classes=list("789"))["test"]
    assert len(list((folder / "images").rglob("*.*"))) == len(test)
    embedder, labels = Embedder.from_pretrained(folder, device="cpu"), np.array(test["label"])
    embeddings = embedder.embed_images([row["image"]["bytes"] for row in test]).double().numpy()
    similarity = embeddings @ embeddings.T
    np.fill_diagonal(similarity, -np.inf)
    recall = np.mean(labels[similarity.argmax(axis=1)] == labels)
    (printed,) = re.findall(r"recall_at_1 ([\d.]+)", capsys.readouterr().out)
    assert abs(float(printed) - 100 * recall) < 0.5  # ties may be broken otherwise
