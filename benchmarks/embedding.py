"""Embedding images: this project against transformers' own models and the naive prompted ViT.

    python benchmarks/embedding.py --output embedding.json
    python benchmarks/embedding.py --device cuda --dtype bfloat16 --batch_sizes 64 256
    python benchmarks/embedding.py --families all --num_prompts 0 10 --batch_sizes 16 --process_time

Contenders take turns in one process; given are medians, as images per second. `kept prompts` is ours with the keys and
values of the prompts computed before. The bare `ViTModel` has no prompts and no head: it is what one would embed with
before tuning.

With `--families`, ours is compared with transformers' own model of each family, in the size of ViT-S (random weights):
frozen, that is with the pooling alone, which gives the same numbers, and with prompts and head. `lowest` and `highest`
are those of all turns; `layout alone` is what ours would be with the matrix products of `torch.nn.functional.linear`.
Peak memory is that of a process of each contender's own, above what imports take.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import naive
import torch
from machine_report import peak_host_megabytes, write_report
from step import SIZES, seconds
from transformers import CONFIG_MAPPING, ViTConfig, ViTModel

from vptsp import VPTSPConfig, VPTSPModel, backbones_vptsp
from vptsp.backbones_vptsp import linear_products


LINEAR = linear_products.library
# What is not of every family's configuration: SIZES["s"] with 12 layers, patches of 16 pixels, images of 224.
DINOV2 = {"patch_size": 14, "mlp_ratio": 4}
FAMILY_FIELDS = {
    "dinov2": DINOV2,
    "dinov2_with_registers": DINOV2,
    "dinov3_vit": {"num_register_tokens": 4},
    "siglip2_vision_model": {"num_patches": 196},
}


def all_families():
    """Model types that this release of transformers has, without second names of the same model."""
    known = [name for name in backbones_vptsp.FAMILIES if name in CONFIG_MAPPING]
    return list({CONFIG_MAPPING[name]: name for name in reversed(known)}.values())[::-1]


def family_config(family):
    """Configuration of a backbone of a family in the size of ViT-S, for images of 224 pixels."""
    fields = {
        "image_size": 224,
        "patch_size": 16,
        "num_hidden_layers": 12,
        **SIZES["s"],
        **FAMILY_FIELDS.get(family, {}),
    }
    if family == "siglip2_vision_model":
        del fields["image_size"]
    return CONFIG_MAPPING[family](**fields)


def stock_inputs(config, pixels):
    """What transformers' own model takes for images, as its image processor gives it."""
    if config.model_type != "siglip2_vision_model":
        return {"pixel_values": pixels}
    side = config.patch_size
    patches = pixels.unflatten(3, (-1, side)).unflatten(2, (-1, side))
    shape = [patches.shape[2], patches.shape[4]]
    patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    mask = torch.ones(patches.shape[:2], dtype=torch.int32, device=pixels.device)
    shapes = torch.tensor([shape] * len(pixels))
    return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}


def stock_features(model, output):
    """The frozen features that transformers' own model gives, `(B, D)`."""
    if output.get("pooler_output") is not None:
        return output.pooler_output
    tokens = model.family.num_class_tokens
    return (output.last_hidden_state[:, :tokens] if tokens else output.last_hidden_state).mean(1)


def make_family_contenders(family, num_prompts, pixels, args):
    """Name -> function without arguments."""
    dtype = getattr(torch, args.dtype)
    config = VPTSPConfig(backbone_config=family_config(family), num_prompts=num_prompts, embedding_dim=384)
    model = VPTSPModel(config).to(args.device, dtype).eval()
    inputs = stock_inputs(config.backbone_config, pixels)

    def ours(library):
        linear_products.library = library
        return model(pixels).embeddings if num_prompts else model.embed_with_backbone(pixels)

    return {
        "ours": lambda: ours(LINEAR),
        "transformers": lambda: stock_features(model, model.backbone(**inputs)),
        "blas": lambda: ours("torch"),
    }


def compare_families(family, num_prompts, batch_size, args):
    """A row of the table."""
    pixels = torch.randn(batch_size, 3, 224, 224, device=args.device, dtype=getattr(torch, args.dtype))
    times = take_turns(make_family_contenders(family, num_prompts, pixels, args), args)
    ratios = [theirs / mine for theirs, mine in zip(times["transformers"], times["ours"], strict=True)]
    row = {"family": family, "prompts": num_prompts, "batch": batch_size}
    row |= {f"{name} images/s": batch_size / statistics.median(times[name]) for name in ("ours", "transformers")}
    row |= {"ours / transformers": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}
    alone = [theirs / mine for theirs, mine in zip(times["transformers"], times["blas"], strict=True)]
    row["layout alone"] = statistics.median(alone)
    if args.memory:
        for name in ("ours", "transformers"):
            row[f"{name} MB"] = peak_megabytes(name, family, num_prompts, batch_size, args)
    return row


