"""Retrievers on the image retrieval tasks of MTEB (Muennighoff et al., 2023; images: Xiao et al., MIEB, 2025).

import mteb
from vptsp import MTEBModel

model = MTEBModel("ann/photos", revision="<commit>")
results = mteb.evaluate(model, mteb.get_tasks(tasks=["CUB200I2IRetrieval", "SOPI2IRetrieval"]))
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from .embedder import Embedder
from .model_names import check_model_name


__all__ = ["MTEBModel"]

_COMMIT = re.compile(r"[0-9a-f]{40}")
# Fields that mteb wants to be given, of which nothing is known here
_UNKNOWN = dict.fromkeys(
    (
        *("loader", "release_date", "languages", "memory_usage_mb", "max_tokens", "license", "open_weights"),
        *("public_training_code", "public_training_data", "training_datasets"),
    )
)


class MTEBModel:
    """A retriever, or a bare backbone, as `mteb.evaluate` takes it (mteb's `EncoderProtocol`); needs the extra `mteb`.

    MTEB keeps results by name and revision of the model. So that a retriever trained anew never gets the scores of the
    last, the revision is the commit that was given, or else the digest of what takes part ([`Embedder.fingerprint`]).

    Args:
        model_name: Folder or Hub name, as for [`Embedder.from_pretrained`].
        revision: Commit, tag or branch on the Hub. For the leaderboard, the commit (40 hexadecimal digits).
        device: Where to compute; None for the accelerator, or the CPU.
        meta: Fields of `mteb.ModelMeta` that only you know: `name` (owner/model, of a local folder `local/<folder>` by
            default), `license`, `training_datasets` (names of MTEB's tasks, whose classes the retriever was trained
            on), ...
        **options: Of [`Embedder.from_pretrained`].

    Attributes:
        mteb_model_meta: `mteb.ModelMeta`.

    Raises:
        ImportError: mteb is not installed.
        ValueError: a field of `meta` is unknown or wrong; or as `Embedder.from_pretrained`.
    """

    def __init__(self, model_name, revision=None, device=None, *, meta=None, **options):
        try:
            from mteb.models import ModelMeta
        except ImportError as error:
            raise ImportError("MTEBModel needs mteb: pip install 'vptsp[mteb]'") from error
        model_name = check_model_name(model_name)
        self.embedder = embedder = Embedder.from_pretrained(model_name, revision=revision, device=device, **options)
        is_commit = revision is not None and _COMMIT.fullmatch(revision)
        fields = {
            "name": _name_for_mteb(embedder),
            "revision": revision if is_commit else embedder.fingerprint[:40],
            "n_parameters": sum(parameter.numel() for parameter in embedder.model.parameters()),
            "embed_dim": embedder.embedding_dim,
            "framework": ["PyTorch", "Transformers", "safetensors"],
            "similarity_fn_name": "cosine",
            "use_instructions": False,
            "modalities": ["image"],
        }
        # what a commit does not say, but embeddings depend on
        changed = {name: options[name] for name in ("image_size", "resize_size") if options.get(name) is not None}
        if embedder.dtype != torch.float32:
            changed["dtype"] = str(embedder.dtype).removeprefix("torch.")
        if changed:
            fields["experiment_kwargs"] = changed
        self.mteb_model_meta = ModelMeta(**_UNKNOWN | fields | (meta or {}))

    def encode(self, inputs, *, task_metadata, hf_split, hf_subset, prompt_type=None, **kwargs):
        """Embed the images of a task.

        Args:
            inputs: mteb's loader of batches, with PIL images under `image`.
            task_metadata: Of the task.
            hf_split, hf_subset: Part of the task; the images are embedded in one way.
            prompt_type: Queries or documents, likewise.
            **kwargs: `batch_size` is that of the loader; `show_progress_bar` is not needed.

        Returns:
            `(n, E)` float32 of numpy, L2-normalised, E the embedding width.

        Raises:
            ValueError: the task has more than images.
            ImageError: an image can't be read.
        """
        modalities = sorted(task_metadata.get_modalities(prompt_type))
        if modalities != ["image"]:
            of = "" if prompt_type is None else f" ({getattr(prompt_type, 'value', prompt_type)})"
            raise ValueError(
                f"the task {task_metadata.name}{of} has {' and '.join(modalities)}, but {self.embedder.name} embeds "
                "images alone: choose tasks of the category i2i"
            )
        return torch.cat([self.embedder.embed_images(batch["image"]) for batch in inputs]).numpy()

    def similarity(self, embeddings1, embeddings2):
        """Cosine similarities `(n, m)` of L2-normalised embeddings `(n, E)` and `(m, E)`."""
        return torch.as_tensor(embeddings1) @ torch.as_tensor(embeddings2).T

    def similarity_pairwise(self, embeddings1, embeddings2):
        """Cosine similarities `(n,)` of L2-normalised embeddings `(n, E)` and `(n, E)`, row by row."""
        return (torch.as_tensor(embeddings1) * torch.as_tensor(embeddings2)).sum(-1)


def _name_for_mteb(embedder):
    """`owner/model`, the only form that mteb takes."""
    folder = Path(embedder.name).expanduser()
    return f"local/{folder.resolve().name}" if folder.is_dir() or "/" not in embedder.name else embedder.name
