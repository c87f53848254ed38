"""Small training runs, started in one process or (by torchrun) in several, that must come out the same.

    torchrun --nproc_per_node 2 distributed_runs.py DATA BACKBONE OUTPUT

writes the final weights of every run of every rank to OUTPUT.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from vptsp import VPTSPForMetricLearning, VPTSPTrainer, VPTSPTrainingArguments
from vptsp.data_scripts import EvalTransform, ImageDataset, TrainTransform, load_splits


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
    # softer than by default: steep losses magnify rounding
    "recall_at_k": ({"loss": "recall_at_k", "loss_kwargs": {"rank_temperature": 0.1}, "proxy_update": "none"}, {}),
    "hyperbolic": ({"loss": "hyperbolic", "loss_kwargs": {"temperature": 1.0}, "proxy_update": "none"}, {}),
    "pml_miner": (
        {"loss": "pml.ContrastiveLoss", "miner": "pml.MultiSimilarityMiner", "proxy_update": "none"},
        {},
    ),
    "pml_parameters": ({"loss": "pml.ProxyAnchorLoss", "proxy_update": "none"}, {"images_per_class": 1}),
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


def run_all(data, backbone, output):
    torch.set_num_threads(1)
    splits = load_splits("folder", data, cache_dir=output / "cache", test_share=0.4)
    train = ImageDataset(splits["train"], TrainTransform(16))
    test = ImageDataset(splits["test"], EvalTransform(18, 16))
    for name, (model_fields, training_fields) in RUNS.items():
        args = VPTSPTrainingArguments(
            str(output / name),
            **{"images_per_class": 2, **training_fields},
            max_steps=20,
            logging_steps=1,
            # plain SGD: AdamW turns rounding errors of gradients near zero into full steps
            optim="sgd",
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
        torch.manual_seed(0)
        fields = {"num_classes": train.num_classes, "embedding_dim": 12, "num_prompts": 3, "num_class_prompts": 2}
        model = VPTSPForMetricLearning.from_backbone(backbone, **{**fields, **model_fields})
        trainer = VPTSPTrainer(model=model, args=args, train_dataset=train, eval_dataset=test)
        trainer.train()
        embeddings, labels = trainer.embed(test)
        losses = torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        metrics = trainer.evaluate()
        final = {key: value.contiguous() for key, value in model.state_dict().items()}
        final |= {"embeddings": embeddings, "labels": labels, "loss": losses}
        final["map_at_r"] = torch.tensor(metrics["eval_map_at_r"])
        save_file(final, output / f"{name}-{args.process_index}.safetensors")


if __name__ == "__main__":
    run_all(*(Path(argument) for argument in sys.argv[1:4]))
