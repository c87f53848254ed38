"""What the owner of retrievers does, in a process of its own that talks to the Hub's stand-in; see test_hub.py.

    python tests/hub_push.py FOLDER TOKEN

Writes `pushed.json` (names and commits) and `expected.safetensors` (embeddings) into FOLDER.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from conftest import tiny_vit_config
from huggingface_hub import HfApi
from PIL import Image
from safetensors.torch import save_file
from transformers import ViTModel

from vptsp import VPTSPForMetricLearning, VPTSPModel, train
from vptsp.data_scripts.preprocessing import build_image_processor


FIELDS = {"num_prompts": 5, "embedding_dim": 10}


def backbone(seed):
    torch.manual_seed(seed)
    model = ViTModel(tiny_vit_config())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


def untuned(name, **options):
    torch.manual_seed(2)
    return VPTSPModel.from_backbone(name, **FIELDS, **options).eval()


def error_of(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def write_images(folder):
    rng = np.random.default_rng(0)
    for label in range(4):
        (folder / f"class{label}").mkdir(parents=True)
        for i in range(4):
            pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"class{label}" / f"{i}.png")


def main(folder, token):
    folder = Path(folder)
    pixel_values = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    expected, pushed = {"pixel_values": pixel_values}, {}

    def embed(name, model):
        with torch.inference_mode():
            expected[name] = model(pixel_values).embeddings

    # A retriever on a backbone of the Hub, public, in two versions; then the backbone's main branch moves on.
    readme = b"---\nlicense: other\nlicense_name: birds-only\nlicense_link: LICENSE\n---\n# Backbone\n"
    pushed["backbone"] = backbone(1).push_to_hub("ann/backbone", token=token).oid
    model = untuned("ann/backbone", revision="main")
    pushed["first"] = model.push_to_hub("ann/retriever", token=token).oid
    pushed["with_processor"] = build_image_processor(16, 18).push_to_hub("ann/retriever", token=token).oid
    embed("first", model)
    backbone(8).push_to_hub("ann/backbone", token=token)
    HfApi().upload_file(path_or_fileobj=readme, path_in_repo="README.md", repo_id="ann/backbone", token=token)
    with torch.no_grad():
        model.prompts.tokens.mul_(-1.5)
    pushed["second"] = model.push_to_hub("ann/retriever", token=token, commit_message="Better prompts").oid
    embed("second", model)
    pushed["branch"] = model.push_to_hub("ann/retriever", token=token, revision="tests").oid
    pushed["tuned_names"] = sorted(model.tuned_names())
    loaded = VPTSPModel.from_pretrained("ann/retriever", revision=pushed["second"])
    pushed["loads_itself"] = torch.equal(loaded(pixel_values).embeddings, expected["second"])
    pushed["backbone_revision"] = [model.config.backbone_revision, loaded.config.backbone_revision]

    # Private, with the training model's own method; only its retriever goes.
    training = VPTSPForMetricLearning.from_backbone("ann/backbone", num_classes=3, token=token, **FIELDS).eval()
    pushed["private"] = training.push_to_hub("ann/private", private=True, token=token).oid
    embed("private", training.retriever)

    # A backbone that is a folder of this machine.
    backbone(1).save_pretrained(folder / "backbone")
    local = untuned(folder / "backbone")
    pushed["local_error"] = error_of(local.push_to_hub, "ann/local", token=token)
    pushed["whole"] = local.push_to_hub("ann/whole", save_backbone=True, token=token).oid
    embed("whole", local)
    pushed["other_user_error"] = error_of(model.push_to_hub, "bob/retriever", token=token)

    # A run of train.py.
    write_images(folder / "images")
    sizes = ["--image_size", "16", "--embedding_dim", "10", "--num_prompts", "5", "--num_class_prompts", "2"]
    run = ["--per_device_train_batch_size", "4", "--num_train_epochs", "2", "--picture_queries", "2", "--use_cpu"]
    hub = ["--push_to_hub", "true", "--hub_model_id", "ann/run", "--hub_token", token, "--hub_strategy", "every_save"]
    data = ["--data_dir", str(folder / "images"), "--data_cache_dir", str(folder / "cache")]
    where = ["--backbone", "ann/backbone", "--output_dir", str(folder / "run")]
    train.main([*where, *data, *sizes, *run, *hub, "--disable_tqdm", "true"])
    embed("run", VPTSPModel.from_pretrained(folder / "run"))

    save_file(expected, folder / "expected.safetensors")
    (folder / "pushed.json").write_text(json.dumps(pushed))


if __name__ == "__main__":
    main(*sys.argv[1:])
