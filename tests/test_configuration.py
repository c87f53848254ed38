"""VPTSPConfig: derived values, validation, round trip."""

import json
import re

import pytest
import torch
import transformers
from conftest import tiny_vit_config
from project_files import ROOT
from remote_code import remote_config
from transformers import ViTConfig

from vptsp import VPTSPConfig
from vptsp.configuration_vptsp import LOWEST_TRANSFORMERS


def test_prompt_lengths_follow_number_depth_and_step():
    config = VPTSPConfig(
        backbone_config=tiny_vit_config(),
        num_prompts=5,
        prompt_step=2,
        num_class_prompts=4,
        class_prompt_depth=2,
        class_prompt_step=3,
    )
    assert config.prompt_lengths == (5, 3, 1, 0)
    assert config.class_prompt_lengths == (4, 1)


def test_depth_defaults_to_every_layer():
    config = VPTSPConfig(backbone_config=tiny_vit_config(num_hidden_layers=3))
    assert (config.prompt_depth, config.class_prompt_depth) == (3, 3)


def test_round_trip(tmp_path):
    config = VPTSPConfig(backbone_config=tiny_vit_config(), pooling="cls+mean", num_classes=9, rnn_dropout=0.1)
    config.save_pretrained(tmp_path)
    loaded = VPTSPConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert isinstance(loaded.backbone_config, ViTConfig)
    assert loaded.backbone_config.hidden_size == 24
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_vptsp.VPTSPConfig"
    }


def test_auto_config_with_remote_code(tmp_path):
    VPTSPConfig(backbone_config=tiny_vit_config(), num_prompts=7).save_pretrained(tmp_path)
    assert remote_config(tmp_path).num_prompts == 7


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("num_prompts", -3, "num_prompts must be an integer >= 0, got -3"),
        ("num_prompts", 2.5, "num_prompts must be an integer >= 0, got 2.5"),
        ("prompt_depth", 5, "prompt_depth must be None or an integer >= 0 and <= the backbone's 4 layers, got 5"),
        ("class_prompt_depth", -1, "class_prompt_depth must be .* got -1"),
        ("embedding_dim", 0, "embedding_dim must be an integer >= 1, got 0"),
        ("num_classes", 1, "num_classes must be None or an integer >= 2, got 1"),
        ("pooling", "max", r"pooling must be None or one of cls, mean, cls\+mean, head, got 'max'"),
        ("proxy_update", "lstm", "proxy_update must be one of gru_relu, gru, mean, none, got 'lstm'"),
        ("proxy_bias_ratio", 1.5, r"proxy_bias_ratio must be in \[0, 1\], got 1.5"),
        ("rnn_dropout", 1.0, r"rnn_dropout must be in \[0, 1\), got 1.0"),
        ("embedding_dropout", "much", "embedding_dropout must be .* got 'much'"),
        ("loss_alpha", 0, "loss_alpha must be > 0, got 0"),
        ("backbone_config", {"hidden_size": 4}, "backbone_config must hold a model_type .* got None"),
    ],
)
def test_bad_values_are_named(field, value, message):
    with pytest.raises(ValueError, match=message):
        VPTSPConfig(**{"backbone_config": tiny_vit_config(), field: value})


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("bitfit", "no", "bitfit must be true or false, got 'no'"),
        ("num_prompts", True, "num_prompts must be an integer >= 0, got True"),
        ("rnn_dropout", float("nan"), r"rnn_dropout must be in \[0, 1\), got nan"),
        ("loss_alpha", float("nan"), "loss_alpha must be > 0, got nan"),
        ("loss_delta", "much", "loss_delta must be a number, got 'much'"),
        ("loss_delta", float("inf"), "loss_delta must be a number, got inf"),
        ("lora_alpha", float("inf"), "lora_alpha must be > 0, got inf"),
        ("backbone", 3, "backbone must be None or a string, got 3"),
        ("loss", None, "loss must be the name of a loss, got None"),
        ("loss_kwargs", "{}", "loss_kwargs must be None or a mapping, got '{}'"),
        ("miner", "hard", "miner must be None or pml.<Name>, got 'hard'"),
        ("pooling", 1, r"pooling must be None or one of cls, mean, cls\+mean, head, got 1"),
    ],
)
def test_values_of_other_types_are_named(field, value, message):
    with pytest.raises(ValueError, match=message):
        VPTSPConfig(**{"backbone_config": tiny_vit_config(), field: value})


# ---- What is no field


def by_auto_config(folder, **options):
    return remote_config(folder, **options)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_promptz": 3}, "VPTSPConfig has no field 'num_promptz'; did you mean 'num_prompts'?"),
        ({"zzz": 3, "qqq": 1}, "VPTSPConfig has no field 'zzz', 'qqq'"),
        (
            {"backbone_config": {"model_type": "vit", "num_hidden_layer": 2}},
            "backbone_config (ViTConfig) has no field 'num_hidden_layer'; did you mean 'num_hidden_layers'?",
        ),
    ],
)
def test_unknown_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        VPTSPConfig(**fields)


