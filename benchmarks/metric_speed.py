"""Retrieval metrics against one blocked pass of products and top-k, and against pytorch-metric-learning, in one run.

    python benchmarks/metric_speed.py --output metrics.json
    python benchmarks/metric_speed.py --items 60000 --rounds 1 --accuracy_calculator_items 20000
    python benchmarks/metric_speed.py --items 60000 --device cuda

The pass is what any exact evaluation by whole rows computes: for blocks of queries, the similarities into memory that
is used again, and the best of each row (as many as the largest class asks for). The contenders take
turns, and medians of the rounds are compared. On the CPU, processor time is measured, so that other work on the
machine counts for little. Memory is what one call adds to that of a process of its own, at its peak. The data are
clusters, without ties:

    own       items that search one another, 5 of each class
    mixed     the same with 2 to 1,001 items of a class (R from 1 to 1,000), as many classes of each order of magnitude
    gallery   the first half of the items of `own`, shuffled, searches the second

`AccuracyCalculator` (with exact faiss search, on fewer items) must give the same Recall@1, R-precision and MAP@R to
1e-6, or the run fails.
"""

import argparse
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch

from vptsp.eval.metrics import count_relevant, retrieval_metrics
from vptsp.files.atomic import write_json


CASES = ("own", "mixed", "gallery")
BLOCK_SIZE = 256  # queries of the pass; about what `retrieval_metrics` takes at a time of a gallery of 60,000 items
RECALL_AT = (1, 2, 4, 8)


def make_sets(case, items, width, device):
    """Embeddings and labels of the queries, and of the gallery where there is one."""
    generator = torch.Generator().manual_seed(0)
    if case == "mixed":
        sizes = []
        while sum(sizes) < items:
            sizes.append(1 + round(1000 ** torch.rand((), generator=generator).item()))
        labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))[:items]
    else:
        labels = torch.arange(items) // 5
    labels = labels[torch.randperm(items, generator=generator)]
    centres = torch.randn(int(labels.max()) + 1, width, generator=generator)
    embeddings = torch.randn(items, width, generator=generator)
    for rows in torch.arange(items).split(4096):  # in place: the peak of memory must not lie here
        embeddings[rows] = torch.nn.functional.normalize(2 * embeddings[rows] + centres[labels[rows]], dim=1)
    embeddings, labels = embeddings.to(device), labels.to(device)
    half = items // 2
    if case == "gallery":
        return embeddings[:half], labels[:half], embeddings[half:], labels[half:]
    return embeddings, labels


def blocked_pass(queries, query_labels, gallery=None, gallery_labels=None):
    """Similarities and top-k of every query, and nothing else."""
    deepest = max(int(count_relevant(query_labels, gallery_labels).max()) + 1, *RECALL_AT)
    gallery = queries if gallery is None else gallery
    buffer = torch.empty(BLOCK_SIZE, len(gallery), device=queries.device)
    for block in queries.split(BLOCK_SIZE):
        torch.mm(block, gallery.T, out=buffer[: len(block)]).topk(min(deepest, len(gallery)), dim=1)


def our_metrics(*sets):
    return retrieval_metrics(*sets, recall_at=RECALL_AT)


def accuracy_calculator(*sets):
    """The same three scores by pytorch-metric-learning."""
    import faiss
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    from pytorch_metric_learning.utils.inference import FaissKNN

    calculator = AccuracyCalculator(
        include=("precision_at_1", "r_precision", "mean_average_precision_at_r"),
        k="max_bin_count",
        device=sets[0].device,
        knn_func=FaissKNN(index_init_fn=faiss.IndexFlatIP),
    )
    return calculator.get_accuracy(*sets)


CONTENDERS = {"pass": blocked_pass, "vptsp": our_metrics, "accuracy_calculator": accuracy_calculator}


def seconds_of(function, sets):
    """Seconds of one call (of the processor, or on the clock where an accelerator works), and what it returned."""
    on_cpu = sets[0].device.type == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    start = clock()
    result = function(*sets)
    if not on_cpu:
        torch.accelerator.synchronize()
    return clock() - start, result


