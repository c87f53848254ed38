"""From files to embeddings: `vptsp embed` and a plain loop over transformers, whole runs, each a process of its own.

    python benchmarks/embed_files.py --model facebook/dinov2-small --images photos --output embed_files.json
    python benchmarks/embed_files.py --model facebook/dinov2-small --images photos --limits 500 1000 2000 --ways ours

The plain loop is what one writes with transformers alone: open with PIL, `AutoImageProcessor`, `AutoModel` in
inference mode, batches of `--batch_size`, the class token. Both cut squares of `--image_size` pixels. Contenders take
turns; given are medians of the whole command, imports and loading included. Peak memory is that of all processes of a
command together (proportional set size, sampled), so that it can be seen whether it grows with the photos.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
from machine_report import write_report

from vptsp.data_scripts.image_files import list_images


WAYS = {
    "plain": ("plain", "float32"),
    "ours": ("ours", "float32"),
    "plain bfloat16": ("plain", "bfloat16"),
    "ours bfloat16": ("ours", "bfloat16"),
}
SAMPLE_SECONDS = 0.2


def plain(model_name, paths, image_size, batch_size, dtype, output):
    """The loop; writes the embeddings."""
    import numpy as np
    import torch
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModel

    processor = AutoImageProcessor.from_pretrained(model_name, backend="pil")
    model = AutoModel.from_pretrained(model_name, dtype=getattr(torch, dtype)).eval()
    cut = {
        "do_center_crop": True,
        "size": {"shortest_edge": round(image_size * 256 / 224)},
        "crop_size": {"height": image_size, "width": image_size},
    }
    found = []
    with torch.inference_mode():
        for start in range(0, len(paths), batch_size):
            images = [Image.open(path).convert("RGB") for path in paths[start : start + batch_size]]
            inputs = processor(images, return_tensors="pt", **cut)["pixel_values"].to(model.dtype)
            tokens = model(pixel_values=inputs).last_hidden_state[:, 0].float()
            found.append(torch.nn.functional.normalize(tokens, dim=-1).numpy())
    np.save(output, np.concatenate(found))


def command(way, model_name, listing, args, folder):
    """Words of one run."""
    kind, dtype = WAYS[way]
    options = ["--model", model_name, "--images", str(listing), "--image_size", str(args.image_size)]
    options += ["--batch_size", str(args.batch_size), "--output", str(folder / kind)]
    if kind == "plain":
        return [sys.executable, __file__, *options, "--plain", dtype]
    return [sys.executable, "-m", "vptsp.cli", "embed", *options, "--dtype", dtype, "--quiet"]


def run(words):
    """Seconds of a command, and the peak memory of all its processes in MB."""
    begin, peak, done = time.time(), 0, threading.Event()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, text=True)

        def watch():
            nonlocal peak
            while not done.wait(SAMPLE_SECONDS):
                peak = max(peak, memory_of(process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            process.wait()
        finally:
            done.set()
            watcher.join()
        seconds = time.time() - begin
        log.seek(0)
        text = log.read()
    if process.returncode:
        raise RuntimeError(f"{' '.join(words)} failed:\n{text[-2000:]}")
    return seconds, peak / 1e6


def memory_of(pid):
    """Bytes of a process and all below it; memory that they share counts once."""
    total = 0
    try:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for process in family:
        try:
            found = process.memory_full_info()
            total += getattr(found, "pss", found.rss)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total


def measure(model_name, paths, ways, args):
    """Rows of the table for so many photos."""
    seconds, memory = {way: [] for way in ways}, {way: [] for way in ways}
    for _ in range(args.rounds):
        for way in ways:
            with tempfile.TemporaryDirectory() as folder:
                listing = Path(folder) / "photos.txt"
                listing.write_text("".join(f"{path}\n" for path in paths), encoding="utf-8")
                took, peak = run(command(way, model_name, listing, args, Path(folder)))
            seconds[way].append(took)
            memory[way].append(peak)
    rows = []
    for way in ways:
        row = {"way": way, "photos": len(paths), "seconds": statistics.median(seconds[way])}
        row["photos/s"] = len(paths) / row["seconds"]
        if "plain" in ways:
            row["against plain"] = statistics.median(seconds["plain"]) / row["seconds"]
        rows.append(row | {"peak MB": max(memory[way])})
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="backbone: folder or Hub name")
    parser.add_argument("--images", type=Path, required=True, help="folder of photos")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--limits", type=int, nargs="+", help="numbers of photos; default: all")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--plain", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.plain:
        paths = args.images.read_text(encoding="utf-8").splitlines()
        plain(args.model, paths, args.image_size, args.batch_size, args.plain, args.output)
        return
    paths = [str((args.images / file.path).absolute()) for file in list_images(args.images)]
    rows = []
    for limit in args.limits or [len(paths)]:
        if limit > len(paths):
            parser.error(f"--limits: {args.images} has {len(paths)} photos, got {limit}")
        rows += measure(args.model, paths[:limit], args.ways, args)
    write_report(rows, "cpu", args.output)


if __name__ == "__main__":
    main()