def peak_megabytes(name, family, num_prompts, batch_size, args):
    """Peak memory of a contender in a process of its own; of the device, or above what imports take."""
    command = [sys.executable, __file__, "--memory_of", name, "--families", family, "--device", args.device]
    command += ["--num_prompts", str(num_prompts), "--batch_sizes", str(batch_size), "--dtype", args.dtype]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


@torch.inference_mode()
def print_memory(args):
    before = peak_host_megabytes()
    pixels = torch.randn(args.batch_sizes[0], 3, 224, 224, device=args.device, dtype=getattr(torch, args.dtype))
    embed = make_family_contenders(args.families[0], args.num_prompts[0], pixels, args)[args.memory_of]
    embed()
    embed()
    peak = peak_host_megabytes() - before if args.device == "cpu" else torch.cuda.max_memory_allocated() / 1e6
    print(peak)


def make_contenders(size, num_prompts, pixels, args):
    """Name -> function without arguments."""
    vit, dtype = ViTConfig(**SIZES[size]), getattr(torch, args.dtype)
    bare = ViTModel(vit, add_pooling_layer=False).to(args.device, dtype).eval()
    config = VPTSPConfig(backbone_config=vit, num_prompts=num_prompts, embedding_dim=384)
    ours = VPTSPModel(config).to(args.device, dtype).eval()
    forward = torch.compile(ours) if args.compile else ours
    kept = ours.project_prompts()
    return {
        "ours": lambda: forward(pixels).embeddings,
        "kept prompts": lambda: forward(pixels, prompt_key_values=kept).embeddings,
        "naive": lambda: ours.head(naive.encode(ours, pixels, ours.prompts())),
        "bare ViTModel": lambda: bare(pixels).last_hidden_state[:, 0],
    }


def compare(size, num_prompts, batch_size, args):
    """A row of the table."""
    pixels = torch.randn(batch_size, 3, 224, 224, device=args.device, dtype=getattr(torch, args.dtype))
    times = take_turns(make_contenders(size, num_prompts, pixels, args), args)
    row = {"backbone": f"ViT-{size.upper()}/16", "prompts": num_prompts, "batch": batch_size}
    row |= {f"{name} images/s": batch_size / statistics.median(values) for name, values in times.items()}
    for name in ("kept prompts", "naive", "bare ViTModel"):
        ratios = [theirs / mine for theirs, mine in zip(times[name], times["ours"], strict=True)]
        row[f"ours / {name}"] = statistics.median(ratios)
    return row


def take_turns(contenders, args):
    """Name -> seconds of each turn."""
    clock = time.process_time if args.process_time else time.perf_counter
    times = {name: [] for name in contenders}
    for turn in range(args.warmup + args.rounds):
        for name, embed in contenders.items():
            elapsed = seconds(embed, args.device, clock)
            if turn >= args.warmup:
                times[name].append(elapsed)
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["s", "b"], choices=SIZES)
    families = ["all", *backbones_vptsp.FAMILIES]
    parser.add_argument("--families", nargs="+", default=[], choices=families, help="instead of sizes of ViT")
    parser.add_argument("--num_prompts", nargs="+", type=int, default=[10, 90], help="with --families, 0: frozen")
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--compile", action="store_true", help="ours through torch.compile; not with --families")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--process_time", action="store_true", help="processor time of one thread; for a busy machine")
    parser.add_argument("--no_memory", dest="memory", action="store_false", help="skip the memory of each contender")
    parser.add_argument("--memory_of", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()
    if args.process_time:
        torch.set_num_threads(1)  # several wait for each other by running
    torch.manual_seed(0)
    if args.memory_of:
        print_memory(args)
        return
    if args.families and args.compile:
        parser.error("--compile is not for --families")
    if "all" in args.families:
        args.families = all_families()
    run, names = (compare_families, args.families) if args.families else (compare, args.sizes)
    with torch.inference_mode():
        rows = [
            run(name, num_prompts, batch_size, args)
            for name in names
            for num_prompts in args.num_prompts
            for batch_size in args.batch_sizes
        ]
    write_report(rows, args.device, args.output)


if __name__ == "__main__":
    main()
