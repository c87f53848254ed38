"""A folder in which the documented commands find what they name: tiny photos, tables, models, a Hub."""

import csv
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from command_server import CLIENT
from conftest import tiny_vit_config
from data_fixtures import write_classes, write_image
from hub_stand_in import HubStandIn, Repository
from transformers import Dinov2Config, Dinov2Model, SiglipConfig, SiglipModel, ViTImageProcessorPil, ViTModel

from vptsp import VPTSPModel, build_image_processor


ROOT = Path(__file__).resolve().parents[1]
SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}


def save_tiny(kind, folder):
    """A tiny random model at a folder, with an image processor."""
    torch.manual_seed(1)
    if kind == "dinov2":
        sizes = {name: value for name, value in SIZES.items() if name != "intermediate_size"}
        model = Dinov2Model(Dinov2Config(**sizes, image_size=224, patch_size=14))
    elif kind == "siglip":
        vision = {**SIZES, "image_size": 256, "patch_size": 16}
        model = SiglipModel(SiglipConfig(vision_config=vision, text_config={**SIZES, "vocab_size": 30}))
    else:
        layers = 4 if kind == "deep vit" else 2
        model = ViTModel(tiny_vit_config(**{**SIZES, "num_hidden_layers": layers}, image_size=224, patch_size=16))
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 224, "width": 224}).save_pretrained(folder)


ON_HUB = {
    "facebook/dinov2-small": "dinov2",
    "facebook/dino-vits16": "deep vit",
    "google/vit-base-patch16-224-in21k": "vit",
    "google/siglip2-base-patch16-256": "siglip",
}


def fill_hub(hub, folder):
    """The backbones that the docs name, and a retriever `owner/name` with a tag."""

    def add(name, place):
        hub.repositories[name] = repository = Repository(private=False)
        repository.add_commit("main", {file.name: hub.keep(file.read_bytes()) for file in place.iterdir()})
        repository.tags["v1.0"] = repository.branches["main"]

    for name, kind in ON_HUB.items():
        save_tiny(kind, folder / name)
        add(name, folder / name)
    torch.manual_seed(2)
    retriever = VPTSPModel.from_backbone(folder / "facebook/dino-vits16", num_prompts=2, embedding_dim=8)
    retriever.save_pretrained(folder / "retriever", save_backbone=True)
    build_image_processor(224, 256).save_pretrained(folder / "retriever")
    add("owner/name", folder / "retriever")


def write_world(folder):
    """What the pages take for given, but for runs."""
    write_classes(folder / "photos", dict.fromkeys(("blue_mug", "cup", "mug", "red_mug"), 3), "jpg")
    write_classes(folder / "flowers", {"rose": 3, "tulip": 3})
    for number in range(1, 4):
        write_image(folder / "photos" / "mug" / f"{number}.jpg", seed=number)
    groceries = [
        f"{name}/train_{name}_{i:03d}.jpg" for name in ("Banana", "Leek", "Nectarine", "mug") for i in (1, 2, 3)
    ]
    with (folder / "products.csv").open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["image", "product", "sku", "price"])
        for row, name in enumerate(groceries):
            write_image(folder / "photos" / name, seed=row)
            rows.writerow([f"photos/{name}", name.partition("/")[0], f"09{row:04d}", 1.5 + row])
    for name in ("photo.jpg", "query.jpg", "queries/1.jpg", "queries/2.jpg"):
        write_image(folder / name, seed=7)
    save_tiny("dinov2", folder / "dinov2-small")
    quickstart = folder / "runs" / "quickstart"
    save_tiny("vit", quickstart / "backbone")
    for label, number in ((7, "0027"), (7, "0112"), (8, "1794"), (8, "1795"), (9, "0009"), (9, "1796")):
        write_image(quickstart / "images" / str(label) / f"{number}.png", seed=int(number))
    torch.manual_seed(2)
    retriever = VPTSPModel.from_backbone(quickstart / "backbone", image_size=32, num_prompts=2, embedding_dim=8)
    retriever.save_pretrained(quickstart)
    build_image_processor(32, 32).save_pretrained(quickstart)
    for name in ("train.py", "configs"):
        (folder / name).symlink_to(ROOT / name)


class World:
    """The folder, the Hub and the process that runs commands; to be used in a `with` statement."""

    def __init__(self, folder):
        self.folder, self.given = folder, folder / "given"
        self.hub = HubStandIn({"owner": "hf_owner"})

    def __enter__(self):
        self.hub.__enter__()
        fill_hub(self.hub, self.folder / "hub")
        write_world(self.given)
        programs = self.folder / "bin"
        programs.mkdir()
        place = str(self.folder / "socket")
        client = CLIENT.format(python=sys.executable, socket=place)
        nothing = "#!/bin/sh\necho not run: $0 $*\n"  # what needs a network and is no part of the project
        for name, text in {"vptsp": client, "pip": nothing, "hf": nothing}.items():
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        (self.given / ".venv" / "bin").mkdir(parents=True)
        shutil.copy(programs / "vptsp", self.given / ".venv" / "bin")
        names = ("HF_", "TRANSFORMERS_")
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(names)}
        self.environment |= self.hub.environment(self.folder / "home", "hf_owner")
        self.environment |= {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "GRADIO_ANALYTICS_ENABLED": "False"}
        self.environment |= {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "HF_DATASETS_OFFLINE": "1"}
        command = [sys.executable, str(ROOT / "tests" / "command_server.py"), place]
        self.server = subprocess.Popen(
            command, env=self.environment, stdin=subprocess.PIPE
        )  # it ends with this process
        while not Path(place).exists():
            assert self.server.poll() is None, "the server of commands has ended"
            time.sleep(0.1)
        return self

    def __exit__(self, *exception):
        self.server.communicate()
        self.hub.__exit__(*exception)

    def copy(self, name):
        """A fresh folder with all that is given."""
        return Path(shutil.copytree(self.given, self.folder / "worlds" / name, symlinks=True))

    def run(self, commands, folder):
        """Run lines of shell; an AssertionError with all that they printed if one fails."""
        words = ["bash", "-euo", "pipefail", "-c", commands]
        done = subprocess.run(words, cwd=folder, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{commands}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout
