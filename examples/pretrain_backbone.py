"""Train a small vision transformer from scratch, as a classifier of a data set's training classes.

A stand-in where no pretrained backbone can be had. With access to the Hub, use a pretrained one instead.

    python examples/pretrain_backbone.py --dataset_name folder --data_dir path/to/folders --image_size 112 \\
        --hidden_size 192 --num_hidden_layers 6 --num_attention_heads 3 --output_dir runs/backbone

`output_dir` gets a `ViTModel` and its image processor, to be given as `backbone` to `train.py`.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import (
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from vptsp import (
    DataArguments,
    DataError,
    ImageDataset,
    SampleKey,
    build_image_processor,
    check_data_arguments,
    collate_images,
    make_transforms,
)
from vptsp.data_scripts.normalisation import Normalisation
from vptsp.files.atomic import write_json
from vptsp.files.locks import InUseError
from vptsp.training.output_folder import OutputFolderError, model_in, output_held, replaced_together
from vptsp.training.run_errors import CheckpointWriteError, TrainingError


METRICS_NAME = "pretraining.json"  # says that a model is one of this command's, which may be replaced


@dataclass
class PretrainingArguments:
    """Shape of the transformer and length of its training.

    Raises:
        ValueError: a number is out of range.
    """

    output_dir: str = field(metadata={"help": "Folder for the backbone."})
    hidden_size: int = field(default=192, metadata={"help": "Width."})
    num_hidden_layers: int = field(default=6, metadata={"help": "Layers."})
    num_attention_heads: int = field(default=3, metadata={"help": "Attention heads."})
    patch_size: int = field(default=16, metadata={"help": "Side of a patch in pixels."})
    num_train_epochs: float = field(default=30, metadata={"help": "Passes over the training images."})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Images per batch and device."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak rate of AdamW, with warm-up and cosine decay."})
    weight_decay: float = field(default=0.05, metadata={"help": "Of AdamW."})
    seed: int = field(default=0, metadata={"help": "Of weights, order and augmentation."})
    dataloader_num_workers: int = field(default=0, metadata={"help": "Processes that decode images."})
    use_cpu: bool = field(default=False, metadata={"help": "Leave accelerators alone."})
    bf16: bool = field(default=False, metadata={"help": "Mixed precision in bfloat16."})
    overwrite_output: bool = field(default=False, metadata={"help": "Replace a backbone that this command wrote."})

    def __post_init__(self):
        if not 0 < self.num_train_epochs < math.inf:
            raise ValueError(f"num_train_epochs must be > 0, got {self.num_train_epochs}")
        for name in ("learning_rate", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")


def check_output(folder, overwrite):
    """Refuse a folder with a model, unless it is one of this command's that may be replaced.

    Raises:
        OutputFolderError: the message says what is there.
    """
    found = model_in(folder)
    if found is None:
        return
    if not (Path(folder) / METRICS_NAME).is_file():
        raise OutputFolderError(f"output_dir {folder} holds another model ({found}): give another one")
    if not overwrite:
        raise OutputFolderError(
            f"output_dir {folder} holds an earlier backbone: give another one or --overwrite_output"
        )


class AugmentedImages(Dataset):
    """An `ImageDataset` whose augmentation draws from torch's generator, for any sampler."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[SampleKey(index, int(torch.randint(2**31, ())))]


def pretrain(args: PretrainingArguments, data_args: DataArguments) -> dict[str, float]:
    """Train and save the backbone; returns the Trainer's metrics.

    Raises:
        InUseError: another run uses `output_dir`.
        OutputFolderError: it holds a model.
        TrainingError: there was not a single step.
    """
    set_seed(args.seed)
    images = ImageDataset(data_args.load_splits()["train"], make_transforms(data_args)[0])
    config = ViTConfig(
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_hidden_layers,
        num_attention_heads=args.num_attention_heads,
        intermediate_size=4 * args.hidden_size,
        image_size=data_args.image_size,
        patch_size=args.patch_size,
        layer_norm_eps=1e-6,
        num_labels=images.num_classes,
    )
    normalise = Normalisation()

    def collate(examples):
        batch = collate_images(examples)
        return {**batch, "pixel_values": normalise(batch["pixel_values"])}

    training_args = TrainingArguments(
        output_dir=args.output_dir,
        num_train_epochs=args.num_train_epochs,
        per_device_train_batch_size=args.per_device_train_batch_size,
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        seed=args.seed,
        dataloader_num_workers=args.dataloader_num_workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=args.use_cpu,
        bf16=args.bf16,
        save_strategy="no",
        logging_strategy="epoch",
        remove_unused_columns=False,
    )
    model = ViTForImageClassification(config)
    with output_held(training_args):
        check_output(args.output_dir, args.overwrite_output)
        trainer = Trainer(
            model=model, args=training_args, train_dataset=AugmentedImages(images), data_collator=collate
        )
        outcome = trainer.train()
        if outcome.global_step == 0:
            raise TrainingError(f"training ended without a single step: {len(images)} images")
        with replaced_together(args.output_dir) as staged:
            model.vit.save_pretrained(staged)
            build_image_processor(data_args.image_size, data_args.resize_size).save_pretrained(staged)
            write_json(staged / METRICS_NAME, outcome.metrics)
    return outcome.metrics


def main(argv=None):
    """Entry point; exit status 2 and one line on stderr where data, numbers or folder can't be used."""
    parser = HfArgumentParser((PretrainingArguments, DataArguments), description=__doc__)
    try:
        args, data_args = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    except ValueError as error:
        parser.error(str(error))
    try:
        check_output(args.output_dir, args.overwrite_output)
        check_data_arguments(data_args)
        pretrain(args, data_args)
    except (DataError, OutputFolderError, InUseError, CheckpointWriteError, TrainingError) as error:
        print(f"examples/pretrain_backbone.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
