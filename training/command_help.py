"""What `train.py --help` and `--help-all` print.

The first is a text, since the classes whose fields are the options take PyTorch and transformers, and so seconds, to
import; the tests compare its options and defaults with these classes. The second is made of them.
"""

from __future__ import annotations

import re
import shutil
import textwrap
from dataclasses import MISSING


USAGE = "%(prog)s [CONFIG.yaml or PRESET] [--OPTION VALUE ...]"

HELP = """\
usage: {usage}

Tune prompts for image retrieval on a frozen vision transformer. Options win over the file; defaults are in brackets.

data
  --dataset_name NAME               folder, table, imagefolder, saved, hub, digits or a benchmark [folder]
  --data_dir PLACE                  folder of the data set, its table, or a benchmark's archive
  --label_column NAME               of a table; --image_column and --split_column likewise
  --train_classes NAME ...          classes that train, or a .txt file of them
  --test_classes NAME ...           classes that test, likewise
  --test_share SHARE                of the classes that test, where nothing says which; 0: all train [0.5]
  --class_split HOW                 first, alternate, random, or seen: all train, asked by other images [first]
  --labels none                     training images have no labels; or partial: some cells are empty [given]
  --clusters N                      that take the place of classes then; by default found by the silhouette
  --streaming true                  read the data as a stream, write no tables
  --skip_corrupt true               leave out images that can't be read, and list them
  --image_size PIXELS               side of what the model sees [224]
model
  --backbone NAME                   vision transformer, from the Hub or a folder
  --num_prompts N                   prompt tokens of the first layer [10]
  --embedding_dim N                 width of the embeddings [384]
  --bitfit false                    leave the backbone's biases as they are
  --adapter_layers N                last layers with an adapter [0]
  --lora_rank N                     of LoRA matrices beside the backbone's linear layers [0]
  --tune_backbone true              tune all of it
  --save_backbone true              save it along, so that the retriever needs no other repository
proxies and loss
  --proxy_update HOW                of semantic proxies: gru_relu, gru, mean or none [gru_relu]
  --num_class_prompts N             prompt tokens that each class has of its own [3]
  --class_prompt_store WHERE        dense, offloaded or auto [auto]
  --loss NAME                       proxy_anchor, proxy_nca, recall_at_k, hyperbolic, pml.NAME [proxy_anchor]
training
  --num_train_epochs N              passes over the training images [3.0]
  --per_device_train_batch_size N   images in a batch, in short batch_size [64]
  --images_per_class K              images of each class in it [2]
  --learning_rate X                 [0.0005]
  --proxy_learning_rate X           of the original proxies [0.01]
  --optim NAME                      optimiser [adamw_torch_fused]
  --weight_decay X                  [0.0]
  --dtype auto                      compute in bfloat16 where the device is fast at it; or float32, bfloat16, float16
  --dataloader_num_workers N        processes that read images, in short num_workers [0]
  --seed N                          [42]
results
  --output_dir FOLDER               retriever, scores, model card, pictures, checkpoints [runs/vptsp]
  --resume_from_checkpoint true     go on with the run that is there
  --overwrite_output true           replace the run that is there
  --final_metrics all               what the last evaluation computes: retrieval or all [all]
  --picture_queries N               queries in the pictures of neighbours, 0: no pictures [8]
  --push_to_hub true                upload retriever, scores and card, as --hub_model_id

--help-all lists the others.
"""


def help_text(prog) -> str:
    """The page of `--help`; `prog` is what was typed: `train.py` or `vptsp train`."""
    return HELP.replace("{usage}", USAGE % {"prog": prog})


def options_text(prog, groups, kinds) -> str:
    """The page of `--help-all`.

    Args:
        prog: What was typed.
        groups: Title -> fields of dataclasses, with `help` in their metadata.
        kinds: Name -> annotation of every field.
    """
    width = min(shutil.get_terminal_size().columns, 110)
    lines = ["usage: " + USAGE % {"prog": prog}]
    for title, items in groups.items():
        lines += ["", f"{title}:"]
        for item in items:
            kind = kinds[item.name]
            kind = re.sub(r"\b\w+\.", "", getattr(kind, "__name__", str(kind)))
            default = item.default if item.default_factory is MISSING else item.default_factory()
            text = " ".join(item.metadata.get("help", "").replace("%%", "%").split())
            text = f"{text} ({kind}; default: {getattr(default, 'value', default)})".strip()
            lines.append(f"  --{item.name}")
            lines += textwrap.wrap(text, width, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join(lines) + "\n"


__all__ = ["HELP", "USAGE", "help_text", "options_text"]
