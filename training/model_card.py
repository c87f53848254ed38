"""The model card of a shared retriever, which writes itself from the model and from what a run knows."""

from __future__ import annotations

import math
import re
import shlex
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..configuration_vptsp import VPTSPConfig
from ..eval.metric_definitions import MetricDefinition, definition_of
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


def retriever_card(model, repo_id=None, results=None, training_args=None, token=None, **metadata) -> ModelCard:
    """Model card of a retriever: what it was tuned on, how well it does, how to use it, how to make it again.

    The licence is the backbone's, as its own model card has it; where that can't be read, there is none and the card
    says why. See [`backbone_licence`].

    Args:
        model: A `VPTSPModel` or `VPTSPForMetricLearning`.
        repo_id: Name on the Hub; None where it has none yet.
        results: What `train.py` writes into `all_results.json`; a part of it is enough.
        training_args: `VPTSPTrainingArguments` of the run.
        token: Token of the Hub, for the model card of a private backbone; None for `hub_token` of the run, or the one
            that `hf auth login` keeps.
        **metadata: Fields of `huggingface_hub.ModelCardData`; they win over what is known. A `license` takes the place
            of the backbone's, but for the text.

    Returns:
        `huggingface_hub.ModelCard`.
    """
    results = results or {}
    name = repo_id or "owner/name"
    title = name.split("/")[-1]
    token = token or getattr(training_args, "hub_token", None)
    licence = backbone_licence(model.config, _backbone_on_hub(model.config), token)
    sections = [
        _introduction(model, title, results.get("picture")),
        _usage(model, name),
        _sentence_transformers(model, name),
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
    if dataset.get("repo"):
        values["datasets"] = [dataset["repo"]]
    scored = _metrics_of(results, "final")
    if scored:
        values["eval_results"] = [
            EvalResult(
                task_type="image-feature-extraction",
                task_name="Image retrieval",
                dataset_type=dataset.get("repo") or dataset.get("name", "unknown"),
                dataset_name=dataset.get("repo") or dataset.get("name", "unknown"),
                dataset_revision=dataset.get("revision"),
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


def _introduction(model, title, picture) -> str:
    config = model.config
    if hub_name := _backbone_on_hub(config):
        backbone = f"[{hub_name}](https://huggingface.co/{hub_name}), revision `{config.backbone_revision}`"
    elif config.save_backbone or config.backbone is None:
        backbone = "saved along in this repository"
    else:
        backbone = "not in this repository and not on the Hub"
    lines = [
        f"# {title}",
        "",
        f"Image retrieval: embeddings of {config.embedding_dim} numbers in which images of a class lie together, also "
        "for classes that training has not seen. A frozen vision transformer with tuned prompts, made by VPTSP "
        "(semantic proxies from visual prompts, [ICLR 2024](https://arxiv.org/abs/2402.02340)).",
        "",
        f"Backbone: {backbone}.",
    ]
    if picture is not None:
        lines += ["", f"![Queries with their nearest neighbours]({picture})"]
    return "\n".join(lines)


def _usage(model, name) -> str:
    width = model.config.embedding_dim
    return f'''## Use

Needs `torch`, `transformers` and `pillow`. `revision` fixes weights and the code that `trust_remote_code` runs: put in
a commit of this repository that you have looked at.

```python
import torch
from transformers import AutoImageProcessor, AutoModel
from transformers.image_utils import load_image

name, revision = "{name}", "<commit>"
processor = AutoImageProcessor.from_pretrained(name, revision=revision)
model = AutoModel.from_pretrained(name, revision=revision, trust_remote_code=True)

images = [load_image("a.png"), load_image("b.png")]  # RGB, turned as EXIF says, as in training
with torch.inference_mode():
    embeddings = model(**processor(images, return_tensors="pt")).embeddings  # (2, {width}), L2-normalised
similarity = embeddings @ embeddings.T
```

Or as a pipeline, which gives the same numbers as a list:

```python
from transformers import pipeline

embed = pipeline("image-feature-extraction", model=name, revision=revision, trust_remote_code=True)
embedding = embed("a.png")[0]  # {width} floats
```'''


def _sentence_transformers(model, name) -> str:
    return f"""With [sentence-transformers](https://sbert.net) (tried with 6.2), and so with all that takes its models:

```python
from sentence_transformers import SentenceTransformer

encoder = SentenceTransformer(name, revision=revision, trust_remote_code=True)
encoded = encoder.encode(["a.png", "b.png"])  # (2, {model.config.embedding_dim}), the same numbers
similarity = encoder.similarity(encoded, encoded)
```"""


def _scores(results, training_args) -> str | None:
    tuned, frozen = _metrics_of(results, "final"), _metrics_of(results, "frozen")
    if not tuned:
        return None
    rows = []
    for name, (definition, value) in tuned.items():
        alone = _percent(frozen[name][1]) if name in frozen else ""
        rows.append(f"| {definition.title} | {alone} | {_percent(value)} | {definition.meaning} |")
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
        text += (
            f" The checkpoint is the best of the run by {training_args.metric_for_best_model} on these same images, "
            "which flatters the tuned scores."
        )
    table = ["| metric | backbone alone | tuned | what it is |", "|---|---|---|---|", *rows]
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
        lines += [f"Data: `{source}`" + (f" ({', '.join(shown)})." if shown else "."), ""]
    if command := results.get("command"):
        lines += ["```", without_tokens(shlex.split(command)), "```", ""]
    values = {name: getattr(model.config, name) for name in VPTSPConfig.__annotations__ if name not in _NOT_LISTED}
    values |= {name: getattr(training_args, name) for name in TRAINING_FIELDS if training_args is not None}
    values |= {f"version of {name}": version for name, version in results.get("versions", {}).items()}
    lines += ["| | |", "|---|---|"]
    lines += [f"| {name} | {getattr(value, 'value', value)} |" for name, value in values.items() if value is not None]
    return "\n".join(lines)


__all__ = ["retriever_card", "without_tokens"]
