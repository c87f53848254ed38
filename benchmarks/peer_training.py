"""One run of a peer, each by its library's own documented way, on our images and scored by our metrics.

`peers.py` starts it, with the name of a peer first. The options after that are those of `train.py` that mean something
here; others are refused. Training crops are cut as ours are, the rates fall as a cosine over all steps, the optimiser
is AdamW. `output_dir` gets `all_results.json` with the same fields as a run of ours, and the weights to ship.
Images of unseen classes are embedded in float32.
"""

import random
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from vptsp.data_scripts.image_datasets import image_datasets
from vptsp.data_scripts.normalisation import Normalisation
from vptsp.data_scripts.preprocessing import build_image_processor
from vptsp.data_scripts.sampler import SampleKey
from vptsp.eval.metrics import retrieval_metrics
from vptsp.files.atomic import write_json
from vptsp.training.fitting import fit_to_data
from vptsp.training.run import peak_memory_megabytes
from vptsp.training.run_arguments import parse_arguments


# Of `train.py`: honoured here, or without a meaning where nothing is evaluated or saved on the way.
HONOURED = {
    *("dataset_name", "data_dir", "data_cache_dir", "class_split", "train_classes", "test_classes", "test_share"),
    *("split_seed", "layout", "image_size", "resize_size", "crop_scale_min", "horizontal_flip", "max_image_pixels"),
    *("backbone", "embedding_dim", "per_device_train_batch_size", "images_per_class", "max_steps", "num_train_epochs"),
    *("learning_rate", "proxy_learning_rate", "weight_decay", "optim", "cosine_epochs", "bf16", "use_cpu", "seed"),
    *("recall_at", "output_dir", "eval_strategy", "picture_queries", "save_strategy", "final_metrics", "disable_tqdm"),
}
LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.1}
QUERY_AND_VALUE = (("q_proj", "v_proj"), ("query", "value"))  # as versions of transformers name them
EVALUATED_AT_ONCE = 64


class Trunk(nn.Module):
    """A backbone of transformers: `(B, 3, S, S)` uint8 -> `(B, D)` float32, its CLS token."""

    def __init__(self, backbone, normalisation, bf16):
        super().__init__()
        from transformers import AutoModel

        self.backbone, self.normalisation, self.bf16 = AutoModel.from_pretrained(backbone), normalisation, bf16

    def forward(self, pixels):
        pixels = self.normalisation(pixels)
        training = not torch.is_inference_mode_enabled()  # a frozen one is in eval mode then, too
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=self.bf16 and training):
            extra = {"interpolate_pos_encoding": True} if self.backbone.config.model_type == "vit" else {}
            return self.backbone(pixels, **extra).last_hidden_state[:, 0].float()


class Crops(torch.utils.data.Dataset):
    """Training images under plain row numbers, each time another crop."""

    def __init__(self, images, seed):
        self.images, self.random = images, random.Random(seed)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, row):
        example = self.images[SampleKey(int(row), self.random.getrandbits(62))]
        return example["pixel_values"], example["labels"]


def cosine(optimizer, steps):
    """Rates that fall to 0 over the run, as ours do."""
    from transformers import get_cosine_schedule_with_warmup

    return get_cosine_schedule_with_warmup(optimizer, 0, steps)


def check(arguments):
    """Parse, and refuse what this script would pass over.

    Returns:
        Model fields, training and data arguments, as `parse_arguments`.

    Raises:
        ValueError: an option means nothing here, or has a value that is not done here.
    """
    given = [text[2:].partition("=")[0] for text in arguments if text.startswith("--")]
    if unknown := [name for name in given if name not in HONOURED]:
        raise ValueError(f"peers have no option --{unknown[0]}; they take {', '.join(sorted(HONOURED))}")
    model_fields, args, data_args, _ = parse_arguments(arguments, "peer_training.py")
    if args.optim not in ("adamw_torch", "adamw_torch_fused"):
        raise ValueError(f"peers train with AdamW: optim must be adamw_torch, got {args.optim.value}")
    if args.max_steps <= 0 and args.cosine_epochs not in (None, args.num_train_epochs):
        raise ValueError(f"cosine_epochs must be num_train_epochs {args.num_train_epochs}, got {args.cosine_epochs}")
    if args.max_steps > 0 and args.cosine_epochs is not None:
        raise ValueError("cosine_epochs goes with num_train_epochs: with max_steps, peers' rates fall over all steps")
    if args.max_steps == 1:
        raise ValueError("a peer needs two steps at least to time one, got max_steps 1")
    if model_fields["backbone"] is None or args.output_dir is None:
        raise ValueError("a peer needs --backbone and --output_dir")
    return model_fields, args, data_args


