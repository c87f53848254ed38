"""Training model of VPTSP: the retriever with class prompts, semantic proxies and a loss.

Shapes: B images, M classes in a batch, C training classes, E embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import ModelOutput

from ..backbones_vptsp import check_hooks, refuse_hooks
from ..configuration_vptsp import VPTSPConfig
from ..files.atomic import atomic_path
from ..losses.loss_registry import build_criterion, check_loss
from ..losses.other_classes import others_per_class, others_per_image
from ..losses.proxy_losses import proxy_anchor_loss, proxy_nca_loss
from ..modeling_vptsp import VPTSPModel, VPTSPPreTrainedModel, embedding_head
from .checkpoints import check_listed_file
from .class_prompts import CLASS_PROMPTS_NAME, OffloadedClassPrompts, build_class_prompts
from .proxies import ClassGroups, SemanticProxies, group_by_class


@dataclass
class VPTSPMetricLearningOutput(ModelOutput):
    """Output of [`VPTSPForMetricLearning`].

    Attributes:
        loss: Scalar, where labels were given.
        embeddings: `(B, E)` float32, L2-normalised (before the embedding dropout's zeros, if any).
        pooler_output: The same tensor.
        similarity: `(B, M)` cosine similarity of embeddings and the proxies of the batch's classes; a registered loss
            with `proxy_range="all"` has those of all classes, `(B, C)`.
        semantic_vectors: `(B, E)` of the semantic pass, L2-normalised.
        proxy_classes: `(M,)` int64, classes of the batch.
        proxy_rows: `(M, E)` their new rows of the proxy state, to be committed after the backward pass.
    """

    loss: torch.FloatTensor | None = None
    embeddings: torch.FloatTensor | None = None
    pooler_output: torch.FloatTensor | None = None
    similarity: torch.FloatTensor | None = None
    semantic_vectors: torch.FloatTensor | None = None
    proxy_classes: torch.LongTensor | None = None
    proxy_rows: torch.FloatTensor | None = None


class _GatherRows(torch.autograd.Function):
    """Rows of all processes, in order of rank. The gradient of a process's own rows is multiplied by the number of
    processes, which makes up for the average that DDP takes of gradients that are meant to be summed."""

    @staticmethod
    def forward(ctx, rows):
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.chunk(dist.get_world_size())[dist.get_rank()] * dist.get_world_size()


def _gather_batches(embeddings, labels, rows, groups):
    """The batches of all processes as one: embeddings `(B, E)`, labels `(B,)`, state rows `(M, E)`, groups."""
    first = dist.get_rank() * len(groups.classes)
    groups = ClassGroups(
        classes=_GatherRows.apply(groups.classes),
        rows=_GatherRows.apply(groups.rows + first),
        steps=_GatherRows.apply(groups.steps),
        images_per_class=groups.images_per_class,
        counts=None if groups.counts is None else _GatherRows.apply(groups.counts),
    )
    rows = None if rows is None else _GatherRows.apply(rows)
    return _GatherRows.apply(embeddings), _GatherRows.apply(labels), rows, groups


class VPTSPForMetricLearning(VPTSPPreTrainedModel):
    """VPTSP training model (Ren et al., ICLR 2024).

    `forward` is pure: it returns the proxy state's new rows, and `commit_proxies` writes them once the backward pass
    is over, so that recomputation, gradient accumulation and evaluation can't corrupt the state.

    With a loss that compares images with each other there are no proxies. `criterion` holds a loss that is not one of
    `losses/proxy_losses.py`, with its parameters, if it has any.
    """

    def __init__(self, config: VPTSPConfig):
        super().__init__(config)
        if config.num_classes is None:
            raise ValueError("num_classes must be set for training, got None")
        check_loss(config)
        self.vptsp = VPTSPModel(config)
        if config.proxy_update != "none":
            self.class_prompts = build_class_prompts(config)
            if config.proxy_head == "own":
                self.proxy_head = embedding_head(config)
        self.criterion = build_criterion(config)
        if self.criterion is None or self.criterion.takes == "proxies":
            self.proxies = SemanticProxies(config)
        self.post_init()
        self.freeze_backbone()

    @torch.compiler.disable(recursive=False)  # `forward` may be compiled; what is seen of gradients here can't be
    def __call__(self, *args, **kwargs):
        """As `forward`. In training, what it returned for the batch before must have been committed.

        Raises:
            RuntimeError: see `SemanticProxies.expect_commit`.
            ValueError: see `refuse_unheard_hooks`.
        """
        self.refuse_unheard_hooks()
        output = super().__call__(*args, **kwargs)
        if self.training and self.config.proxy_update != "none" and output.loss is not None:
            self.proxies.expect_commit(output.loss)
        return output

    def forward(self, pixel_values, labels=None, images_per_class=None, interpolate_pos_encoding=False, gather=False):
        """Embeddings and, with labels, the loss and the proxy state's new rows.

        Args:
            pixel_values: `(B, 3, height, width)` float, normalised as the backbone expects.
            labels: `(B,)` int64 in 0..C-1.
            images_per_class: Images of each class, where the batch is class-major and all classes have as many.
            interpolate_pos_encoding: As for [`VPTSPModel`].
            gather: Take the loss over the batches of all processes together. Each process must have as many images,
                of classes that no other has, and gradients must be averaged over processes (as DDP does); they are
                then those of one process with the whole batch.

        Returns:
            [`VPTSPMetricLearningOutput`].

        Raises:
            ValueError: labels are outside 0..C-1 or not as many as images. On an accelerator or compiled,
                with `images_per_class`, their range is left to the caller, since looking would stall the device.
        """
        semantic_pass = labels is not None and self.config.proxy_update != "none"
        keep = ("tokens",) if semantic_pass else ()
        if labels is not None and self.criterion is not None and self.criterion.takes == "features":
            keep = ("features",)
        # called as a module, so that hooks on it and on its head run in training too
        embedded = self.vptsp(pixel_values, interpolate_pos_encoding, return_dict=True, keep=keep)
        embeddings = embedded.embeddings
        if labels is None:
            return VPTSPMetricLearningOutput(embeddings=embeddings, pooler_output=embeddings)
        self._check_labels(labels, len(embeddings), trusted=images_per_class is not None)
        if self.criterion is not None and self.criterion.takes != "proxies":
            return self._compare_images(embedded, labels, gather)
        groups = group_by_class(labels, images_per_class)

        vectors, rows = None, None
        if semantic_pass:
            prompts = self.class_prompts(groups.classes)
            pooled = self.vptsp.encode(embedded.tokens, prompts, groups.rows, embedded.first_layer)
            head = self.vptsp.head if self.config.proxy_head == "shared" else self.proxy_head
            vectors = F.normalize(head(pooled, normalize=False), dim=-1)  # hooks see what they see of images
        # The state and the loss live on small differences: no half precision here, whatever the pass ran in.
        with torch.autocast(embeddings.device.type, enabled=False):
            if vectors is not None:
                rows = self.proxies.new_rows(vectors, groups)
            if gather:
                embeddings, labels, rows, groups = _gather_batches(embeddings, labels, rows, groups)
            if self.criterion is None:
                loss, similarity = self._loss(embeddings, rows, groups)
            else:
                compared = self.config.proxy_range
                proxies = self.proxies.proxies(groups.classes, rows, compared)
                similarity = embeddings @ proxies.to(embeddings.dtype).T
                loss = self.criterion(similarity, labels if compared == "all" else groups.rows)
        return VPTSPMetricLearningOutput(
            loss=loss,
            embeddings=embeddings,
            pooler_output=embeddings,
            similarity=similarity,
            semantic_vectors=vectors,
            proxy_classes=groups.classes,
            proxy_rows=rows,
        )

    def _compare_images(self, embedded, labels, gather):
        """Output of a loss that compares images with each other."""
        embeddings = embedded.embeddings
        with torch.autocast(embeddings.device.type, enabled=False):
            inputs = embedded.features if self.criterion.takes == "features" else embeddings
            if gather:
                inputs, labels = _GatherRows.apply(inputs), _GatherRows.apply(labels)
            loss = self.criterion(inputs, labels)
        return VPTSPMetricLearningOutput(loss=loss, embeddings=embeddings, pooler_output=embeddings)

    def _loss(self, embeddings, rows, groups):
        """One of the model's own losses, and the similarities with the batch's classes, `(B, M)`."""
        config, proxies, classes = self.config, self.proxies, groups.classes
        num_others = proxies.num_active - len(classes) if config.proxy_range == "all" else 0
        scale = (config.loss_alpha, config.loss_delta)
        if num_others:
            compare = others_per_image if config.loss == "proxy_nca" else others_per_class
            others, original = compare(embeddings, *proxies.active(), config.proxy_bias_ratio, classes, *scale)
        else:
            others, original = None, proxies.original_proxies.index_select(0, classes)
        similarity = embeddings @ proxies.combine(original, rows).to(embeddings.dtype).T
        if config.loss == "proxy_nca":
            return proxy_nca_loss(similarity, groups.rows, *scale, others=others), similarity
        reduction, num_present = config.proxy_anchor_reduction, len(classes)
        others = (num_others, others if num_others else 0.0)
        return proxy_anchor_loss(similarity, groups.rows, *scale, reduction, num_present, others), similarity

    def _check_labels(self, labels, batch_size, trusted):
        if labels.shape != (batch_size,):
            raise ValueError(f"labels must have shape ({batch_size},), got {tuple(labels.shape)}")
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(f"labels must be integers, got {labels.dtype}")
        if trusted and (labels.device.type != "cpu" or torch.compiler.is_compiling()):
            return
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= self.config.num_classes:
            raise ValueError(f"labels must be in 0..{self.config.num_classes - 1}, got {low}..{high}")

    def commit_proxies(self, output: VPTSPMetricLearningOutput):
        """Write the proxy state's new rows that `forward` returned; once a batch, after the backward pass.

        [`VPTSPTrainer`] does it; a training loop of one's own has to, before its next forward pass.
        """
        if output.proxy_rows is not None:
            self.proxies.commit(output.proxy_classes, output.proxy_rows.detach())

    def refuse_unheard_hooks(self):
        """Raise a `ValueError` if there are hooks on a part that is never called as a whole."""
        check_hooks(self.vptsp.family, self.vptsp.backbone, self.vptsp.adapters)
        if hasattr(self, "proxies"):
            refuse_hooks(self.proxies, "the proxies are read and updated in parts. Register them on vptsp or its head")

    @property
    def offloaded_class_prompts(self) -> OffloadedClassPrompts | None:
        """The class prompts if they are in host memory; None where they are a parameter, or there are none."""
        store = getattr(self, "class_prompts", None)
        return store if isinstance(store, OffloadedClassPrompts) else None

    def save_pretrained(self, save_directory, is_main_process=True, **kwargs):
        """Save what is tuned, as [`VPTSPPreTrainedModel`] does; offloaded class prompts in a file of their own.

        `AutoModel` loads what was saved as a retriever, with the code beside it, and leaves the rest of it alone.
        """
        store = self.offloaded_class_prompts
        code = type(self.vptsp)
        own = {"AutoModel": f"{code.__module__.rpartition('.')[2]}.{code.__name__}"}
        self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), **own}
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if is_main_process:
            custom_object_save(self.vptsp, save_directory)  # the code that `auto_map` names
        if store is not None and is_main_process:
            with atomic_path(Path(save_directory) / CLASS_PROMPTS_NAME) as temporary:
                store.save(temporary)

    def load_saved(self, folder):
        super().load_saved(folder)
        self.load_beside(lambda name: Path(folder) / name)

    def load_beside(self, find):
        if self.offloaded_class_prompts is not None:
            path = Path(find(CLASS_PROMPTS_NAME))
            check_listed_file(path)
            self.offloaded_class_prompts.load(path)


__all__ = ["VPTSPForMetricLearning", "VPTSPMetricLearningOutput"]
