"""What an image takes when there are millions: processor time and bytes, measured on this machine.

    python benchmarks/large_scale.py --model facebook/dinov2-small --photos photos --output measured.json

It takes processor time of one thread, which hardly changes with what else a machine does; with `--device cuda` or
decoders beside (`--num_workers`), that of the clock. `large_scale_plan.py` multiplies.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from machine_report import environment

from vptsp import Embedder, RetrievalIndex, embed_to_store, folder_source
from vptsp.files.atomic import write_json


FACTORIES = ("IVF128,Flat", "HNSW32", "IVF128,PQ64")
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
    listing = subprocess.run([sys.executable, "-c", _LISTING, "300000"], check=True, capture_output=True, text=True)
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--photos", required=True, help="folder")
    parser.add_argument("--num_photos", type=int, default=512)
    parser.add_argument("--num_items", type=int, default=20_000, help="of the indexes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--num_workers", type=int, default=0)
    parser.add_argument("--output", required=True)
    measure(parser.parse_args())


if __name__ == "__main__":
    main()
