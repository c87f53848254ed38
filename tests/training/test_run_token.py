"""`hub_token` of a run goes to every look-up on the Hub: data, backbone, image processor."""

from types import SimpleNamespace

import pytest
from huggingface_hub import get_token
from transformers import ViTConfig

from vptsp.training import run as runs
from vptsp.training import run_arguments
from vptsp.training.run_arguments import parse_arguments
from vptsp.training.run_errors import ConfigError


def test_a_run_looks_everything_up_with_its_token(tmp_path, monkeypatch):
    seen = {}

    def backbone_config(name, revision=None, token=None, **kwargs):
        seen["configuration"] = token
        return SimpleNamespace(config=ViTConfig())

    def datasets(args):
        seen["data"] = get_token()
        return {"train": SimpleNamespace(num_classes=3)}

    def from_backbone(*args, token=None, **kwargs):
        seen["backbone"] = token
        return SimpleNamespace(config=SimpleNamespace(backbone="ann/private", backbone_revision=None))

    def processor(*args, token=None):
        seen["processor"] = token
        raise OSError("far enough")

    monkeypatch.setenv("HF_TOKEN", "hf_of_the_shell")
    monkeypatch.setattr(run_arguments, "find_backbone", backbone_config)
    monkeypatch.setattr(runs, "image_datasets", datasets)
    monkeypatch.setattr(runs.VPTSPForMetricLearning, "from_backbone", from_backbone)
    monkeypatch.setattr(runs, "build_image_processor", processor)
    words = ["--backbone", "ann/private", "--hub_token", "hf_of_the_run", "--output_dir", str(tmp_path / "run")]
    arguments = parse_arguments([*words, "--use_cpu", "true"])
    with pytest.raises(ConfigError, match="far enough"):
        runs.run(*arguments, command="")
    assert seen == dict.fromkeys(("configuration", "data", "backbone", "processor"), "hf_of_the_run")
    assert get_token() == "hf_of_the_shell"
