"""What some millions of images take: hours, machines, bytes, index and cost, computed from what was measured of one.

    python benchmarks/large_scale_plan.py --measured measured.json --num_images 10000000 1000000000 --workers 64

`large_scale.py` writes the measurements. Prices are yours to give; without them it says how much there is to pay for.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from large_scale import FACTORIES
from machine_report import table

from vptsp import choose_factory


HOUR = 3600


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
    parser.add_argument("--measured", required=True, help="what large_scale.py wrote")
    parser.add_argument("--num_images", type=int, nargs="+", required=True)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--images_per_second", type=float, help="of a worker, measured elsewhere")
    parser.add_argument("--images_per_run", type=int, default=10_000_000)
    parser.add_argument("--bytes_per_image", type=float, help="where they are not as the photos measured")
    parser.add_argument("--requests_per_image", type=float, default=2.0, help="of one reading")
    parser.add_argument("--memory_gb", type=float, default=16.0, help="of the machine with an index")
    for name in ("worker_hour", "million_requests", "gb_month"):
        parser.add_argument(f"--price_{name}", type=float)
    plan(parser.parse_args())


if __name__ == "__main__":
    main()