def test_what_a_file_holds_beside_fields(tmp_path):
    """What transformers and the Hub put into it is read; what a newer version may have meant is not known."""
    config = VPTSPConfig(backbone_config=tiny_vit_config(own_field=3), num_prompts=7)
    assert VPTSPConfig(**config.to_dict()).to_dict() == config.to_dict()
    config.save_pretrained(tmp_path)
    change = {"_commit_hash": "ab", "custom_pipelines": {}, "torch_dtype": "float32", "quantization_config": {}}
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, **change}))
    loaded = VPTSPConfig.from_pretrained(tmp_path)
    assert (loaded.num_prompts, loaded.backbone_config.own_field) == (7, 3)
    (tmp_path / "config.json").write_text(json.dumps({**values, "gating": "soft"}))
    for load in (VPTSPConfig.from_pretrained, by_auto_config):
        with pytest.raises(ValueError, match=r"VPTSPConfig has no field 'gating'; was it saved by a newer vptsp\?"):
            load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**values, "gating": "soft", "format_version": 99}))
    with pytest.raises(ValueError, match="saved by a newer version of vptsp: format_version is 99"):
        VPTSPConfig.from_pretrained(tmp_path)


def test_keywords_of_loading_are_fields(tmp_path):
    VPTSPConfig(backbone_config=tiny_vit_config()).save_pretrained(tmp_path)
    assert VPTSPConfig.from_pretrained(tmp_path, num_prompts=3, dtype="auto").num_prompts == 3
    assert by_auto_config(tmp_path, num_prompts=3).num_prompts == 3
    _, unused = VPTSPConfig.from_pretrained(tmp_path, num_promptz=3, return_unused_kwargs=True)
    assert unused == {"num_promptz": 3}
    for load in (VPTSPConfig.from_pretrained, by_auto_config):
        with pytest.raises(ValueError, match="'num_promptz'; did you mean 'num_prompts'"):
            load(tmp_path, num_promptz=3)
        with pytest.raises(ValueError, match="num_prompts must be an integer >= 0, got -3"):
            load(tmp_path, num_prompts=-3)


@pytest.mark.parametrize(
    "value, message",
    [
        ([], r"backbone_config must be None or a configuration of transformers, or a mapping .* got \[\]"),
        ("vit", "backbone_config must be None or a configuration of transformers, or .* got 'vit'"),
        (3, "backbone_config must be None or a configuration of transformers, or .* got 3"),
        ({}, "backbone_config must hold a model_type that transformers knows, got None"),
        ({"model_type": ["vit"]}, r"backbone_config must hold a model_type .* got \['vit'\]"),
        ({"model_type": "bert"}, "backbone model type must be one of .* got 'bert'"),
        ({"model_type": "vit", "num_hidden_layers": 0}, "backbone_config.num_hidden_layers must be an integer >= 1"),
        ({"model_type": "vit", "num_hidden_layers": -1}, "num_hidden_layers must be an integer >= 1, got -1"),
        ({"model_type": "vit", "patch_size": 0}, "backbone_config.patch_size must be an integer >= 1, got 0"),
        ({"model_type": "vit", "patch_size": None}, "backbone_config: .*patch_size"),
        ({"model_type": "vit", "hidden_size": "a"}, "backbone_config: .*'hidden_size' expected int, got str"),
        ({"model_type": "vit", "hidden_size": 0}, "backbone_config.hidden_size must be an integer >= 1, got 0"),
        ({"model_type": "vit", "hidden_size": 10}, "hidden_size must be divisible by num_attention_heads, got 10"),
        ({"model_type": "vit", "hidden_act": "gelux"}, "backbone_config.hidden_act must be one of .* got 'gelux'"),
        (
            {"model_type": "vit", "dtype": "nonsense"},
            "backbone_config.dtype must be None or a dtype .* got 'nonsense'",
        ),
        ({"model_type": "vit", "patch_size": [8]}, r"backbone_config.patch_size must be a number or two, .* \[8\]"),
        ({"model_type": "vit", "image_size": [8, 8, 8]}, "backbone_config.image_size must be a number or two"),
        ({"model_type": "vit", "image_size": 8}, "backbone_config.image_size must be an integer >= 16, got 8"),
    ],
)
def test_backbones_that_can_not_be_built(value, message):
    with pytest.raises(ValueError, match=message) as caught:
        VPTSPConfig(backbone_config=value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("version", "fits"), [("5.17.3", False), ("4.57.0", False), ("5.18.0.dev0", True), ("6.0", True)]
)
def test_an_older_transformers_is_named_first(monkeypatch, version, fits):
    """In one sentence, before anything that it lacks is missed; `setup.cfg` claims the same version."""
    source = (ROOT / "configuration_vptsp.py").read_text(encoding="utf-8")
    beginning = source.partition("from huggingface_hub")[0]
    monkeypatch.setattr(transformers, "__version__", version)
    if fits:
        exec(beginning, {})
        return
    with pytest.raises(ImportError, match=rf"needs transformers 5\.18 or newer, but {version} is installed"):
        exec(beginning, {})


def test_the_lowest_version_is_the_one_claimed():
    assert f"transformers>={LOWEST_TRANSFORMERS}" in (ROOT / "setup.cfg").read_text(encoding="utf-8").replace(" ", "")


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", ["nonsense", "nn", 3, "auto"])
def test_dtypes_are_of_pytorch(name, value):
    with pytest.raises(ValueError, match=f"{name} must be None or a dtype of PyTorch such as float32, got {value!r}"):
        VPTSPConfig(**{name: value})
    assert VPTSPConfig(**{name: "float16"}).dtype == torch.float16


def test_what_a_saved_backbone_config_has_beside_fields_is_said_once(tmp_path, caplog):
    VPTSPConfig(backbone_config=tiny_vit_config(patch_sizes=3)).save_pretrained(tmp_path)
    caplog.clear()
    with caplog.at_level("WARNING"):
        for _ in range(2):
            assert VPTSPConfig.from_pretrained(tmp_path).backbone_config.patch_sizes == 3
    said = (
        "backbone_config (ViTConfig) of a saved model holds what is no field of it and changes nothing: 'patch_sizes'"
    )
    assert caplog.text.count(said) == 1
