"""`tuning: peft`: kinds of PEFT's tuning by PEFT's own configuration, saved, shared, merged and refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from remote_code import remote_model
from safetensors.torch import load_file

from vptsp import VPTSPConfig, VPTSPForMetricLearning, VPTSPModel
from vptsp.training.model_card import retriever_card
from vptsp.training.run_arguments import parse_arguments


peft = pytest.importorskip("peft")

LINEAR = ["q_proj", "v_proj", "fc1"]
KINDS = {
    "lora": {"peft_type": "LORA", "r": 2, "target_modules": LINEAR, "lora_dropout": 0.3, "use_rslora": True},
    "lora_patterns": {"peft_type": "LORA", "r": 2, "target_modules": LINEAR, "rank_pattern": {"fc1": 5}},
    "dora": {"peft_type": "LORA", "r": 2, "target_modules": LINEAR, "use_dora": True},
    "some_layers": {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "layers_to_transform": [1, 3]},
    "ia3": {"peft_type": "IA3", "target_modules": ["k_proj", "fc2"], "feedforward_modules": ["fc2"]},
    "loha": {"peft_type": "LOHA", "r": 2, "target_modules": LINEAR},
    "lokr": {"peft_type": "LOKR", "r": 2, "target_modules": LINEAR},
    "hra": {"peft_type": "HRA", "r": 2, "target_modules": LINEAR},
    "norms": {"peft_type": "LN_TUNING", "target_modules": ["layernorm_before", "layernorm_after"]},
    "miss": {"peft_type": "MISS", "r": 2, "target_modules": ["q_proj"]},
    "fourier": {"peft_type": "FOURIERFT", "n_frequency": 10, "target_modules": ["q_proj"]},
}
PIXELS = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(5))


def make_model(backbone_folder, kind="lora", cls=VPTSPModel, **fields):
    torch.manual_seed(0)
    values = {"num_prompts": 2, "embedding_dim": 6, "tuning": "peft", "peft_config": KINDS[kind], **fields}
    return cls.from_backbone(backbone_folder, **values)


def moved(model):
    """The model, once everything that is tuned has moved."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def frozen(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if name not in model.tuned_names()}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_come_back_as_they_were_saved(backbone_folder, tmp_path, kind):
    model = make_model(backbone_folder, kind, bitfit=False)
    plain = make_model(backbone_folder, tuning=None, peft_config=None, bitfit=False).eval()
    with torch.no_grad():
        for name in ("prompts.tokens", "head.projection.weight"):
            plain.get_parameter(name).copy_(model.get_parameter(name))
    started = model.eval()(PIXELS).embeddings
    if kind != "fourier":  # whose spectrum is drawn at random
        torch.testing.assert_close(started, plain(PIXELS).embeddings, rtol=0, atol=1e-5)
    before = frozen(model)
    embeddings = moved(model)(PIXELS).embeddings
    assert (embeddings - started).abs().max() > 1e-3
    embeddings.sum().backward()
    in_backbone = {name for name, p in model.named_parameters() if name.startswith("backbone.") and p.requires_grad}
    assert in_backbone and all(model.get_parameter(name).grad is not None for name in in_backbone)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert set(saved) == model.tuned_names() and not any(".base_layer." in name for name in saved)
    assert all(torch.equal(tensor, before[name]) for name, tensor in frozen(model).items())
    loaded = VPTSPModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(PIXELS).embeddings, embeddings)
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} >= in_backbone
    if kind in ("dora", "fourier"):  # what is not in the weights, and what is drawn
        loaded = remote_model(tmp_path)
        assert torch.equal(loaded(PIXELS).embeddings, embeddings)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_needs_no_peft(backbone_folder, tmp_path, kind):
    model = moved(make_model(backbone_folder, kind)).double()
    merged = model.merged()
    torch.testing.assert_close(merged(PIXELS.double()).embeddings, model(PIXELS.double()).embeddings)
    assert not any(type(module).__module__.startswith("peft.") for module in merged.modules())
    merged.float().save_pretrained(tmp_path)
    expected = merged(PIXELS).embeddings
    torch.save(PIXELS, tmp_path / "pixels.pt")
    code = (
        "import sys; sys.modules['peft'] = None\n"
        "import torch; from transformers import AutoModel\n"
        f"model = AutoModel.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)\n"
        f"torch.set_num_threads(1); pixels = torch.load({str(tmp_path / 'pixels.pt')!r})\n"
        f"torch.save(model(pixels).embeddings, {str(tmp_path / 'embeddings.pt')!r})"
    )
    if kind == "lora":  # one process is enough
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        assert torch.equal(torch.load(tmp_path / "embeddings.pt"), expected)
    assert torch.equal(VPTSPModel.from_pretrained(tmp_path)(PIXELS).embeddings, expected)


