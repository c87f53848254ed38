"""Models that PEFT has wrapped or put adapters into are refused where they arrive, naming `lora_rank`."""

import pytest
import torch

from vptsp import Embedder, VPTSPForMetricLearning, VPTSPModel, VPTSPTrainer, VPTSPTrainingArguments
from vptsp.data_scripts.preprocessing import build_image_processor
from vptsp.deploy.export import export_onnx, export_program
from vptsp.modeling_vptsp import refuse_other_adapters


peft = pytest.importorskip("peft")

FIELDS = {"num_prompts": 2, "embedding_dim": 6}
WRAPPED = "of PEFT, expected the model itself: for LoRA set lora_rank in the configuration"
INSIDE = r"PEFT has put an adapter into the model \(.*\), which is not saved: for LoRA set lora_rank"


def lora(**options):
    return peft.LoraConfig(r=2, target_modules=["q_proj"], **options)


@pytest.fixture
def model(backbone_folder):
    return VPTSPForMetricLearning.from_backbone(backbone_folder, num_classes=3, **FIELDS)


@pytest.fixture
def arguments(tmp_path):
    return VPTSPTrainingArguments(str(tmp_path / "run"), use_cpu=True, eval_strategy="no")


def test_adapters_of_transformers_are_refused(model):
    for part in (model, model.retriever):
        for method in (part.add_adapter, part.load_adapter):
            with pytest.raises(ValueError, match=f"{type(part).__name__} takes no adapters of PEFT.* lora_rank"):
                method(lora())
    assert not any("lora" in name for name in model.state_dict())


INJECTIONS = {
    "backbone.add_adapter": lambda model: model.retriever.backbone.add_adapter(lora()),
    "inject_adapter_in_model": lambda model: peft.inject_adapter_in_model(lora(), model),
    "get_peft_model": lambda model: peft.get_peft_model(model, lora()),
    "IA3": lambda model: peft.get_peft_model(model, peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])),
    "of the head": lambda model: peft.inject_adapter_in_model(
        peft.LoraConfig(r=2, target_modules=["projection"]), model
    ),
}


@pytest.mark.parametrize("inject", INJECTIONS.values(), ids=INJECTIONS)
def test_adapters_inside_are_refused_everywhere(model, arguments, tmp_path, inject):
    inject(model)
    with pytest.raises(ValueError, match=INSIDE):
        VPTSPTrainer(model, arguments)
    with pytest.raises(ValueError, match=INSIDE):
        Embedder(model.retriever, build_image_processor(16, 18), "name")
    for export in (export_program, export_onnx):
        with pytest.raises(ValueError, match=INSIDE):
            export(model.retriever, tmp_path / "file")
    for part in (model, model.retriever):
        with pytest.raises(ValueError, match=INSIDE):
            part.save_pretrained(tmp_path / "saved")
        with pytest.raises(ValueError, match=INSIDE):
            part.push_to_hub("ann/birds", save_backbone=True)
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("mixed", [False, True])
def test_wrapped_models_are_refused(model, arguments, tmp_path, mixed):
    retriever = peft.get_peft_model(model.retriever, lora(), mixed=mixed)
    training = peft.get_peft_model(model, lora(), mixed=mixed)
    with pytest.raises(ValueError, match=WRAPPED):
        VPTSPTrainer(training, arguments)
    with pytest.raises(ValueError, match=WRAPPED):
        Embedder(retriever, build_image_processor(16, 18), "name")
    for export in (export_program, export_onnx):
        with pytest.raises(ValueError, match=WRAPPED):
            export(retriever, tmp_path / "file")


@pytest.mark.parametrize("targets", [None, ["fc1"], ["layers.0.attention.q_proj"]])
def test_own_lora_goes_on(backbone_folder, arguments, tmp_path, targets):
    fields = {**FIELDS, "lora_rank": 2, "lora_targets": targets, "num_classes": 3}
    model = VPTSPForMetricLearning.from_backbone(backbone_folder, **fields).eval()
    VPTSPTrainer(model, arguments)
    model.retriever.save_pretrained(tmp_path / "retriever")
    loaded = VPTSPModel.from_pretrained(tmp_path / "retriever")
    pixel_values = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded(pixel_values).embeddings, model.retriever(pixel_values).embeddings)
    Embedder(loaded, build_image_processor(16, 18), "name")
    peft.inject_adapter_in_model(lora(), loaded.backbone, adapter_name="second")
    with pytest.raises(ValueError, match=INSIDE):
        loaded.save_pretrained(tmp_path / "again")


def test_merged_models_are_no_longer_peft(model):
    merged = peft.get_peft_model(model, lora()).unload()
    refuse_other_adapters(merged)
