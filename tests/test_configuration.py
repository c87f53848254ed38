"""VPTSPConfig: derived values, validation, round trip."""

import json

import pytest
from conftest import tiny_vit_config
from transformers import AutoConfig, ViTConfig

from vptsp import VPTSPConfig


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
    assert AutoConfig.from_pretrained(tmp_path, trust_remote_code=True).num_prompts == 7


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