@pytest.mark.parametrize("fields", [{"lora_rank": 2}, {"lora_rank": 2, "use_dora": True}], ids=["lora", "dora"])
def test_lora_of_fields_merges_too(backbone_folder, fields):
    model = moved(make_model(backbone_folder, tuning=None, peft_config=None, **fields)).double()
    merged = model.merged()
    torch.testing.assert_close(merged(PIXELS.double()).embeddings, model(PIXELS.double()).embeddings)
    with pytest.raises(ValueError, match="there is none of it"):
        merged.merged()


def test_lora_by_either_name_is_the_same(backbone_folder):
    values = {"peft_type": "LORA", "r": 3, "lora_alpha": 6.0, "target_modules": ["q_proj", "v_proj"]}
    one = make_model(backbone_folder, peft_config=values)
    other = make_model(backbone_folder, tuning=None, peft_config=None, lora_rank=3, lora_alpha=6.0)
    assert one.state_dict().keys() == other.state_dict().keys()
    assert one.tuned_names() == other.tuned_names()
    other.load_state_dict(one.state_dict())
    assert torch.equal(moved(one)(PIXELS).embeddings, moved(other)(PIXELS).embeddings)


def test_dropout_of_peft_counts_in_training_alone(backbone_folder):
    model = make_model(backbone_folder, bitfit=False)
    moved(model).train()
    torch.manual_seed(3)
    first, second = model(PIXELS).embeddings, model(PIXELS).embeddings
    assert not torch.equal(first, second)
    assert not model.backbone.layers[0].attention.q_proj.base_layer.training
    model.eval()
    assert torch.equal(model(PIXELS).embeddings, model(PIXELS).embeddings)


def test_configuration_of_any_form(tmp_path):
    own = peft.LoraConfig(r=2, target_modules=["v_proj", "q_proj"])
    of_object = VPTSPConfig(tuning="peft", peft_config=own).peft_config
    assert of_object["peft_type"] == "LORA" and of_object["target_modules"] == ["q_proj", "v_proj"]
    own.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    of_file = VPTSPConfig(tuning="peft", peft_config=str(path)).peft_config
    assert {**of_file, "target_modules": sorted(of_file["target_modules"])} == of_object
    given = json.dumps(KINDS["ia3"])
    for text, expected in ((given, KINDS["ia3"]), (str(path), str(path))):
        fields, *_ = parse_arguments(["--backbone", "b", "--tuning", "peft", "--peft_config", text])
        assert fields["peft_config"] == expected
    restored = VPTSPConfig.from_dict(VPTSPConfig(tuning="peft", peft_config=own).to_dict())
    assert restored.peft_config == of_object


REFUSED = {
    "no configuration": (
        {"peft_config": None},
        "peft_config must be a mapping or the path of a file with tuning peft",
    ),
    "no tuning": ({"tuning": None}, "peft_config must be None without tuning peft"),
    "no type": ({"peft_config": {"r": 2}}, "peft_config must have a peft_type such as LORA"),
    "no mapping": ({"peft_config": [1]}, r"peft_config must be None or a mapping, got \[1\]"),
    "no file": ({"peft_config": "nowhere.json"}, "a mapping or a file of JSON, got 'nowhere.json': .*No such file"),
    "a folder": ({"peft_config": "."}, r"must be a file, got the folder \.: .*trained is not read"),
    "heads": ({"peft_config": {**KINDS["lora"], "modules_to_save": ["head"]}}, "modules_to_save must be left out"),
    "bias": ({"peft_config": {**KINDS["lora"], "bias": "all"}}, "bias must be left out, got 'all': bitfit"),
    "pissa": ({"peft_config": {**KINDS["lora"], "init_lora_weights": "pissa"}}, "init_lora_weights must be left out"),
    "both": ({"lora_rank": 2}, "lora_rank must be 0 with tuning peft, got 2"),
    "all": ({"tune_backbone": True}, "tune_backbone must be false with tuning peft"),
    "keywords": ({"tuning_kwargs": {"r": 2}}, "tuning_kwargs must be None with tuning peft"),
    "not JSON": ({"peft_config": {**KINDS["lora"], "r": object()}}, "peft_config must hold what JSON can"),
}


@pytest.mark.parametrize("fields, message", REFUSED.values(), ids=REFUSED)
def test_configurations_that_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        VPTSPConfig(**{"tuning": "peft", "peft_config": KINDS["lora"], **fields})


