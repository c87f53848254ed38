"""What training and embedding compute in: `dtype`, and the library that multiplies."""

import pytest
import torch
from PIL import Image

from vptsp import Embedder, VPTSPForMetricLearning, VPTSPTrainer, VPTSPTrainingArguments, backbones_vptsp
from vptsp.backbones_vptsp import LinearProducts, fastest_dtype, linear_products
from vptsp.training import resumable_trainer, trainer
from vptsp.training.checkpoints import load_tree


def arguments(folder, **fields):
    return VPTSPTrainingArguments(output_dir=str(folder), use_cpu=True, **fields)


@pytest.fixture(params=[True, False], ids=["bfloat16 instructions", "none"])
def multiplies(request, monkeypatch):
    """A processor with and without them."""
    monkeypatch.setattr(backbones_vptsp, "_MULTIPLIES_BFLOAT16", request.param)
    return request.param


def test_auto_is_bfloat16_where_the_device_multiplies_it(multiplies, tmp_path):
    assert fastest_dtype("cpu") == (torch.bfloat16 if multiplies else torch.float32)
    args = arguments(tmp_path, dtype="auto")
    assert (args.bf16, args.fp16) == (multiplies, False)


@pytest.mark.parametrize("dtype, bf16", [(None, False), ("float32", False), ("bfloat16", True)])
def test_a_given_dtype(tmp_path, dtype, bf16):
    args = arguments(tmp_path, dtype=dtype)
    assert (args.bf16, args.fp16) == (bf16, False)
    assert args.mixed_precision == ("bf16" if bf16 else "no")


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_cpu_is_taken_where_there_is_nothing_else(monkeypatch, tmp_path, dtype):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(backbones_vptsp, "_MULTIPLIES_BFLOAT16", True)
    args = VPTSPTrainingArguments(output_dir=str(tmp_path), dtype=dtype)
    assert args.bf16 and args.device.type == "cpu"


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"dtype": "float32", "bf16": True}, "dtype is float32, which is float32 here, and bf16 is true"),
        ({"dtype": "bfloat16", "fp16": True}, "dtype is bfloat16, which is bfloat16 here, and fp16 is true"),
        ({"dtype": "float16"}, "fp16 must be false on a CPU"),
        ({"dtype": "bf16"}, "dtype must be one of auto, float32, bfloat16, float16, got 'bf16'"),
    ],
)
def test_what_contradicts_itself_is_refused(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **fields)


def test_an_embedder_takes_auto(multiplies, retriever_folder):
    embedder = Embedder.from_pretrained(retriever_folder, dtype="auto", device="cpu")
    assert embedder.dtype == fastest_dtype("cpu")
    image = Image.effect_noise((40, 40), 50).convert("RGB")
    exact = Embedder.from_pretrained(retriever_folder, device="cpu").embed_images([image])
    torch.testing.assert_close(embedder.embed_images([image]), exact, rtol=0, atol=3e-2 if multiplies else 0)


def small_run(folder, backbone_folder, train, evaluated, **fields):
    torch.manual_seed(0)
    model = VPTSPForMetricLearning.from_backbone(backbone_folder, num_classes=5, embedding_dim=12, num_prompts=3)
    options = {"max_steps": 2, "save_steps": 1, "save_strategy": "steps", "eval_strategy": "no", **fields}
    args = arguments(folder, per_device_train_batch_size=4, disable_tqdm=True, **options)
    return VPTSPTrainer(model=model, args=args, train_dataset=train, eval_dataset=evaluated)


def test_a_run_goes_on_with_the_products_it_chose(
    monkeypatch,
    tmp_path,
    backbone_folder,
    train_dataset,
    eval_dataset,
):
    choices = {("output", 64, 384, 1536, 1): "onednn", ("input", 64, 384, 1536, 1): "torch"}
    monkeypatch.setattr(linear_products, "choices", dict(choices))
    small_run(tmp_path, backbone_folder, train_dataset, eval_dataset).train()
    assert load_tree(tmp_path / "checkpoint-1", "progress")[0]["linear_products"] == linear_products.saved()
    fresh = LinearProducts("torch")
    monkeypatch.setattr(resumable_trainer, "linear_products", fresh)
    run = small_run(tmp_path, backbone_folder, train_dataset, eval_dataset)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert fresh.choices == choices


def test_full_determinism_leaves_nothing_to_a_clock(
    monkeypatch,
    tmp_path,
    backbone_folder,
    train_dataset,
    eval_dataset,
):
    products = LinearProducts("measured")
    monkeypatch.setattr(trainer, "linear_products", products)
    monkeypatch.setattr("transformers.trainer.enable_full_determinism", lambda seed: None)
    small_run(tmp_path / "usual", backbone_folder, train_dataset, eval_dataset)
    assert products.library == ("measured" if len(products.available) > 1 else "torch")
    small_run(tmp_path / "exact", backbone_folder, train_dataset, eval_dataset, full_determinism=True)
    assert products.library == "torch"