def extra_megabytes(name, sets):
    """By how much one call raises the peak of memory, of the accelerator or of this fresh process."""
    if sets[0].device.type == "cuda":
        before = torch.cuda.memory_allocated()
        CONTENDERS[name](*sets)
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    CONTENDERS[name](*(part[:500] for part in sets))  # loads and starts what is needed
    before = psutil.Process().memory_info().rss
    CONTENDERS[name](*sets)
    unit = 1 if sys.platform == "darwin" else 1024  # of the peak
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before) / 1e6


def memory_in_child(name, case, items, args):
    """[`extra_megabytes`] in a process of its own."""
    words = ["--memory_of", name, case, str(items), "--width", str(args.width), "--device", args.device]
    command = [sys.executable, __file__, *words, "--threads", str(args.threads)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def compare(case, items, against, megabytes, args):
    """Times and values of `vptsp` and one other contender on one case, and the megabytes measured before."""
    sets = make_sets(case, items, args.width, args.device)
    seconds, results = {"vptsp": [], against: []}, {}
    for number in range(args.rounds + 1):  # the first round warms up, on a part
        for name, times in seconds.items():
            taken, results[name] = seconds_of(CONTENDERS[name], sets if number else [part[:500] for part in sets])
            if number:
                times.append(taken)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    row = {
        "case": case,
        "items": items,
        "against": against,
        "seconds": medians["vptsp"],
        "seconds_against": medians[against],
        "ratio": medians["vptsp"] / medians[against],
        "extra_megabytes": megabytes["vptsp"],
        "extra_megabytes_against": megabytes[against],
        "metrics": results["vptsp"],
    }
    if against == "accuracy_calculator":
        row["largest_difference"] = largest_difference(results["vptsp"], results[against])
        if row["largest_difference"] > 1e-6:
            raise SystemExit(f"{case}: expected equal values, got {results['vptsp']} and {results[against]}")
    return row


def largest_difference(ours, theirs):
    names = {"recall_at_1": "precision_at_1", "r_precision": "r_precision", "map_at_r": "mean_average_precision_at_r"}
    return max(abs(ours[name] - theirs[other]) for name, other in names.items())


def print_row(row):
    sizes = f"{row['case']:<8} {row['items']:>7,}  {row['against']:<20}"
    seconds = f"{row['seconds']:>8.2f} {row['seconds_against']:>8.2f}  {row['ratio']:>5.2f}"
    memory = f"{row['extra_megabytes']:>6.0f} {row['extra_megabytes_against']:>6.0f} MB"
    equal = f", values equal to {row['largest_difference']:.0e}" if "largest_difference" in row else ""
    print(f"{sizes} {seconds}  {memory}{equal}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--items", type=int, default=20000, help="of each case")
    parser.add_argument("--accuracy_calculator_items", type=int, default=10000, help="0 leaves this comparison out")
    parser.add_argument("--width", type=int, default=512, help="of the embeddings")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--memory_of", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        name, case, items = args.memory_of
        print(extra_megabytes(name, make_sets(case, int(items), args.width, args.device)))
        return

    print(f"{'case':<8} {'items':>7}  {'against':<20} {'vptsp s':>8} {'other s':>8}  ratio  extra memory, theirs")
    cases = [("pass", case, args.items) for case in args.cases]
    cases += [("accuracy_calculator", case, args.accuracy_calculator_items) for case in args.cases]
    cases = [(against, case, items) for against, case, items in cases if items]
    # Memory first: a new process is born with its parent's peak, which must not hold embeddings yet.
    megabytes = [
        {name: memory_in_child(name, case, items, args) for name in ("vptsp", against)}
        for against, case, items in cases
    ]
    rows = []
    for (against, case, items), measured in zip(cases, megabytes, strict=True):
        rows.append(compare(case, items, against, measured, args))
        print_row(rows[-1])
    if args.output:
        settings = {"torch": torch.__version__, "python": platform.python_version(), **vars(args)}
        report = {"settings": {name: str(value) for name, value in settings.items()}, "rows": rows}
        write_json(args.output, report)


if __name__ == "__main__":
    main()
