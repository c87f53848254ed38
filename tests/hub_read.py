"""What readers of retrievers do, in a process that can't import vptsp: remote code has to be enough; see test_hub.py.

    python tests/hub_read.py online FOLDER TOKEN
    python tests/hub_read.py offline FOLDER NAME

Writes `NAME.json` and `NAME.safetensors` (embeddings) into FOLDER; NAME is `online` in the first case.
"""

import json
import re
import sys
from pathlib import Path


class NoPackage:
    """Refuses to import vptsp."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] == "vptsp":
            raise ImportError(f"{name} is not to be imported here")


sys.meta_path.insert(0, NoPackage)

import torch  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoConfig, AutoImageProcessor, AutoModel, pipeline  # noqa: E402


PIXELS = None


def load(name, revision="main", **options):
    return AutoModel.from_pretrained(name, revision=revision, trust_remote_code=True, **options)


@torch.inference_mode()
def embed(model):
    return model(PIXELS).embeddings


def error_of(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def online(folder, token):
    pushed = json.loads((folder / "pushed.json").read_text())
    found, embeddings = {}, {}

    # Revisions: commits, the branch, a tag.
    embeddings["first"] = embed(load("ann/retriever", pushed["with_processor"]))
    embeddings["tag"] = embed(load("ann/retriever", "v1"))
    model = load("ann/retriever")
    embeddings["second"] = embed(model)
    found["module"] = type(model).__module__
    found["config"] = AutoConfig.from_pretrained("ann/retriever", trust_remote_code=True, revision="v1").to_diff_dict()
    found["revision_error"] = error_of(load, "ann/retriever", "nowhere")

    # Precision and placement.
    half = load("ann/retriever", dtype=torch.bfloat16)
    embeddings["half"] = embed(half)
    found["half"] = [str(parameter.dtype) for parameter in half.parameters()]
    placed = {device_map: load("ann/retriever", device_map=device_map) for device_map in ("cpu", "auto")}
    embeddings |= {name: embed(model) for name, model in placed.items()}
    embeddings["whole"] = embed(load("ann/whole"))

    # Image processor, pipeline, and the snippets of the card.
    images = [Image.radial_gradient("L").resize((40, 30)).convert("RGB"), Image.linear_gradient("L").convert("RGB")]
    for image, name in zip(images, ("a.png", "b.png"), strict=True):
        image.save(name)
    processor = AutoImageProcessor.from_pretrained("ann/retriever")
    pixel_values = processor(images, return_tensors="pt").pixel_values
    embed_images = pipeline("image-feature-extraction", model="ann/retriever", trust_remote_code=True)
    embeddings["by_hand"] = model(pixel_values).embeddings.detach()
    embeddings["pipeline"] = torch.tensor([rows[0] for rows in embed_images(["a.png", "b.png"])])
    embeddings["pipeline_pooled"] = torch.tensor(embed_images("b.png", pool=True))
    names = {}
    for code in re.findall(r"```python\n(.*?)```", (folder / "card.md").read_text(), re.DOTALL):
        exec(code.replace('"main"', repr((folder / "card_commit").read_text())), names)
    embeddings["snippet"], embeddings["snippet_pipeline"] = names["embeddings"], torch.tensor(names["embedding"])
    embeddings["snippet_encoder"] = torch.from_numpy(names["encoded"])
    found["encoder"] = {
        "dimension": names["encoder"].get_embedding_dimension(),
        "similarity": names["encoder"].similarity_fn_name,
    }
    embeddings["run"] = embed(names["model"])

    # Private repositories, and another cache.
    found["private_error"] = error_of(load, "ann/private")
    embeddings["private"] = embed(load("ann/private", token=token, cache_dir=folder / "elsewhere"))
    found["elsewhere"] = [path.name for path in (folder / "elsewhere").iterdir()]

    # Code that came along can push again.
    found["again"] = model.push_to_hub("ann/again", token=token).oid
    embeddings["again"] = embed(load("ann/again", found["again"]))

    # What must not be read.
    for name in ("pickled", "absolute", "relative", "shadowed", "nameless"):
        found[f"{name}_error"] = error_of(load, f"eve/{name}")
    embeddings["own_choice"] = embed(load("eve/relative", backbone=str(folder / "backbone")))
    found["package_error"] = error_of(__import__, "vptsp")
    return found, embeddings


def offline(name):
    found, embeddings = {}, {}
    options = {"local_files_only": True} if name == "local_files_only" else {}
    embeddings["second"] = embed(load("ann/retriever", **options))
    AutoImageProcessor.from_pretrained("ann/retriever", **options)
    found["absent_error"] = error_of(load, "ann/private", **options)
    return found, embeddings


def main(mode, folder, last):
    global PIXELS
    folder = Path(folder)
    PIXELS = load_file(folder / "expected.safetensors")["pixel_values"]
    found, embeddings = online(folder, last) if mode == "online" else offline(last)
    found["vptsp_modules"] = [name for name in sys.modules if name.split(".")[0] == "vptsp"]
    name = "online" if mode == "online" else last
    save_file({key: value.contiguous() for key, value in embeddings.items()}, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
