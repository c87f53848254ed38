"""Embedding images: this project against a bare `ViTModel` and the naive prompted ViT.

    python benchmarks/embedding.py --output embedding.json
    python benchmarks/embedding.py --device cuda --dtype bfloat16 --batch_sizes 64 256

Contenders take turns in one process; given are medians, as images per second. `kept prompts` is ours with the keys and
values of the prompts computed before. The bare `ViTModel` has no prompts and
no head: it is what one would embed with before tuning.
"""

import argparse
import statistics
import time
from pathlib import Path

import naive
import torch
from machine_report import write_report
from step import SIZES, seconds
from transformers import ViTConfig, ViTModel

from vptsp import VPTSPConfig, VPTSPModel


def make_contenders(size, num_prompts, args):
    """Name -> function of pixels."""
    vit, dtype = ViTConfig(**SIZES[size]), getattr(torch, args.dtype)
    bare = ViTModel(vit, add_pooling_layer=False).to(args.device, dtype).eval()
    config = VPTSPConfig(backbone_config=vit, num_prompts=num_prompts, embedding_dim=384)
    ours = VPTSPModel(config).to(args.device, dtype).eval()
    forward = torch.compile(ours) if args.compile else ours
    with torch.inference_mode():
        kept = ours.project_prompts()
    return {
        "ours": lambda pixels: forward(pixels).embeddings,
        "kept prompts": lambda pixels: forward(pixels, prompt_key_values=kept).embeddings,
        "naive": lambda pixels: ours.head(naive.encode(ours, pixels, ours.prompts())),
        "bare ViTModel": lambda pixels: bare(pixels).last_hidden_state[:, 0],
    }


@torch.inference_mode()
def compare(size, num_prompts, batch_size, args):
    """A row of the table."""
    contenders = make_contenders(size, num_prompts, args)
    pixels = torch.randn(batch_size, 3, 224, 224, device=args.device, dtype=getattr(torch, args.dtype))
    clock = time.process_time if args.process_time else time.perf_counter
    times = {name: [] for name in contenders}
    for turn in range(args.warmup + args.rounds):
        for name, embed in contenders.items():
            elapsed = seconds(lambda embed=embed: embed(pixels), args.device, clock)
            if turn >= args.warmup:
                times[name].append(elapsed)
    row = {"backbone": f"ViT-{size.upper()}/16", "prompts": num_prompts, "batch": batch_size}
    row |= {f"{name} images/s": batch_size / statistics.median(values) for name, values in times.items()}
    for name in ("kept prompts", "naive", "bare ViTModel"):
        ratios = [theirs / mine for theirs, mine in zip(times[name], times["ours"], strict=True)]
        row[f"ours / {name}"] = statistics.median(ratios)
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["s", "b"], choices=SIZES)
    parser.add_argument("--num_prompts", nargs="+", type=int, default=[10, 90])
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--compile", action="store_true", help="ours through torch.compile")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--process_time", action="store_true", help="processor time; for one thread on a busy machine")
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = [
        compare(size, num_prompts, batch_size, args)
        for size in args.sizes
        for num_prompts in args.num_prompts
        for batch_size in args.batch_sizes
    ]
    write_report(rows, args.device, args.output)


if __name__ == "__main__":
    main()
