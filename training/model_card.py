"""The model card of a shared retriever, which writes itself from the model and from what a run knows."""

from __future__ import annotations

import math
import re
import shlex
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..configuration_vptsp import LOWEST_TRANSFORMERS, VPTSPConfig
from ..eval.metric_definitions import MetricDefinition, definition_of
from ..modeling_vptsp import uses_peft
from .backbone_licence import backbone_licence
from .tuned_counts import tuned_counts


CITATION = """\
@inproceedings{ren2024vptsp,
  title     = {Learning Semantic Proxies from Visual Prompts for Parameter-Efficient Fine-Tuning
               in Deep Metric Learning},
  author    = {Ren, Li and Chen, Chen and Wang, Liqiang and Hua, Kien},
  booktitle = {International Conference on Learning Representations},
  year      = {2024}
}"""

TAGS = ["vptsp", "image-retrieval", "metric-learning", "visual-prompt-tuning"]

TRAINING_FIELDS = (
    "num_train_epochs",
    "per_device_train_batch_size",
    "images_per_class",
    "gradient_accumulation_steps",
    "optim",
    "learning_rate",
    "proxy_learning_rate",
    "min_learning_rate",
    "cosine_epochs",
    "lr_scheduler_type",
    "weight_decay",
    "max_grad_norm",
    "bf16",
    "fp16",
    "seed",
)

# What a card says elsewhere, or what says nothing about how the model was made.
_NOT_LISTED = {
    "backbone",
    "backbone_config",
    "backbone_revision",
    "save_backbone",
    "format_version",
    "model_type",
    "sub_configs",
}


def without_tokens(words, *secrets) -> str:
    """A command line as text, with tokens blotted out.

    Args:
        words: The words of the command.
        *secrets: Values that must not appear, whatever option they belong to; None is passed over.

    Returns:
        The command, quoted for a shell, with `HIDDEN` for the values of options whose name holds `token`, for what
        looks like a token of the Hub, and for `secrets`.
    """
    clean, after_option = [], False
    for word in words:
        name, equals, _ = word.partition("=")
        is_option = word.startswith("-") and "token" in name.lower()
        if after_option and not word.startswith("--"):
            word = "HIDDEN"
        elif is_option and equals:
            word = f"{name}=HIDDEN"
        for secret in filter(None, secrets):
            word = word.replace(secret, "HIDDEN")
        clean.append(re.sub(r"hf_\w{8,}", "HIDDEN", word))
        after_option = is_option and not equals
    return shlex.join(clean)


def retriever_card(
    model,
    repo_id=None,
    results=None,
    training_args=None,
    folder=None,
    processor=None,
    token=None,
    **metadata,
) -> ModelCard:
    """Model card of a retriever: what it was tuned on, how well it does, how to use it, how to make it again.

    The licence is the backbone's, as its own model card has it; where that can't be read, there is none and the card
    says why. See [`backbone_licence`].

    Args:
        model: A `VPTSPModel` or `VPTSPForMetricLearning`.
        repo_id: Name on the Hub; None where it has none yet.
        results: What `train.py` writes into `all_results.json`; a part of it is enough.
        training_args: `VPTSPTrainingArguments` of the run.
        folder: Where it is saved, after which it is named where it has no name on the Hub.
        processor: Its image processor, for how images are cut.
        token: Token of the Hub, for the model card of a private backbone; None for `hub_token` of the run, or the one
            that `hf auth login` keeps.
        **metadata: Fields of `huggingface_hub.ModelCardData`; they win over what is known. A `license` takes the place
            of the backbone's, but for the text.

    Returns:
        `huggingface_hub.ModelCard`.
    """
    results = results or {}
    folder = None if folder is None else Path(folder).absolute()
    title = "Image retriever" if folder is None else folder.name
    if repo_id is not None:
        title = repo_id.split("/")[-1]
    token = token or getattr(training_args, "hub_token", None)
    licence = backbone_licence(model.config, _backbone_on_hub(model.config), token)
    sections = [
        _introduction(model, title, processor, results.get("picture")),
        _usage(model, repo_id, folder),
        _scores(results, training_args),
        _tuned(model),
        _training(model, results, training_args),
        f"## Licence\n\n{licence.text}",
        f"## Cite\n\n```bibtex\n{CITATION}\n```",
    ]
    known = _metadata(model, results, title) | ({} if "license" in metadata else licence.metadata)
    data = ModelCardData(**{**known, **metadata})
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n")


def _backbone_on_hub(config) -> str | None:
    """Hub name of the backbone, None where it is a local folder or saved along without a name."""
    is_hub_name = config.backbone is not None and not Path(config.backbone).is_dir()
    return config.backbone if is_hub_name and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", config.backbone) else None


