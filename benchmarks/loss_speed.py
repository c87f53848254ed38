"""Losses over many classes against one matrix product of images and proxies, forward and backward, in one run.

    python benchmarks/loss_speed.py --output loss_speed.json
    python benchmarks/loss_speed.py --classes 11318 --batch_size 128 --device cuda

The product is the least that comparing with all classes costs: `embeddings @ proxies.T` and its two gradients. Ours
is all that a step does beside the passes, without the optimiser: proxies of state and original proxies, similarities,
loss and gradients. `table` computes the same by the plain formula, with every similarity in one table. All take turns,
and medians are compared; on the CPU of the process's own time on one thread, so that other work does not count.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from machine_report import write_report

from vptsp.losses.other_classes import others_per_class, others_per_image
from vptsp.losses.proxy_losses import proxy_anchor_loss, proxy_nca_loss


SCALE = (32.0, 0.1)  # alpha and delta
BIAS_RATIO = 0.5
IMAGES_PER_CLASS = 2


class Inputs:
    """Embeddings `(B, E)` of class-major images, original proxies and proxy state `(C, E)`, classes of the batch."""

    def __init__(self, batch_size, num_classes, width, device):
        generator = torch.Generator().manual_seed(0)

        def draw(*shape):
            return F.normalize(torch.randn(*shape, generator=generator), dim=1).to(device)

        self.embeddings = draw(batch_size, width).requires_grad_()
        self.original = draw(num_classes, width).mul_(0.2).requires_grad_()
        self.state = draw(num_classes, width)
        self.classes = torch.randperm(num_classes, generator=generator)[: batch_size // IMAGES_PER_CLASS].to(device)
        self.targets = torch.arange(batch_size, device=device) // IMAGES_PER_CLASS
        self.weights = torch.randn(batch_size, num_classes, generator=generator).to(device)


def proxies(original, state):
    return F.normalize(torch.lerp(state, original, BIAS_RATIO), dim=1)


def product(inputs, loss):
    (inputs.embeddings @ inputs.original.T).backward(inputs.weights)


def table(inputs, loss):
    similarity = inputs.embeddings @ proxies(inputs.original, inputs.state).T
    targets = inputs.classes[inputs.targets]
    if loss == "proxy_nca":
        result = proxy_nca_loss(similarity, targets, *SCALE)
    else:
        result = proxy_anchor_loss(similarity, targets, *SCALE)
    result.backward()
    return result


def ours(inputs, loss):
    compare = others_per_image if loss == "proxy_nca" else others_per_class
    others, original = compare(inputs.embeddings, inputs.original, inputs.state, BIAS_RATIO, inputs.classes, *SCALE)
    similarity = inputs.embeddings @ proxies(original, inputs.state[inputs.classes]).T
    if loss == "proxy_nca":
        result = proxy_nca_loss(similarity, inputs.targets, *SCALE, others=others)
    else:
        num_others = len(inputs.original) - len(inputs.classes)
        result = proxy_anchor_loss(similarity, inputs.targets, *SCALE, others=(num_others, others))
    result.backward()
    return result


CONTENDERS = {"product": product, "ours": ours, "table": table}


def compare(loss, width, args):
    """A row of the table: median milliseconds of each, and the median of each round's ratios to the product."""
    inputs = Inputs(args.batch_size, args.classes, width, args.device)
    on_cpu = torch.device(args.device).type == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    seconds, losses = {name: [] for name in CONTENDERS}, {}
    for _ in range(args.rounds + 1):  # the first round warms up
        for name, run in CONTENDERS.items():
            inputs.embeddings.grad = inputs.original.grad = None
            start = clock()
            losses[name] = run(inputs, loss)
            if not on_cpu:
                torch.accelerator.synchronize()
            seconds[name].append(clock() - start)
    torch.testing.assert_close(losses["ours"], losses["table"])
    row = {"loss": loss, "classes": args.classes, "batch": args.batch_size, "width": width}
    row |= {f"{name} ms": 1e3 * statistics.median(times[1:]) for name, times in seconds.items()}
    for name in ("ours", "table"):
        pairs = zip(seconds[name][1:], seconds["product"][1:], strict=True)
        row[f"{name} / product"] = statistics.median(taken / least for taken, least in pairs)
    return row


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", nargs="+", choices=("proxy_anchor", "proxy_nca"))
    parser.add_argument("--classes", type=int, default=100_000)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--widths", type=int, nargs="+", default=[384, 512], help="of the embeddings")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.set_defaults(losses=["proxy_anchor", "proxy_nca"])
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = [compare(loss, width, args) for loss in args.losses for width in args.widths]
    write_report(rows, args.device, args.output)


if __name__ == "__main__":
    main()
