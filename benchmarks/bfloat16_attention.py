"""Attention in bfloat16 on a CPU: ours, products of blocks of images forward and backward, beside PyTorch's.

    OMP_NUM_THREADS=1 python benchmarks/bfloat16_attention.py --output attention.json

Contenders take turns in one process; given are medians of processor time, of all layers' one. Errors are relative ones
against float64, of the output and the largest of a gradient.
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from machine_report import write_report

from vptsp import backbones_vptsp


# Images, heads, tokens with prompts: DINOv2 ViT-S/14 at 112 pixels, and the published CUB and Cars settings
SHAPES = {"112 pixels, 10 prompts": (32, 6, 75), "cub_vits16": (64, 6, 207), "cars_vits16": (64, 6, 277)}
CONTENDERS = {
    "fused": lambda query, key, value: F.scaled_dot_product_attention(query, key, value, scale=0.125),
    "ours": lambda query, key, value: backbones_vptsp._BlockwiseAttention.apply(query, key, value, 0.125),
}


def measure(shape, rounds):
    """Row of one shape: milliseconds forward and backward of each contender, their ratio, and errors."""
    images, heads, tokens = shape
    torch.manual_seed(0)
    exact = [torch.randn(images, heads, tokens, 64, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    gradient = torch.randn(images, heads, tokens, 64, dtype=torch.float64)
    exact_output = CONTENDERS["fused"](*exact)
    expected = torch.autograd.grad(exact_output, exact, gradient)
    tensors, gradient = [x.detach().bfloat16().requires_grad_() for x in exact], gradient.bfloat16()
    times, errors = {name: ([], []) for name in CONTENDERS}, {}
    for _ in range(rounds + 1):  # the first warms up
        for name, attend in CONTENDERS.items():
            begin = time.process_time()
            output = attend(*tensors)
            middle = time.process_time()
            found = torch.autograd.grad(output, tensors, gradient)
            times[name][0].append(middle - begin)
            times[name][1].append(time.process_time() - middle)
            pairs = zip((output, *found), (exact_output, *expected), strict=True)
            first, *others = (((a.double() - b).norm() / b.norm()).item() for a, b in pairs)
            errors[name] = first, max(others)
    row = {}
    for name, (forward, backward) in times.items():
        row |= {f"{name} forward ms": 1e3 * statistics.median(forward[1:])}
        row |= {f"{name} backward ms": 1e3 * statistics.median(backward[1:])}
        row |= dict(zip((f"{name} output error", f"{name} gradient error"), errors[name], strict=True))
    return row | {f"{way} ratio": row[f"fused {way} ms"] / row[f"ours {way} ms"] for way in ("forward", "backward")}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", help="JSON file for the figures")
    args = parser.parse_args(argv)
    rows = [{"shape": name, **measure(shape, args.rounds)} for name, shape in SHAPES.items()]
    write_report(rows, "cpu", args.output, multiplies_bfloat16=backbones_vptsp._MULTIPLIES_BFLOAT16)


if __name__ == "__main__":
    main()