def _metadata(model, results, title) -> dict:
    dataset = results.get("dataset", {})
    values = {
        "library_name": "transformers",
        "pipeline_tag": "image-feature-extraction",
        "tags": TAGS,
        "model_name": title,
    }
    if _backbone_on_hub(model.config) is not None:
        values |= {"base_model": model.config.backbone, "base_model_relation": "adapter"}
    tested_on = dataset.get("tested_on", [])
    if repos := [repo for repo in (dataset.get("repo"), *(part["repo"] for part in tested_on)) if repo]:
        values["datasets"] = list(dict.fromkeys(repos))
    tested = tested_on[-1] if tested_on else dataset  # of queries and gallery, the gallery
    tested_name = tested.get("repo") or tested.get("name", "unknown")
    scored = _metrics_of(results, "final")
    if scored:
        values["eval_results"] = [
            EvalResult(
                task_type="image-feature-extraction",
                task_name="Image retrieval",
                dataset_type=tested_name,
                dataset_name=tested_name,
                dataset_revision=tested.get("revision"),
                metric_type=metric,
                metric_name=definition.title,
                metric_value=round(value, 6),
            )
            for metric, (definition, value) in scored.items()
        ]
    return values


def _metrics_of(results, prefix) -> dict[str, tuple[MetricDefinition, float]]:
    """Name -> what it is, and its value; of the retrieval metrics under `{prefix}_` that have a value."""
    found = {}
    for key, value in results.items():
        name = key.removeprefix(f"{prefix}_")
        definition = None if name == key else definition_of(name)
        has_value = isinstance(value, (int, float)) and math.isfinite(value)  # None as `all_results.json` has it
        if has_value and definition is not None and definition.kind == "retrieval":
            found[name] = (definition, value)
    return found


def _introduction(model, title, processor, picture) -> str:
    config, side = model.config, model.config.backbone_config.image_size
    short = None if processor is None else dict(processor.size).get("shortest_edge")
    cut = "" if short is None else f", the middle of the image once its short side has {short}"
    lines = [
        f"# {title}",
        "",
        f"Image retrieval: embeddings of {config.embedding_dim} numbers in which images of a class lie together, also "
        "for classes that training has not seen. A frozen vision transformer with tuned prompts, made by VPTSP "
        "(semantic proxies from visual prompts, [ICLR 2024](https://arxiv.org/abs/2402.02340)).",
        "",
        f"Backbone: {_backbone(config)}.",
        f"Image size: {side} x {side} pixels{cut}.",
    ]
    if picture is not None:
        lines += ["", f"![Queries with their nearest neighbours]({picture})"]
    return "\n".join(lines)


def _backbone(config) -> str:
    """What the backbone is called, what it is, and where."""
    backbone = config.backbone_config
    what = f"{backbone.model_type}, {backbone.num_hidden_layers} layers of width {backbone.hidden_size}"
    if hub_name := _backbone_on_hub(config):
        return f"[{hub_name}](https://huggingface.co/{hub_name}), revision `{config.backbone_revision}` ({what})"
    named = "" if config.backbone is None else f"`{Path(config.backbone).name}` "
    where = "saved along in this repository" if _saved_along(config) else "not in this repository and not on the Hub"
    return f"{named}({what}), {where}"


def _saved_along(config) -> bool:
    return config.save_backbone or config.backbone is None


_HUB_NAME = """\
name, revision = "{name}", "main"  # better than main: a commit that you have looked at
processor = AutoImageProcessor.from_pretrained(name, revision=revision)
model = AutoModel.from_pretrained(name, revision=revision, trust_remote_code=True)"""
_FOLDER_NAME = """\
name = "{name}"  # the folder that this file is in
processor = AutoImageProcessor.from_pretrained(name)
model = AutoModel.from_pretrained(name, trust_remote_code=True)"""
_LOCAL_BACKBONE = """\


The backbone, `{backbone}`, is a folder of its own that this one needs; `config.json` says where it lies. Where it has
been moved, say so:

```python
model = AutoModel.from_pretrained(name, backbone="path/to/{backbone}", trust_remote_code=True)
```

A retriever that needs no other folder, and can be pushed, is written by `--save_backbone true` in training, or by
`model.save_pretrained("another/folder", save_backbone=True)` (and `processor.save_pretrained` into the same)."""