def train_pml(model_fields, args, images, normalisation, steps, *, loss, tune_backbone):
    """pytorch-metric-learning: its `MetricLossOnly` trainer, with its sampler, loss and, where it says so, miner.

    Returns:
        Function from pixels to embeddings, tensors to ship by name, number of parameters for training only, and
        the time at the end of each step.
    """
    from pytorch_metric_learning import losses, miners, samplers, trainers

    trunk = Trunk(model_fields["backbone"], normalisation, args.bf16)
    width, dim = trunk.backbone.config.hidden_size, model_fields["embedding_dim"]
    embedder = nn.Linear(width, dim)
    function = (
        losses.ProxyAnchorLoss(images.num_classes, dim) if loss == "proxy_anchor" else losses.MultiSimilarityLoss()
    )
    mining = {} if loss == "proxy_anchor" else {"tuple_miner": miners.MultiSimilarityMiner()}
    rates = {"embedder": (embedder, args.learning_rate)}
    if tune_backbone:
        rates["trunk"] = (trunk, args.learning_rate)
    if list(function.parameters()):
        rates["metric_loss"] = (function, args.proxy_learning_rate)
    optimizers = {
        f"{name}_optimizer": torch.optim.AdamW(part.parameters(), lr=rate, weight_decay=args.weight_decay)
        for name, (part, rate) in rates.items()
    }
    names = {name: f"{name.removesuffix('_optimizer')}_scheduler_by_iteration" for name in optimizers}
    times = []
    size, count = args.per_device_train_batch_size, args.images_per_class
    trainer = trainers.MetricLossOnly(
        models={"trunk": trunk, "embedder": embedder},
        optimizers=optimizers,
        batch_size=size,
        loss_funcs={"metric_loss": function},
        mining_funcs=mining,
        dataset=Crops(images, args.seed),
        sampler=samplers.MPerClassSampler(images.labels, count, size, max(len(images), size)),
        iterations_per_epoch=steps,
        data_device=args.device,
        lr_schedulers={names[name]: cosine(optimizer, steps) for name, optimizer in optimizers.items()},
        freeze_these=() if tune_backbone else ("trunk",),
        dataloader_num_workers=0,
        end_of_iteration_hook=lambda trainer: times.append(time.perf_counter()),
    )
    for part in (trunk, embedder, function):
        part.to(args.device)
    trainer.train(num_epochs=1)
    model = nn.Sequential(trunk, embedder)
    shipped = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    spare = sum(tensor.numel() for tensor in function.parameters())
    return _embedding(model, args.device), shipped, spare, times


