"""Retrievers and backbones whose files are damaged, foreign or misshapen: one error that names the file."""

import json
import re
import shutil

import pytest
import torch
from fuzzing import bounded
from safetensors.torch import load_file, save_file

from vptsp import VPTSPConfig, VPTSPModel, build_image_processor, cli
from vptsp.search.embedder import Embedder


CONFIG, WEIGHTS, PROCESSOR = "config.json", "model.safetensors", "preprocessor_config.json"


def text(content):
    return lambda path: path.write_text(content, encoding="utf-8")


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def loop(path):
    path.unlink()
    path.symlink_to(path.name)


def cast(change):
    return lambda path: save_file({name: change(tensor) for name, tensor in load_file(path).items()}, path)


def reshape_one(path):
    weights = load_file(path)
    save_file({**weights, min(weights): torch.zeros(3, 3)}, path)


NOT_JSON = "config.json can't be read: it is not JSON"
DAMAGED = r"damaged.*header"
# File, what is done to it, what the command says of a retriever, and of a backbone (None: the same).
CASES = {
    "no config": (CONFIG, lambda path: path.unlink(), "holds no config.json", None),
    "config is a link to itself": (CONFIG, loop, "holds no config.json", None),
    "config empty": (CONFIG, text(""), NOT_JSON, None),
    "config cut": (CONFIG, cut, NOT_JSON, None),
    "config not UTF-8": (CONFIG, lambda path: path.write_bytes(b"\xff{}"), NOT_JSON, None),
    "config nested too deeply": (CONFIG, text("[" * 100_000), NOT_JSON, None),
    "config a list": (CONFIG, text("[]"), "config.json must hold the mapping .* got a list", None),
    "config null": (CONFIG, text("null"), "config.json must hold the mapping .* got a NoneType", None),
    "config a number": (CONFIG, text("3"), "config.json must hold the mapping .* got a int", None),
    "config without a kind": (CONFIG, text("{}"), "config.json must hold a model_type .* got None", None),
    "config of a list as kind": (
        CONFIG,
        text('{"model_type": []}'),
        r"config.json must have a text as model_type, got \[\]",
        None,
    ),
    "config of a text model": (CONFIG, text('{"model_type": "bert"}'), "must be one of vit, .* got 'bert'", None),
    "weights missing": (WEIGHTS, lambda path: path.unlink(), "holds no model.safetensors", None),
    "weights empty": (
        WEIGHTS,
        text(""),
        f"model.safetensors.*{DAMAGED}|{DAMAGED}",
        rf"{DAMAGED}|damaged: .*model.safetensors",
    ),
    "weights cut": (WEIGHTS, cut, "model.safetensors is damaged", "damaged: .*model.safetensors"),
    "weights of another model": (
        WEIGHTS,
        lambda path: save_file({"x": torch.zeros(2)}, path),
        "lacks backbone.* more and has unknown x",
        "lacks embeddings.cls_token.* and [0-9]+ more$",
    ),
    "weights of another shape": (WEIGHTS, reshape_one, r"has .* \(3, 3\) instead of", None),
    "weights in integers": (
        WEIGHTS,
        cast(torch.Tensor.int),
        "in torch.int32 instead of torch.float32",
        "embeddings.cls_token in I32",
    ),
    "weights in complex numbers": (
        WEIGHTS,
        cast(lambda tensor: tensor.to(torch.complex64)),
        "torch.complex64",
        "in C64",
    ),
    "weights in 8 bits": (
        WEIGHTS,
        cast(lambda tensor: tensor.to(torch.float8_e4m3fn)),
        "model.safetensors has .*float8_e4m3fn, expected one of float64",
        "in F8_E4M3",
    ),
    "weights not finite": (WEIGHTS, cast(lambda tensor: tensor / 0), "not finite .* in", None),
    "weights a pickle": (
        WEIGHTS,
        lambda path: torch.save({}, path),
        "model.safetensors is damaged",
        "damaged: .*model.safetensors",
    ),
    "processor empty": (PROCESSOR, text(""), "preprocessor_config.json is not JSON", None),
    "processor nested too deeply": (PROCESSOR, text("[" * 100_000), "preprocessor_config.json is not JSON", None),
    "processor a list": (PROCESSOR, text("[]"), "preprocessor_config.json must hold .* got a list", None),
    "processor without a kind": (
        PROCESSOR,
        text("{}"),
        "image processor of .* can't be used: Unrecognized",
        "does not say image_mean, image_std",
    ),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A retriever that holds its backbone, and a backbone, both with an image processor; and an image."""
    from conftest import tiny_vit_config
    from PIL import Image
    from transformers import ViTModel

    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    ViTModel(tiny_vit_config()).save_pretrained(root / "backbone")
    model = VPTSPModel.from_backbone(root / "backbone", num_prompts=2, embedding_dim=8)
    model.save_pretrained(root / "retriever", save_backbone=True)
    for name in ("retriever", "backbone"):
        build_image_processor(16, 18).save_pretrained(root / name)
    (root / "photos").mkdir()
    Image.new("RGB", (20, 20), (9, 99, 199)).save(root / "photos" / "a.png")
    return root


@pytest.mark.parametrize("kind", ["retriever", "backbone"])
@pytest.mark.parametrize("case", CASES)
def test_a_bad_file_of_a_model_is_named(kind, case, models, tmp_path, capsys):
    name, damage, for_retriever, for_backbone = CASES[case]
    folder = tmp_path / "model"
    shutil.copytree(models / kind, folder)
    damage(folder / name)
    words = ["embed", "--model", str(folder), "--images", str(models / "photos"), "--output", str(tmp_path / "store")]
    assert cli.main([*words, "--quiet"]) == 2
    *_, message = capsys.readouterr().err.strip().splitlines()
    assert message.startswith("error: ")
    assert len(message) < 1500
    assert str(folder) in message or case == "config of a text model"
    assert re.search(for_retriever if kind == "retriever" or for_backbone is None else for_backbone, message), message
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "must hold a JSON object"),
        ("null", "must hold a JSON object"),
        ("[" * 100_000, "must hold a JSON object"),
        ("{}", "is not there, or says nothing"),
        ('{"model_type": "bert"}', "must have model_type 'vptsp', got 'bert'"),
        ('{"model_type": {}}', "must have model_type 'vptsp', got {}"),
    ],
)
def test_a_foreign_configuration_is_named_in_python(content, message, models, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(models / "retriever", folder)
    (folder / CONFIG).write_text(content)
    for load in (VPTSPConfig.from_pretrained, VPTSPModel.from_pretrained):
        with pytest.raises((ValueError, OSError), match=f"config.json of '{folder}' {message}"):
            load(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"adapter_layers": 2, "adapter_dim": 1 << 36}, r"lacks .*adapter"),
        ({"lora_rank": 1 << 36}, "lora_rank must be <= the backbone's width 24, got 68719476736"),
        ({"num_prompts": 1 << 36}, r"prompts.* instead of \(274877906944"),
        ({"embedding_dim": 1 << 36}, r"head.* instead of \(68719476736"),
    ],
)
def test_a_configuration_that_asks_for_more_memory_than_there_is(fields, message, models, tmp_path):
    """It is compared with the file before anything is made for tensors that this lacks."""
    folder = tmp_path / "model"
    shutil.copytree(models / "retriever", folder)
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(values | fields))
    with bounded(), pytest.raises(ValueError, match=message):
        VPTSPModel.from_pretrained(folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_retriever_saved_in_another_dtype_can_be_used(dtype, models, tmp_path):
    VPTSPModel.from_pretrained(models / "retriever", dtype=dtype).save_pretrained(tmp_path, save_backbone=True)
    shutil.copy(models / "retriever" / PROCESSOR, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["dtype"] == str(dtype).removeprefix("torch.")
    embedder, original = Embedder.from_pretrained(tmp_path), Embedder.from_pretrained(models / "retriever")
    images = [models / "photos" / "a.png"]
    assert embedder.description()["fingerprint"] != original.fingerprint
    torch.testing.assert_close(embedder.embed_images(images), original.embed_images(images), atol=0.03, rtol=0)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([], "config.json of 'ann/model' is not to be had"),
        ([CONFIG], "the backbone 'ann/model' could not be loaded: .*holds no model.safetensors"),
        (
            [CONFIG, WEIGHTS],
            r"the image processor of 'ann/model' can't be read \(preprocessor_config.json of that repo",
        ),
    ],
)
def test_a_file_that_the_cache_of_the_hub_lacks_offline(files, expected, models, tmp_path, monkeypatch, capsys):
    commit = "a" * 40
    repository = tmp_path / "models--ann--model"
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for name in files:
        shutil.copy(models / "backbone" / name, repository / "snapshots" / commit / name)
    for module in ("huggingface_hub.constants", "huggingface_hub.file_download.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(tmp_path))
    words = ["embed", "--model", "ann/model", "--images", str(models / "photos"), "--output", str(tmp_path / "store")]
    assert cli.main([*words, "--quiet"]) == 2
    *_, message = capsys.readouterr().err.strip().splitlines()
    assert re.search(expected, message), message