def _usage(model, repo_id, folder) -> str:
    config, width = model.config, model.config.embedding_dim
    on_hub = repo_id is not None or folder is None
    if on_hub:
        opening = _HUB_NAME.format(name=repo_id or "owner/name")
    else:
        inside = folder.is_relative_to(Path.cwd())
        opening = _FOLDER_NAME.format(name=(folder.relative_to(Path.cwd()) if inside else folder).as_posix())
    pinned = ", revision=revision" if on_hub else ""
    what_runs = "`trust_remote_code` runs the code in it"
    if on_hub:
        what_runs = "`revision` fixes weights and the code that `trust_remote_code` runs"
    peft = ", `peft`" if uses_peft(config) else ""
    missing = _backbone_on_hub(config) is None and not _saved_along(config)
    note = _LOCAL_BACKBONE.format(backbone=Path(config.backbone).name) if missing else ""
    return f"""## Use

Needs `torch`, `transformers` {LOWEST_TRANSFORMERS} or newer{peft} and `pillow`. {what_runs}.

```python
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel
from transformers.image_utils import load_image

{opening}

# yours: load_image("a.png"), which is RGB and turned as EXIF says, as in training
images = [Image.new("RGB", (640, 480), colour) for colour in ("red", "blue")]
with torch.inference_mode():
    embeddings = model(**processor(images, return_tensors="pt")).embeddings  # (2, {width}), L2-normalised
similarity = embeddings @ embeddings.T
```

Or as a pipeline, which gives the same numbers as a list:

```python
from transformers import pipeline

embed = pipeline("image-feature-extraction", model=name{pinned}, trust_remote_code=True)
embedding = embed(images[0])[0]  # {width} floats
```

With [sentence-transformers](https://sbert.net) (tried with 6.2), and all that takes its models, the same again:

```python
from sentence_transformers import SentenceTransformer

encoder = SentenceTransformer(name{pinned}, trust_remote_code=True)
encoded = encoder.encode(images)  # an array
```{note}"""


def _scores(results, training_args) -> str | None:
    tuned, frozen = _metrics_of(results, "final"), _metrics_of(results, "frozen")
    if not tuned:
        return None
    rows, with_intervals = [], any(f"final_{name}_low" in results for name in tuned)
    for name, (definition, value) in tuned.items():
        alone = _percent(frozen[name][1]) if name in frozen else ""
        low, high = results.get(f"final_{name}_low"), results.get(f"final_{name}_high")
        interval = "" if low is None or high is None else f"{_percent(low)} to {_percent(high)}"
        cells = [definition.title, alone, _percent(value), *([interval] if with_intervals else []), definition.meaning]
        rows.append(f"| {' | '.join(cells)} |")
    count = results.get("final_num_queries")
    has_gallery = "gallery_images" in results.get("dataset", {})
    text = "Cosine similarity; "
    text += "queries against a gallery of other images" if has_gallery else "a query never retrieves itself"
    if results.get("dataset", {}).get("seen_classes"):
        text += "; the classes are those that training has seen, asked for by other images of them"
    text += ". All in percent"
    text += f", over {count:,} queries." if count else "."
    if lone := results.get("final_num_unanswerable"):
        text += f" {lone:,} queries whose class has no other item are left out."
    if same := results.get("final_num_in_gallery"):
        text += f" {same:,} queries are in the gallery too, where they are excluded."
    if getattr(training_args, "load_best_model_at_end", False):
        validates = "validation_classes" in results.get("dataset", {})
        where = (
            "images of other training classes" if validates else "these same images, which flatters the tuned scores"
        )
        text += f" The checkpoint is the best of the run by {training_args.metric_for_best_model} on {where}."
    if rounds := results.get("rounds"):
        text += f" Training had no labels: {rounds[-1]['clusters']:,} clusters of its photos took the place of classes"
        text += " beside those that some photos have." if rounds[-1]["given_classes"] else "."
    if with_intervals:
        text += " Intervals are those of a percentile bootstrap over classes."
    head = ["metric", "backbone alone", "tuned", *(["95 % interval"] if with_intervals else []), "what it is"]
    table = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *rows]
    return "\n".join(["## Scores", "", text, "", *table])


def _percent(value) -> str:
    return f"{100 * value:.2f}"


def _tuned(model) -> str:
    counts = tuned_counts(model)
    what = "backbone and all" if counts["shipped_parameters"] == counts["retriever_parameters"] else "only these"
    return (
        f"## Size\n\nTuned are {counts['tuned_parameters']:,} of {counts['retriever_parameters']:,} parameters "
        f"({counts['tuned_share']:.2%}). Saved are {what}: {counts['shipped_megabytes']:.2f} MB in safetensors."
    )


def _training(model, results, training_args) -> str:
    lines = ["## Training", ""]
    if dataset := results.get("dataset"):
        shown = [f"{key.replace('_', ' ')} {value:,}" for key, value in dataset.items() if isinstance(value, int)]
        source = dataset.get("repo") or dataset.get("name")
        tested = " and ".join(f"`{part['name']}`" for part in dataset.get("tested_on", []))
        source = f"`{source}`" + (f", tested on {tested}" if tested else "")
        lines += [f"Data: {source}" + (f" ({', '.join(shown)})." if shown else "."), ""]
    if command := results.get("command"):
        lines += ["```", without_tokens(shlex.split(command)), "```", ""]
    values = {name: getattr(model.config, name) for name in VPTSPConfig.__annotations__ if name not in _NOT_LISTED}
    values |= {name: getattr(training_args, name) for name in TRAINING_FIELDS if training_args is not None}
    values |= {f"version of {name}": version for name, version in results.get("versions", {}).items()}
    lines += ["| | |", "|---|---|"]
    lines += [f"| {name} | {getattr(value, 'value', value)} |" for name, value in values.items() if value is not None]
    return "\n".join(lines)


__all__ = ["retriever_card", "without_tokens"]
