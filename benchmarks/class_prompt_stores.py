"""What a training step costs by number of classes, with class prompts in both stores.

    python benchmarks/class_prompt_stores.py --output class_prompts.json
    python benchmarks/class_prompt_stores.py --vit small --classes 100 10000 --batch_size 32 --folder /fast/disk

Every step is a whole one, optimisers included, on random images of random classes, and is timed in three parts: the
`passes` (both passes forward and backward, their optimiser), the `rows` (reading the batch's class prompts, updating
them: what the store is answerable for), and what has to grow with C whatever the store is, the `proxies` (comparing
with all of them, forward and backward, their optimiser). All models are alive at once and take turns; medians are
compared. On the CPU, the time is the process's own on one thread, so that other work does not count.

With `--folder`, the table is in memory-mapped files too, and the time is taken for which `forward` waits for rows that
are not in memory, with and without prefetching (Linux).
"""

import argparse
import ctypes
import math
import statistics
import time
from pathlib import Path

import torch
from machine_report import write_report
from transformers import ViTConfig

from vptsp import VPTSPConfig, VPTSPForMetricLearning


VITS = {
    "tiny": {
        "hidden_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "intermediate_size": 768,
        "image_size": 64,
    },
    "small": {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536},
}
IMAGES_PER_CLASS = 2
MADV_PAGEOUT = 21


