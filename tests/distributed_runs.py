"""Small training runs, in one process or in several, that must come out the same.

    python distributed_runs.py DATA BACKBONE OUTPUT 1 2 3

makes all runs in one process, then in two, then in three, which are forked once everything is imported. The final
weights of every run of every rank go to OUTPUT/1, OUTPUT/2, ..., and what went wrong to `error-RANK.txt` there.
"""

import gc
import os
import sys
import traceback
from pathlib import Path

import torch
from checkpoint_runs import free_port
from safetensors.torch import save_file
from test_families import KINDS, backbone_config, perturb

from vptsp import (
    EvalTransform,
    ImageDataset,
    TrainTransform,
    VPTSPConfig,
    VPTSPForMetricLearning,
    VPTSPTrainer,
    VPTSPTrainingArguments,
    load_splits,
)


OFFLOADED = {"class_prompt_store": "offloaded"}
# Model fields, training fields. The global batch has 12 images.
RUNS = {
    "gru": ({}, {}),
    "k1": ({}, {"images_per_class": 1}),
    "mean": ({"proxy_update": "mean", "proxy_normalization": "per_batch"}, {}),
    "plain": ({"proxy_update": "none"}, {}),
    "nca_batch": ({"loss": "proxy_nca", "proxy_range": "batch"}, {}),
    "batch_positives": ({"proxy_anchor_reduction": "batch_positives", "bitfit": False}, {}),
    "accumulation": ({}, {"gradient_accumulation_steps": 2}),
    "checkpointing": ({}, {"gradient_checkpointing": True}),
    "adapter": ({"adapter_layers": 2, "adapter_dim": 8, "bitfit": False}, {}),
    "full": ({"tune_backbone": True}, {}),
    "lora": ({"lora_rank": 2}, {}),
    "peft": ({"tuning": "peft", "peft_config": {"peft_type": "LOHA", "r": 2, "target_modules": ["v_proj"]}}, {}),
    "average": ({}, {"ema_decay": 0.9}),
    "pca": ({}, {"head_init": "pca"}),
    "shallow": ({"prompt_mode": "shallow", "pooling": "mean"}, {}),
    "offloaded": (OFFLOADED, {}),
    "offloaded_k1": (OFFLOADED, {"images_per_class": 1, "class_prompt_folder": "mapped"}),
    # with k = 1 a batch has all classes: the same one comes to several ranks within a step
    "offloaded_accumulation": (OFFLOADED, {"gradient_accumulation_steps": 2, "images_per_class": 1}),
    "offloaded_checkpointing": (OFFLOADED, {"gradient_checkpointing": True}),
    "offloaded_nca": ({**OFFLOADED, "loss": "proxy_nca"}, {"max_grad_norm": 0.5}),
    # with an epsilon that rounding errors of gradients near zero do not reach
    "offloaded_adamw": (OFFLOADED, {"optim": "adamw_torch", "adam_epsilon": 1e-2, "weight_decay": 0.1}),
    # softer than by default: steep losses magnify rounding
    "recall_at_k": ({"loss": "recall_at_k", "loss_kwargs": {"rank_temperature": 0.1}, "proxy_update": "none"}, {}),
    "hyperbolic": ({"loss": "hyperbolic", "loss_kwargs": {"temperature": 1.0}, "proxy_update": "none"}, {}),
    "pml_miner": (
        {"loss": "pml.ContrastiveLoss", "miner": "pml.MultiSimilarityMiner", "proxy_update": "none"},
        {},
    ),
    "pml_parameters": ({"loss": "pml.ProxyAnchorLoss", "proxy_update": "none"}, {"images_per_class": 1}),
    **{f"family {name}": ({"family": name, "pooling": None}, {"max_steps": 3}) for name in KINDS},
    "pml_memory": (
        {
            "loss": "pml.CrossBatchMemory",
            "loss_kwargs": {"loss": "pml.ContrastiveLoss", "memory_size": 30},
            "proxy_update": "none",
        },
        {},
    ),
}
GLOBAL_BATCH = 12


# Registers and rotary positions, and no class token; the others are among the slow tests.
FAMILIES = ("family dinov3_vit", "family siglip_vision_model")


def runs_of(processes):
    """Names of the runs that so many processes make; families differ in the model alone, so two are enough."""
    if os.environ.get("EVERY_FAMILY"):
        return [name for name in RUNS if name.startswith("family ")]
    others = [name for name in RUNS if not name.startswith("family ")]
    return others if processes > 2 else [*others, *FAMILIES]


def run_all(data, backbone, output):
    splits = load_splits("folder", data, cache_dir=output / "cache", test_share=0.4)
    train = ImageDataset(splits["train"], TrainTransform(16))
    test = ImageDataset(splits["test"], EvalTransform(18, 16))
    for name in runs_of(int(os.environ.get("WORLD_SIZE", 1))):
        model_fields, training_fields = RUNS[name]
        args = VPTSPTrainingArguments(
            str(output / name),
            # plain SGD: AdamW turns rounding errors of gradients near zero into full steps
            **{"images_per_class": 2, "optim": "sgd", "max_steps": 20, **training_fields},
            logging_steps=1,
            learning_rate=2e-3,
            proxy_learning_rate=1e-2,
            eval_strategy="no",
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            per_device_eval_batch_size=4,
            per_device_train_batch_size=12,
        )
        args.per_device_train_batch_size = GLOBAL_BATCH // args.world_size
        if args.class_prompt_folder is not None:
            args.class_prompt_folder = str(output / args.class_prompt_folder)
        torch.manual_seed(0)
        fields = {"num_classes": train.num_classes, "embedding_dim": 12, "num_prompts": 3, "num_class_prompts": 2}
        model = build({**fields, **model_fields}, backbone)
        trainer = VPTSPTrainer(model=model, args=args, train_dataset=train, eval_dataset=test)
        trainer.train()
        embeddings, labels = trainer.embed(test)
        losses = torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        metrics = trainer.evaluate()
        final = {key: value.contiguous() for key, value in model.state_dict().items()}
        if model.offloaded_class_prompts is not None:
            final["class_prompts"] = model.class_prompts.tokens
            final |= {f"class_prompts.{name}": state for name, state in model.class_prompts.states.items()}
        final |= {"embeddings": embeddings, "labels": labels, "loss": losses}
        final["map_at_r"] = torch.tensor(metrics["eval_map_at_r"])
        save_file(final, output / f"{name}-{args.process_index}.safetensors")


def build(fields, backbone):
    """A model on the weights in a folder, or on random ones of a `family` by its name in test_families.py."""
    name = fields.pop("family", None)
    if name is None:
        return VPTSPForMetricLearning.from_backbone(backbone, **fields)
    return perturb(VPTSPForMetricLearning(VPTSPConfig(backbone_config=backbone_config(name), **fields)))


def fork(rank, processes, port, data, backbone, output):
    """Start a child that makes all runs as one of several ranks; its process id."""
    pid = os.fork()
    if pid:
        return pid
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        run_all(data, backbone, output)
    except BaseException:
        (output / f"error-{rank}.txt").write_text(traceback.format_exc())
    os._exit(0)


def main(data, backbone, output, numbers):
    torch.set_num_threads(1)
    VPTSPForMetricLearning.from_backbone(backbone, num_classes=2)  # imports the rest, once for all
    gc.freeze()  # children need not look through what they share
    for processes in numbers:
        (output / str(processes)).mkdir()
        port = free_port()
        for child in [
            fork(rank, processes, port, data, backbone, output / str(processes)) for rank in range(processes)
        ]:
            os.waitpid(child, 0)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), [int(word) for word in sys.argv[4:]])
