"""The whole chain on data that needs no download: `make quickstart` (or `python -m vptsp.examples.quickstart`).

Scikit-learn's 1,797 scanned digits in three groups of classes that never meet:

1. a small vision transformer is trained from scratch on the digits 0 to 2, as a stand-in for a pretrained backbone;
2. VPTSP-G tunes prompts on the frozen backbone, on the digits 3 to 6 (`configs/quickstart.yaml`, through `train.py`);
3. retrieval is scored on the digits 7 to 9, which neither has seen: the backbone alone against the tuned retriever;
4. a new process (`retrieve.py`) loads what was saved, by `AutoModel.from_pretrained`, and draws queries with their
   neighbours;
5. the images that it embedded are indexed, for `vptsp app`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path


BACKBONE_CLASSES = ("0", "1", "2")
BACKBONE_ARGUMENTS = {
    "dataset_name": "digits",
    "train_classes": " ".join(BACKBONE_CLASSES),
    "image_size": 32,
    "resize_size": 32,
    "crop_scale_min": 0.6,
    "horizontal_flip": "false",
    "patch_size": 8,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_train_epochs": 30,
}


def options(values: dict) -> list[str]:
    """`{"a": "1 2"}` -> `["--a", "1", "2"]`."""
    return [word for name, value in values.items() for word in (f"--{name}", *str(value).split())]


def run(command: list[str], shown: str) -> None:
    """Run a command in a process of its own, and say which.

    It gets one thread: a model this small gains nothing from more, and on a busy machine they wait for each other.
    """
    print(f"\n$ {shown}", flush=True)
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def main(argv=None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/quickstart"), help="where all results go")
    parser.add_argument("--seed", type=int, default=0, help="of both trainings")
    args = parser.parse_args(argv)
    start = time.perf_counter()
    output, backbone, seed = args.output_dir, args.output_dir / "backbone", str(args.seed)

    words = [*options({**BACKBONE_ARGUMENTS, "output_dir": backbone, "seed": seed}), "--overwrite_output"]
    run(
        [sys.executable, "-m", "vptsp.examples.pretrain_backbone", *words],
        "python examples/pretrain_backbone.py " + " ".join(words),
    )

    config = resources.files("vptsp.configs") / "quickstart.yaml"
    words = [*options({"backbone": backbone, "output_dir": output, "seed": seed}), "--overwrite_output"]
    run(
        [sys.executable, "-m", "vptsp.train", str(config), *words],
        "python train.py configs/quickstart.yaml " + " ".join(words),
    )

    words = [str(output), "--seed", seed]
    run([sys.executable, "-m", "vptsp.examples.retrieve", *words], "python examples/retrieve.py " + " ".join(words))

    shutil.rmtree(output / "index", ignore_errors=True)  # of an earlier run
    places = {"images": "images", "embeddings_cache": "embeddings", "index": "index"}
    words = options({"model": output, **{name: output / place for name, place in places.items()}})
    run([sys.executable, "-m", "vptsp.cli", "index", *words], "vptsp index " + " ".join(words))

    results = json.loads((output / "all_results.json").read_text(encoding="utf-8"))
    print(
        f"\n{'':18}R@1     MAP@R   (digits 7, 8, 9; no training saw them)\n"
        f"frozen backbone   {100 * results['frozen_recall_at_1']:5.2f}   {100 * results['frozen_map_at_r']:5.2f}\n"
        f"tuned retriever   {100 * results['final_recall_at_1']:5.2f}   {100 * results['final_map_at_r']:5.2f}\n"
        f"tuned and shipped: {results['tuned_parameters']:,} of {results['retriever_parameters']:,} parameters "
        f"({results['tuned_share']:.1%}), {results['shipped_megabytes']:.2f} MB\n"
        f"pictures: {output / 'pictures'}\n"
        f"search page: vptsp app --index {output / 'index'}\n"
        f"done in {time.perf_counter() - start:.0f} s"
    )


if __name__ == "__main__":
    main()
