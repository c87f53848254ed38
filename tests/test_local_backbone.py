"""modeling_vptsp.py: a retriever that names a backbone on this machine says so when it is saved."""

import os
import shutil
from pathlib import Path

import torch

from vptsp import VPTSPForMetricLearning, VPTSPModel


def test_a_retriever_that_cannot_be_moved_alone_says_so(backbone_folder, tmp_path, caplog):
    torch.manual_seed(2)
    model = VPTSPModel.from_backbone(backbone_folder, num_prompts=2, embedding_dim=8)
    model.save_pretrained(tmp_path / "named")
    assert f"{tmp_path / 'named'} names its backbone in the folder {backbone_folder}" in caplog.text
    assert "can't be moved to another machine" in caplog.text
    assert "save_backbone=True (--save_backbone true in training)" in caplog.text
    assert "backbone=... (--backbone)" in caplog.text


def test_nothing_is_said_where_nothing_is_missing(backbone_folder, tmp_path, caplog):
    model = VPTSPModel.from_backbone(backbone_folder, num_prompts=2, embedding_dim=8)
    model.save_pretrained(tmp_path / "whole", save_backbone=True)
    VPTSPModel.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "again")
    training = VPTSPForMetricLearning.from_backbone(backbone_folder, num_classes=3, num_prompts=2, embedding_dim=8)
    training.save_pretrained(tmp_path / "checkpoint")  # of which nobody takes the retriever elsewhere
    on_hub = VPTSPModel.from_backbone(backbone_folder, num_prompts=2, embedding_dim=8)
    on_hub.config.backbone = "owner/name"
    on_hub.save_pretrained(tmp_path / "hub")
    assert caplog.text == ""


def test_the_way_to_a_backbone_beside_it_is_shown_without_detours(backbone_folder, tmp_path):
    model = VPTSPModel.from_backbone(backbone_folder, num_prompts=2, embedding_dim=8)
    shutil.copytree(backbone_folder, tmp_path / "models" / "backbone")
    model.config.backbone = str(tmp_path / "models" / "backbone")
    model.save_pretrained(tmp_path / "runs" / "a" / "b")
    again = VPTSPModel.from_pretrained(tmp_path / "runs" / "a" / "b")
    assert again.config.backbone == str(tmp_path / "models" / "backbone")
    if os.name == "posix":  # through a link, ".." leads elsewhere
        (tmp_path / "far").mkdir()
        (tmp_path / "far" / "b").symlink_to(tmp_path / "runs" / "a" / "b")
        linked = VPTSPModel.from_pretrained(tmp_path / "far" / "b")
        assert Path(linked.config.backbone).samefile(tmp_path / "models" / "backbone")
