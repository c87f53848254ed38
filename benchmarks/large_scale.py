"""What millions of images take: sizes and speeds of this machine, and a plan computed from them.

    python benchmarks/large_scale.py measure --model facebook/dinov2-small --photos photos --output measured.json
    python benchmarks/large_scale.py plan --measured measured.json --num_images 10000000 1000000000 --workers 64

`measure` takes processor time of one thread, which does not change with what else a machine does; with `--device cuda`
that of the clock, with decoders beside (`--num_workers`). `plan` multiplies; prices are yours to give, without which
it says how much there is to pay for.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from machine_report import environment, table

from vptsp import Embedder, RetrievalIndex, choose_factory, embed_to_store, folder_source
from vptsp.files.atomic import write_json


FACTORIES = ("IVF128,Flat", "HNSW32", "OPQ64,IVF128,PQ64")
HOUR = 3600
# What holds the paths of some images, in a process of its own: its peak above that of none
_LISTING = """
import sys, numpy as np
from pathlib import Path
from vptsp.search.image_sources import ImageSource, StoredFiles
def megabytes():
    return int(next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM")).split()[1])
before, count = megabytes(), int(sys.argv[1])
paths = [f"class {row // 100:07d}/photo {row:010d}.jpg" for row in range(count)]
labels = np.ma.array(np.arange(count) // 100, mask=np.zeros(count, bool))
names = [f"class {row:07d}" for row in range(-(-count // 100))]
source = ImageSource(paths, labels, names, StoredFiles("/photos", paths), "images")
print((megabytes() - before) * 1024 / count)
"""


def measure(args):
    torch.set_num_threads(1)
    source = folder_source(args.photos)
    source = source.select(range(min(args.num_photos, len(source))), "photos")
    embedder = Embedder.from_pretrained(args.model, device=args.device, batch_size=args.batch_size)
    clock = time.process_time if embedder.device.type == "cpu" and not args.num_workers else time.perf_counter
    embedder.embed_images([source.stored(0)])
    with tempfile.TemporaryDirectory() as folder:
        start = clock()
        digest = source.fingerprint()
        read, start = clock() - start, clock()
        options = {"num_workers": args.num_workers, "data_fingerprint": digest, "progress": False}
        store = embed_to_store(embedder, source, Path(folder) / "store", **options)
        embedded = clock() - start
        stored = sum(path.stat().st_size for path in store.folder.iterdir())
    listing = subprocess.run([sys.executable, "-c", _LISTING, "1000000"], check=True, capture_output=True, text=True)
    found = {
        "clock": clock.__name__,
        "num_photos": len(source),
        "embedding_dim": embedder.embedding_dim,
        "bytes_per_photo": sum(Path(source.stored(row)).stat().st_size for row in range(len(source))) / len(source),
        "read_seconds": read / len(source),
        "embed_seconds": embedded / len(source),
        "store_bytes": stored / len(source),
        "listing_bytes": float(listing.stdout),
        "indexes": [index_sizes(factory, args.num_items, embedder.embedding_dim) for factory in FACTORIES],
    }
    write_json(args.output, {**environment(embedder.device), **found})
    print(json.dumps(found, indent=2))


def index_sizes(factory, num_items, dim):
    """Bytes and processor seconds of an index of clustered random vectors, for each of them."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((num_items // 50, dim))
    vectors = centres[rng.integers(len(centres), size=num_items)] + 0.5 * rng.standard_normal((num_items, dim))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    ids = [f"class {row // 100:07d}/photo {row:010d}.jpg" for row in range(num_items)]
    contents = [rng.bytes(32).hex() for _ in range(num_items)]
    start = time.process_time()
    index = RetrievalIndex.build(ids, torch.from_numpy(vectors), factory=factory, contents=contents)
    seconds = time.process_time() - start
    with tempfile.TemporaryDirectory() as folder:
        index.save(Path(folder) / "index")
        sizes = {path.suffix: path.stat().st_size for path in (Path(folder) / "index").iterdir()}
    return {
        "factory": factory,
        "build_seconds": seconds / num_items,
        "vector_bytes": max(sizes.values()) / num_items,
        "bytes": sum(sizes.values()) / num_items,
    }


def plan(args):
    measured = json.loads(Path(args.measured).read_text())
    rows = [figures(measured, number, args) for number in args.num_images]
    print(table([{"": name, **{f"{row['images']:,}": shown(row[name]) for row in rows}} for name in rows[0]]))


def figures(measured, num_images, args):
    """What a number of images takes: quantities, and prices where they are given."""
    embed = measured["embed_seconds"] if args.images_per_second is None else 1 / args.images_per_second
    runs = math.ceil(num_images / args.images_per_run)
    per_run = math.ceil(num_images / runs)
    dim = measured["embedding_dim"]
    factory, _ = choose_factory(per_run, dim, args.memory_gb)
    worker_hours = num_images * (embed + measured["read_seconds"]) / HOUR
    read = 2 * num_images * (args.bytes_per_image or measured["bytes_per_photo"])
    requests = 2 * args.requests_per_image * num_images
    store = num_images * measured["store_bytes"]
    rows = {
        "images": num_images,
        "runs, each with a store and an index": runs,
        "images of a run": per_run,
        "worker hours": worker_hours,
        "hours": worker_hours / args.workers,
        "bytes read": read,
        "bytes read a second": read / (worker_hours / args.workers * HOUR),
        "requests": requests,
        "memory of the starting process, of a run (bytes)": per_run * measured["listing_bytes"],
        "stores (bytes)": store,
        "index of a run": factory,
        "vectors of a run while it is built (bytes)": per_run * 4 * dim,
        "indexes (bytes)": num_images * index_bytes(measured, factory, dim),
    }
    prices = {
        "cost of workers": (args.price_worker_hour, worker_hours),
        "cost of requests": (args.price_million_requests, requests / 1e6),
        "cost of a month of stores": (args.price_gb_month, store / 1e9),
    }
    return rows | {name: None if price is None else price * amount for name, (price, amount) in prices.items()}


def index_bytes(measured, factory, dim):
    """Bytes of an item in an index of this kind, from those measured: as measured, or with a code of another size."""
    kinds = {kind["factory"]: kind for kind in measured["indexes"]}
    if factory.startswith("OPQ"):
        kind = kinds[FACTORIES[2]]
        return kind["bytes"] - 64 + int(factory.rpartition("PQ")[2])
    return kinds[FACTORIES[1] if factory.startswith("HNSW") else FACTORIES[0]]["bytes"]


def shown(value):
    if isinstance(value, float):
        return f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else value


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("measure", help="write what this machine needs")
    one.add_argument("--model", required=True)
    one.add_argument("--photos", required=True, help="folder")
    one.add_argument("--num_photos", type=int, default=512)
    one.add_argument("--num_items", type=int, default=20_000, help="of the indexes")
    one.add_argument("--device", default="cpu")
    one.add_argument("--batch_size", type=int, default=64)
    one.add_argument("--num_workers", type=int, default=0)
    one.add_argument("--output", required=True)
    two = commands.add_parser("plan", help="print what some numbers of images need")
    two.add_argument("--measured", required=True)
    two.add_argument("--num_images", type=int, nargs="+", required=True)
    two.add_argument("--workers", type=int, required=True)
    two.add_argument("--images_per_second", type=float, help="of a worker, measured elsewhere")
    two.add_argument("--images_per_run", type=int, default=10_000_000)
    two.add_argument("--bytes_per_image", type=float, help="where they are not as the photos measured")
    two.add_argument("--requests_per_image", type=float, default=2.0, help="of one reading")
    two.add_argument("--memory_gb", type=float, default=16.0, help="of the machine with an index")
    for name in ("worker_hour", "million_requests", "gb_month"):
        two.add_argument(f"--price_{name}", type=float)
    args = parser.parse_args()
    {"measure": measure, "plan": plan}[args.command](args)


if __name__ == "__main__":
    main()