NOT_BUILT = {
    "unknown kind": ({"peft_type": "PROMPT_TUNING"}, "peft_type must be one of LORA, .*, got 'PROMPT_TUNING'"),
    "a kind in small letters": ({"peft_type": "lora"}, "got 'lora'; did you mean 'LORA'"),
    "unknown field": ({**KINDS["lora"], "ranks": 3}, "LoraConfig of peft .* has no ranks"),
    "near field": ({**KINDS["lora"], "lora_alfa": 3}, "has no lora_alfa; did you mean 'lora_alpha'"),
    "no such target": ({**KINDS["lora"], "target_modules": ["query"]}, r"target_modules must name .*\(fc1, .*'query'"),
    "one beside others": (
        {**KINDS["lora"], "target_modules": ["v_proj", "q_prj"]},
        "fc1, fc2, k_proj, .* got 'q_prj'; did you mean 'q_proj'",
    ),
    "excluded": (
        {**KINDS["lora"], "exclude_modules": ["fc3"]},
        "exclude_modules must name .* got 'fc3'; did you mean",
    ),
    "number as target": ({**KINDS["lora"], "target_modules": 3}, "target_modules must name .* got 3"),
    "pattern": ({**KINDS["lora"], "target_modules": "*("}, "peft_config: nothing to repeat"),
    "kind of value": ({**KINDS["lora"], "r": "x"}, "peft_config: r must be a number, got 'x'"),
    "no mapping of ranks": ({**KINDS["lora"], "rank_pattern": 3}, "peft_config: 'int' object has no attribute"),
    "outside": ({**KINDS["norms"], "target_modules": ["layernorm"]}, "parts of the backbone's layers, got layernorm"),
    "out of range": ({**KINDS["lora"], "r": -1}, "peft_config: .*r.* should be a positive integer"),
}


@pytest.mark.parametrize("values, message", NOT_BUILT.values(), ids=NOT_BUILT)
def test_configurations_that_peft_can_not_take(backbone_folder, values, message):
    with pytest.raises(ValueError, match=message) as error:
        make_model(backbone_folder, peft_config=values)
    assert "\n" not in str(error.value)


def test_the_card_says_what_loading_needs(backbone_folder):
    for kind, needed in (("tuning", True), ("lora", True), ("none", False)):
        fields = {"tuning": {}, "lora": {"lora_rank": 2}, "none": {}}[kind]
        fields |= {} if kind == "tuning" else {"tuning": None, "peft_config": None}
        text = str(retriever_card(make_model(backbone_folder, **fields), "ann/birds"))
        assert ("`transformers` 5.18 or newer, `peft` and `pillow`" in text) == needed


def test_without_peft_it_is_said(backbone_folder, tmp_path, monkeypatch):
    make_model(backbone_folder).save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="tuning is peft, which needs the package peft: pip install peft"):
        VPTSPModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["lora", "ia3", "lokr"])
def test_what_peft_changes_afterwards_is_refused(backbone_folder, tmp_path, kind):
    model = moved(make_model(backbone_folder, kind))
    layer = next(module for module in model.modules() if hasattr(module, "base_layer"))
    layer.enable_adapters(False)
    with pytest.raises(ValueError, match=r"what PEFT tunes of backbone\.layers\.0\..* got it switched off by PEFT"):
        model.save_pretrained(tmp_path / "saved")
    layer.enable_adapters(True)
    layer.set_adapter("default")
    layer.merge()
    with pytest.raises(ValueError, match=r"merged what it tunes into backbone\.layers\.0"):
        model.save_pretrained(tmp_path / "saved", save_backbone=True)
    layer.unmerge()
    peft.inject_adapter_in_model(
        peft.LoraConfig(r=2, target_modules=["o_proj"]), model.backbone, adapter_name="second"
    )
    with pytest.raises(ValueError, match=r"PEFT has put an adapter into the model \(backbone\.layers\.0.*o_proj"):
        model.save_pretrained(tmp_path / "saved")
    assert not Path(tmp_path / "saved").exists()


def test_random_backbones_start_as_they_are(vit_config):
    model = VPTSPModel(VPTSPConfig(backbone_config=vit_config, tuning="peft", peft_config=KINDS["norms"]))
    norm = model.backbone.layers[0].layernorm_before
    with torch.no_grad():
        norm.base_layer.weight.mul_(3)
    assert torch.equal(norm.ln_tuning_layers["default"].weight, norm.base_layer.weight / 3)


def test_training_models_have_it_in_both_passes(backbone_folder):
    model = moved(make_model(backbone_folder, "loha", VPTSPForMetricLearning, num_classes=3)).train()
    output = model(PIXELS, torch.tensor([0, 1, 2]), images_per_class=1)
    output.proxy_rows.square().sum().backward()
    tuned = [p for n, p in model.named_parameters() if "hada" in n]
    assert tuned and all(parameter.grad.norm() > 0 for parameter in tuned)