class Run:
    """One model with its optimisers, and the parts' times of every step."""

    def __init__(self, args, num_classes, store):
        torch.manual_seed(0)
        config = VPTSPConfig(
            backbone_config=ViTConfig(**VITS[args.vit]),
            num_classes=num_classes,
            num_class_prompts=args.num_class_prompts,
            class_prompt_store=store,
        )
        self.model = VPTSPForMetricLearning(config).to(args.device).train()
        self.clock = time.process_time if args.device == "cpu" else _synchronised
        self.num_classes, self.store, self.batch_size = num_classes, store, args.batch_size
        proxies = self.model.proxies.original_proxies
        table = [] if store == "offloaded" else [self.model.class_prompts.tokens]
        apart = {id(tensor) for tensor in (proxies, *table)}
        others = [p for p in self.model.parameters() if p.requires_grad and id(p) not in apart]
        make = {
            "adamw": lambda p, lr: torch.optim.AdamW(p, lr, fused=True),
            "sgd": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, fused=True),
        }[args.optim]
        self.optimizers = {"passes": make(others, lr=1e-4), "proxies": make([proxies], lr=1e-2)}
        if table:
            self.optimizers["rows"] = make(table, lr=1e-4)
        self.peak, self.steps = 0, []
        self._time_calls()

    def _time_calls(self):
        """Note when rows are read, and when what comes after the passes begins (forward) and ends (backward)."""
        read, new_rows = self.model.class_prompts.forward, self.model.proxies.new_rows

        def timed_read(classes):
            start = self.clock()
            tokens = read(classes)
            self.reading = self.clock() - start
            return tokens

        def marked_new_rows(vectors, groups):
            rows = new_rows(vectors, groups)
            rows.register_hook(lambda gradient: self._mark_backward())
            self.after_passes = self.clock()
            return rows

        self.model.class_prompts.forward = timed_read
        self.model.proxies.new_rows = marked_new_rows

    def _mark_backward(self):
        self.into_passes = self.clock()

    def step(self):
        """One training step; appends the seconds of its parts."""
        device = self.model.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        images = torch.randn(self.batch_size, 3, *[self.model.config.backbone_config.image_size] * 2).to(device)
        classes = torch.randperm(self.num_classes)[: self.batch_size // IMAGES_PER_CLASS]
        labels = classes.repeat_interleave(IMAGES_PER_CLASS).to(device)

        start = self.clock()
        output = self.model(images, labels, images_per_class=IMAGES_PER_CLASS)
        output.loss.backward()
        after_backward = self.clock()
        parts = {"rows": self.reading, "proxies": self.into_passes - self.after_passes}
        parts["passes"] = after_backward - start - sum(parts.values())
        for name, optimizer in self.optimizers.items():
            parts[name] += self._timed(optimizer.step)
            optimizer.zero_grad()
        if self.store == "offloaded":
            parts["rows"] += self._timed(lambda: self.model.class_prompts.step(self.optimizers["passes"]))
        parts["proxies"] += self._timed(lambda: self.model.commit_proxies(output))
        self.steps.append(parts)
        if device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated()

    def _timed(self, function):
        start = self.clock()
        function()
        return self.clock() - start

    def result(self):
        """A row of the table: median milliseconds of the parts, and what is held for class prompts."""
        steps = self.steps[1:]  # the first makes optimiser states
        row = {"classes": self.num_classes, "store": self.store}
        row |= {f"{name} ms": 1e3 * statistics.median(step[name] for step in steps) for name in steps[0]}
        row["without proxies ms"] = 1e3 * statistics.median(step["passes"] + step["rows"] for step in steps)
        prompts = self.model.class_prompts
        if self.store == "offloaded":
            held = [prompts.tokens, *prompts.states.values()]
            row["host MiB"] = sum(tensor.untyped_storage().nbytes() for tensor in held) / 2**20
            large_states = [state for name, state in prompts.states.items() if name != "step"]
            row["formula MiB"] = prompts.num_bytes(len(large_states)) / 2**20
            rows = self.batch_size // IMAGES_PER_CLASS
            row["device MiB"] = 2 * 4 * rows * math.prod(prompts.shape[1:]) / 2**20  # rows and their gradients
        else:
            states = [state for state in self.optimizers["rows"].state[prompts.tokens].values() if state.dim()]
            row["host MiB"] = row["formula MiB"] = 0.0
            row["device MiB"] = sum(t.nbytes for t in (prompts.tokens, prompts.tokens, *states)) / 2**20
        row["peak device MiB"] = self.peak / 2**20 if self.peak else None
        return row


def _synchronised():
    torch.cuda.synchronize()
    return time.perf_counter()


def measure_waiting(args, rounds):
    """Milliseconds that `forward` waits for rows of a table of which nothing is in memory, by way of reading."""
    run = Run(args, max(args.classes), "offloaded")
    store = run.model.class_prompts
    store.place(args.folder)
    libc = ctypes.CDLL(None, use_errno=True)
    waiting = {"prefetched": [], "not prefetched": []}
    for number in range(2 * rounds):
        way = list(waiting)[number % 2]
        if libc.madvise(ctypes.c_void_p(store.tokens.data_ptr()), ctypes.c_size_t(store.tokens.nbytes), MADV_PAGEOUT):
            raise OSError(ctypes.get_errno(), "the table can't be paged out: --folder needs Linux 5.4 or newer")
        classes = torch.randperm(run.num_classes)[: run.batch_size // IMAGES_PER_CLASS]
        if way == "prefetched":
            store.prefetch(classes.clone())
        images = torch.randn(run.batch_size, 3, *[run.model.config.backbone_config.image_size] * 2)
        with torch.no_grad():  # what the reading is behind: less than a whole step
            run.model(images.to(args.device))
            start = time.perf_counter()
            store(classes.to(args.device))
        waiting[way].append(1e3 * (time.perf_counter() - start))
    return {way: statistics.median(times[1:]) for way, times in waiting.items()}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, nargs="+", default=[100, 1000, 10_000, 100_000])
    parser.add_argument("--dense_up_to", type=int, default=10_000, help="classes up to which the dense store runs too")
    parser.add_argument("--vit", choices=VITS, default="tiny")
    parser.add_argument("--num_class_prompts", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--optim", choices=("adamw", "sgd"), default="adamw")
    parser.add_argument("--rounds", type=int, default=15, help="steps of which medians are taken")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--folder", type=Path, help="folder on a disk, to measure memory-mapped files too")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    runs = [Run(args, number, "offloaded") for number in args.classes]
    runs += [Run(args, number, "dense") for number in args.classes if number <= args.dense_up_to]
    for _ in range(args.rounds + 1):  # the first round warms up
        for run in runs:
            run.step()
    rows = [run.result() for run in runs]
    ratios = {}
    for store in ("offloaded", "dense"):
        times = [row["without proxies ms"] for row in rows if row["store"] == store]
        if len(times) > 1:
            ratios[store] = times[-1] / times[0]
    waiting = {} if args.folder is None else measure_waiting(args, args.rounds)
    write_report(rows, args.device, args.output, ratio=ratios, waiting=waiting)
    for store, ratio in ratios.items():
        print(f"{store}: most classes / fewest, without proxies: {ratio:.3f}")
    for way, milliseconds in waiting.items():
        print(f"waiting for rows that are not in memory, {way}: {milliseconds:.2f} ms")


if __name__ == "__main__":
    main()
