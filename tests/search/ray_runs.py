"""An embedding run on a Ray of this machine, as a process that can be killed: `ray_runs.py FOLDER`, of `RayWorld`."""

import json
import os
import sys
import time
from functools import partial
from pathlib import Path


os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")


def noted_embedder(backbone, notes, delay=0.0, dies=None):
    """An embedder that notes every image, may take its time, and ends its process once."""
    from vptsp import Embedder

    embedder = Embedder.from_pretrained(backbone, batch_size=3, device="cpu")
    embed = embedder.embed_pixels

    def noted(pixel_values):
        time.sleep(delay)
        if dies is not None and not Path(dies).exists():
            Path(dies).touch()
            os._exit(1)
        with (Path(notes) / str(os.getpid())).open("a") as stream:
            stream.write(f"{len(pixel_values)}\n")
        return embed(pixel_values)

    embedder.embed_pixels = noted
    return embedder


def count_noted(notes):
    """Images that were embedded, per process that did."""
    return {path.name: sum(map(int, path.read_text().split())) for path in Path(notes).iterdir()}


def main(backbone, photos, output, notes, delay):
    import ray

    from vptsp import RayEngine, embed_to_store, folder_source

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    load = partial(noted_embedder, backbone, notes, delay)
    source = folder_source(photos)
    embed_to_store(load(), source, output, shard_size=4, progress=False, engine=RayEngine(load, workers=2))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
