"""docs/extending.md: each of its files does what the page says, and all of them together make a run."""

import importlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import tiny_vit_config
from PIL import Image
from transformers import Aimv2VisionConfig, Aimv2VisionModel

from vptsp import (
    DATASETS,
    FAMILIES,
    LOSSES,
    METRICS,
    TUNINGS,
    DataError,
    VPTSPConfig,
    VPTSPForMetricLearning,
    VPTSPModel,
    backbones_vptsp,
    load_splits,
    modeling_vptsp,
    register_dataset,
    register_family,
    register_loss,
    register_metric,
    register_tuning,
)
from vptsp.data_scripts.dataset_registry import builder_class
from vptsp.eval.metric_registry import registered_metrics
from vptsp.losses.loss_registry import check_loss
from vptsp.names.registry import Registry


PAGE = (Path(__file__).resolve().parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", PAGE, re.DOTALL))
EXTENSIONS = ("normalized_softmax", "scale_and_shift", "aimv2", "swatches", "worst_class_recall")


# each with the name that the page registers, by what, and what it is the name of
REGISTERED = (
    (LOSSES, "normalized_softmax", register_loss, "loss"),
    (TUNINGS, "scale_and_shift", register_tuning, "tuning"),
    (FAMILIES, "aimv2_vision_model", register_family, "backbone family"),
    (DATASETS, "swatches", register_dataset, "data set"),
    (METRICS, "worst_class_recall", register_metric, "metric"),
)
REGISTRIES = tuple(row[0] for row in REGISTERED)


@pytest.fixture(autouse=True)
def page_files(tmp_path, monkeypatch):
    """The page's files, importable; the registries are as before afterwards."""
    for name, body in FILES.items():
        (tmp_path / name).write_text(body, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = [dict(registered) for registered in REGISTRIES]
    yield
    for registered, entries in zip(REGISTRIES, before, strict=True):
        registered.entries.clear()
        registered.entries.update(entries)
    for name in (*EXTENSIONS, "my_run"):
        sys.modules.pop(name, None)


@pytest.fixture
def swatch_folder(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "colours").mkdir()
    for name in ("amber", "blue", "cyan", "dun", "ecru", "fawn"):
        colour = rng.integers(40, 216, 3)
        for i in range(4):
            pixels = np.clip(colour + rng.normal(0, 20, (18, 18, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "colours" / f"{name}-{i}.png")
    return tmp_path / "colours"


def test_page_has_all_files():
    assert set(FILES) == {f"{name}.py" for name in EXTENSIONS} | {"my_run.py", "my_run.yaml", "multi_similarity.yaml"}


def test_loss():
    importlib.import_module("normalized_softmax")
    config = VPTSPConfig(
        backbone_config=tiny_vit_config(), num_classes=4, embedding_dim=6, loss="normalized_softmax", bitfit=False
    )
    model = VPTSPForMetricLearning(config)
    labels = torch.tensor([2, 2, 0, 0])
    output = model(torch.randn(4, 3, 16, 16), labels)
    expected = -sum(F.log_softmax(16 * row, dim=0)[c] for row, c in zip(output.similarity, labels, strict=True)) / 4
    torch.testing.assert_close(output.loss, expected)
    assert output.proxy_rows.shape == (2, 6)


def test_multi_similarity_from_the_page():
    pytest.importorskip("pytorch_metric_learning")
    check_loss(VPTSPConfig(**yaml.safe_load(FILES["multi_similarity.yaml"])))


def test_tuning_method(backbone_folder, tmp_path):
    importlib.import_module("scale_and_shift")
    fields = {"embedding_dim": 6, "num_prompts": 2}
    torch.manual_seed(0)
    plain = VPTSPModel.from_backbone(backbone_folder, **fields)
    torch.manual_seed(0)
    model = VPTSPModel.from_backbone(backbone_folder, tuning="scale_and_shift", **fields)
    model.load_state_dict(plain.state_dict(), strict=False)
    pixel_values = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(model(pixel_values).embeddings, plain(pixel_values).embeddings)

    added = [name for name in model.tuned_names() if name.startswith("scale_and_shift.")]
    assert len(added) == 2 * (2 * 4 + 1)  # two norms in each of four layers, and the last
    model(pixel_values).embeddings[0].sum().backward()
    model.eval()
    with torch.no_grad():
        model(pixel_values)  # keeps what it made of the prompts, until something below changes
        for part in model.scale_and_shift:
            assert part.scale.grad.abs().sum() > 0
            part.scale.uniform_(0.5, 2)
            part.shift.normal_()

    # folded into the norms, it is the plain model again
    norms = [module for module in plain.backbone.modules() if isinstance(module, torch.nn.LayerNorm)]
    with torch.no_grad():
        for norm, part in zip(norms, model.scale_and_shift, strict=True):
            norm.weight.mul_(part.scale)
            norm.bias.mul_(part.scale).add_(part.shift)
        torch.testing.assert_close(
            model(pixel_values).embeddings, plain(pixel_values).embeddings, rtol=1e-4, atol=1e-5
        )

    model.save_pretrained(tmp_path / "saved")
    loaded = VPTSPModel.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(loaded(pixel_values).embeddings, model(pixel_values).embeddings)
    TUNINGS.entries.clear()
    with pytest.raises(ValueError, match="got 'scale_and_shift': import the file that registers it first"):
        VPTSPModel.from_pretrained(tmp_path / "saved")


def test_keywords_of_a_tuning_method(backbone_folder):
    importlib.import_module("scale_and_shift")
    options = {"tuning": "scale_and_shift", "embedding_dim": 6}
    model = VPTSPModel.from_backbone(backbone_folder, tuning_kwargs={"norms": "last"}, **options)
    assert len(model.scale_and_shift) == 1
    with pytest.raises(ValueError, match=r"tuning 'scale_and_shift': .* unexpected keyword argument 'norm'"):
        VPTSPModel.from_backbone(backbone_folder, tuning_kwargs={"norm": "last"}, **options)


def save_aimv2(folder):
    sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 40}
    config = Aimv2VisionConfig(**sizes, image_size=16, patch_size=8, initializer_range=0.3)
    Aimv2VisionModel(config).save_pretrained(folder)
    return folder


def test_backbone_family(tmp_path):
    folder = save_aimv2(tmp_path / "aimv2")
    with pytest.raises(ValueError, match=r"backbone model type must be one of .* got 'aimv2_vision_model'"):
        VPTSPModel.from_backbone(folder, embedding_dim=6)
    importlib.import_module("aimv2")
    model = VPTSPModel.from_backbone(folder, embedding_dim=6, num_prompts=2).eval()
    whole = Aimv2VisionModel.from_pretrained(folder).eval()
    pixel_values = torch.randn(3, 3, 16, 16)
    expected = F.normalize(whole(pixel_values).pooler_output, dim=-1)
    torch.testing.assert_close(model.embed_with_backbone(pixel_values), expected, rtol=1e-4, atol=1e-5)

    with pytest.raises(ValueError, match=r"image_size must be 16, got 24: Aimv2VisionModel has no interpolate"):
        VPTSPModel.from_backbone(folder, embedding_dim=6, image_size=24)

    hidden = whole.embeddings(pixel_values)  # prompts in front, outputs dropped, layer by layer
    for layer, prompts in zip(whole.encoder.layers, model.prompts(), strict=True):
        hidden = layer(torch.cat([prompts.expand(3, -1, -1), hidden], dim=1))[:, len(prompts) :]
    expected = model.head(whole.head(whole.rms_norm(hidden)))
    torch.testing.assert_close(model(pixel_values).embeddings, expected, rtol=1e-4, atol=1e-5)


def test_data_set(swatch_folder, tmp_path):
    importlib.import_module("swatches")
    splits = load_splits("swatches", swatch_folder, tmp_path / "cache", class_split="alternate")
    assert splits["train"].features["label"].names == ["amber", "cyan", "ecru"]
    assert splits["test"].features["label"].names == ["blue", "dun", "fawn"]
    assert [Path(row["image"]["path"]).name for row in splits["train"].select([0, 3, 4])] == [
        "amber-0.png",
        "amber-3.png",
        "cyan-0.png",
    ]
    streams = load_splits("swatches", swatch_folder, class_split="alternate", streaming=True)
    assert list(streams["test"]) == list(splits["test"])
    (swatch_folder / "grey.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"expected files <class>-<number>\.png, got grey\.png"):
        load_splits("swatches", swatch_folder)
    with pytest.raises(DataError, match="has no option 'layout'"):
        load_splits("swatches", swatch_folder, layout="classes")


def test_metric():
    importlib.import_module("worst_class_recall")
    embeddings = F.normalize(torch.tensor([[1, 0.0], [1, 0.1], [0.9, 0.2], [0, 1.0]]), dim=-1)
    labels = torch.tensor([5, 5, 7, 7])  # the third finds the second, the fourth the third
    assert registered_metrics(embeddings, labels) == {"worst_class_recall": 0.5}
    found = registered_metrics(embeddings, labels, embeddings[:2], labels[:2])
    assert found == {"worst_class_recall": 0.0}


def test_all_are_registered_alike():
    before = [len(registered) for registered in REGISTRIES]
    for name in EXTENSIONS:
        importlib.import_module(name)
    assert [len(registered) for registered in REGISTRIES] == [count + 1 for count in before]
    for name in EXTENSIONS:  # a file that is run again takes its own place
        importlib.reload(sys.modules[name])
    assert [len(registered) for registered in REGISTRIES] == [count + 1 for count in before]
    for registered, name, _, kind in REGISTERED:
        assert type(registered) is Registry and registered.kind == kind
        assert registered.find(name) is registered[name]
        with pytest.raises(ValueError, match=rf"{kind} must be one of .*, got '{name}s'; did you mean '{name}'"):
            registered.find(f"{name}s")
    # the shipped code looks into the same dicts
    assert dict(TUNINGS) == modeling_vptsp.TUNINGS
    assert dict(FAMILIES) == backbones_vptsp.FAMILIES and "vit" in FAMILIES


def test_names_are_not_taken_twice():
    for name in EXTENSIONS:
        importlib.import_module(name)
    folder = builder_class("folder")
    for _, name, register, kind in REGISTERED:
        further = (name, "another") if register is register_dataset else (name,)
        with pytest.raises(ValueError, match=f"there is a {kind} '{name}' already"):
            register(*further)(folder)


def test_all_of_them_in_one_run(swatch_folder, tmp_path, monkeypatch):
    options = {
        "data_dir": swatch_folder,
        "data_cache_dir": tmp_path / "cache",
        "backbone": save_aimv2(tmp_path / "aimv2"),
        "image_size": 16,
        "embedding_dim": 6,
        "num_prompts": 2,
        "num_class_prompts": 1,
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "picture_queries": 0,
        "output_dir": tmp_path / "run",
        "disable_tqdm": "true",
    }
    argv = [
        "my_run.py",
        "my_run.yaml",
        *(text for k, v in options.items() for text in (f"--{k}", str(v))),
        "--use_cpu",
    ]
    monkeypatch.setattr(sys, "argv", argv)
    importlib.import_module("my_run")
    results = json.loads((tmp_path / "run" / "all_results.json").read_text())
    assert 0 <= results["final_worst_class_recall"] <= results["final_recall_at_1"]
    assert results["dataset"]["name"] == "swatches"
    loaded = VPTSPModel.from_pretrained(tmp_path / "run")
    assert loaded.config.tuning == "scale_and_shift"
    assert not torch.equal(loaded.scale_and_shift[0].scale, torch.ones(24))
