"""The backbone that a retriever was tuned on, as a model of its own: the line that tuning has to beat."""

from __future__ import annotations

from ..data_scripts.data_errors import DataError
from ..modeling_vptsp import VPTSPModel
from .embedder import Embedder


def backbone_alone(embedder):
    """The pretrained backbone of a retriever, on the same pixels: its image processor, its size, its pooling.

    Tuning may have changed the retriever's own backbone (BitFit, LoRA, full fine-tuning), so it is loaded anew from
    where the retriever says it came from.

    Args:
        embedder: [`Embedder`] of a retriever.

    Returns:
        [`Embedder`] on the same device, in the same dtype.

    Raises:
        DataError: there is no retriever, or it has its backbone with it, tuned, and doesn't say what it was.
        OSError: the backbone is not to be had.
    """
    if embedder.backbone_only:
        raise DataError(f"{embedder.name} is a bare backbone: there is nothing that tuning has brought")
    config, model = embedder.model.config, embedder.model
    if config.backbone is not None:
        model = VPTSPModel.from_backbone(
            config.backbone,
            revision=config.backbone_revision,
            image_size=config.backbone_config.image_size,
            pooling=config.pooling,
            prompt_depth=0,
            embedding_dim=1,
        )
    elif config.changes_backbone:
        raise DataError(
            f"the retriever {embedder.name} has its tuned backbone saved along and doesn't say which pretrained one "
            "it was tuned on: its backbone alone can't be shown"
        )
    return Embedder(
        model,
        embedder.preprocess.processor,
        config.backbone or embedder.name,
        backbone_only=True,
        device=embedder.device,
        dtype=embedder.dtype,
        batch_size=embedder.batch_size,
        max_image_pixels=embedder.preprocess.max_image_pixels,
        views=embedder.views,
    )


__all__ = ["backbone_alone"]