def train_sentence_transformers(model_fields, args, images, normalisation, steps):
    """sentence-transformers: LoRA by PEFT and the batch-hard triplet loss, by its own trainer.

    Returns:
        As `train_pml`.
    """
    import datasets
    from peft import LoraConfig, TaskType
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import BatchHardTripletLoss
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import TrainerCallback

    # images come as ours are cut; its image processor has only to scale and normalise them
    transformer = Transformer(model_fields["backbone"], processor_kwargs={"do_resize": False, "do_center_crop": False})
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="cls")
    model = SentenceTransformer(modules=[transformer, pooling], device=str(args.device))
    found = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    targets = next(list(names) for names in QUERY_AND_VALUE if set(names) <= found)
    model.add_adapter(LoraConfig(task_type=TaskType.FEATURE_EXTRACTION, target_modules=targets, **LORA))
    crops = Crops(images, args.seed)

    def cut(batch):
        found = {"image": [_picture(crops[row][0]) for row in batch["row"]]} if "row" in batch else {}
        return found | ({"label": batch["label"]} if "label" in batch else {})

    table = datasets.Dataset.from_dict({"row": list(range(len(images))), "label": images.labels.tolist()})
    table.set_transform(cut)
    times = []

    class Times(TrainerCallback):
        def on_step_end(self, *_, **__):
            times.append(time.perf_counter())

    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            output_dir=args.output_dir,
            per_device_train_batch_size=args.per_device_train_batch_size,
            learning_rate=args.learning_rate,
            weight_decay=args.weight_decay,
            max_steps=steps,
            lr_scheduler_type="cosine",
            batch_sampler="group_by_label",
            bf16=args.bf16,
            use_cpu=args.use_cpu,
            seed=args.seed,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
        ),
        train_dataset=table,
        loss=BatchHardTripletLoss(model),
        callbacks=[Times()],
    )
    trainer.train()
    model.eval()
    shipped = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}

    def embed(pixels):
        return model.encode([_picture(image) for image in pixels], convert_to_tensor=True, show_progress_bar=False)

    return embed, shipped, 0, times


def _picture(pixels):
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def _embedding(model, device):
    model.eval()
    return lambda pixels: model(pixels.to(device))


PEERS = {
    "st_lora_triplet": (train_sentence_transformers, {}),
    "pml_proxy_anchor_linear": (train_pml, {"loss": "proxy_anchor", "tune_backbone": False}),
    "pml_proxy_anchor_full": (train_pml, {"loss": "proxy_anchor", "tune_backbone": True}),
    "pml_multi_similarity_linear": (train_pml, {"loss": "multi_similarity", "tune_backbone": False}),
    "pml_multi_similarity_full": (train_pml, {"loss": "multi_similarity", "tune_backbone": True}),
}


@torch.inference_mode()
def score(embed, images, recall_at):
    """`retrieval_metrics` of a split, from what `embed` makes of its pixels."""
    rows = [list(range(i, min(i + EVALUATED_AT_ONCE, len(images)))) for i in range(0, len(images), EVALUATED_AT_ONCE)]
    pixels = (torch.stack([images[row]["pixel_values"] for row in part]) for part in rows)
    embeddings = nn.functional.normalize(torch.cat([embed(part).float().cpu() for part in pixels]))
    return retrieval_metrics(embeddings, torch.from_numpy(images.labels), recall_at=recall_at)


def main(argv=None):
    from safetensors.torch import save_file
    from transformers import set_seed

    peer, *arguments = sys.argv[1:] if argv is None else argv
    if peer not in PEERS:
        raise SystemExit(f"error: the peers are {', '.join(PEERS)}, got {peer!r}")
    try:
        model_fields, args, data_args = check(arguments)
        images = image_datasets(data_args)
        for note in fit_to_data(args, images, "retrieval"):  # batches are ours, where there are few classes too
            print(note, flush=True)
        normalisation = Normalisation.of(
            build_image_processor(data_args.image_size, data_args.resize_size, model_fields["backbone"])
        )
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    size = args.per_device_train_batch_size
    steps = (
        args.max_steps if args.max_steps > 0 else round(args.num_train_epochs * max(len(images["train"]) // size, 1))
    )
    set_seed(args.seed)
    train, options = PEERS[peer]
    embed, shipped, spare, times = train(model_fields, args, images["train"], normalisation, steps, **options)
    path = Path(args.output_dir) / "shipped.safetensors"
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in shipped.items()}, path)
    results = {
        "peer": peer,
        "seed": args.seed,
        "steps": len(times),
        "tuned_parameters": sum(tensor.numel() for tensor in shipped.values()),
        "training_only_parameters": spare,
        "shipped_megabytes": path.stat().st_size / 1e6,
        "median_step_seconds": statistics.median(after - before for before, after in pairwise(times)),
        **{f"final_{name}": value for name, value in score(embed, images["test"], args.recall_at).items()},
        "peak_memory_megabytes": peak_memory_megabytes(),
    }
    write_json(Path(args.output_dir) / "all_results.json", results)


if __name__ == "__main__":
    main()
