"""The prompted vision transformer as one would write it first: what the benchmarks compare with.

Prompts are concatenated in front of the tokens, every layer runs whole (transformers' own code, fused attention), the
outputs at prompt positions are dropped, and both passes start from the pixels.
"""

import torch

from vptsp.losses.proxy_losses import proxy_anchor_loss
from vptsp.training.model import VPTSPMetricLearningOutput
from vptsp.training.proxies import group_by_class


def encode(model, pixel_values, tokens_of_layers, prompt_rows=None):
    """Pooled CLS features `(B, D)`.

    Args:
        model: A `VPTSPModel` with CLS pooling, for its backbone.
        pixel_values: `(B, 3, S, S)`.
        tokens_of_layers: Prompts of each layer, `(P_i, D)` or `(M, P_i, D)`.
        prompt_rows: `(B,)` int64, with `(M, P_i, D)`.
    """
    hidden = model.backbone.embeddings(pixel_values)
    for index, layer in enumerate(model.backbone.layers):
        prompts = tokens_of_layers[index] if index < len(tokens_of_layers) else None
        if prompts is None or prompts.shape[-2] == 0:
            hidden = layer(hidden)
            continue
        per_image = prompts.expand(len(hidden), -1, -1) if prompt_rows is None else prompts[prompt_rows]
        hidden = layer(torch.cat([per_image.to(hidden.dtype), hidden], dim=1))[:, prompts.shape[-2] :]
    return model.backbone.layernorm(hidden)[:, 0]


def forward(model, pixel_values, labels, images_per_class):
    """`VPTSPForMetricLearning.forward` with both passes done naively; the same outputs to rounding."""
    retriever = model.vptsp
    embeddings = retriever.head(encode(retriever, pixel_values, retriever.prompts()))
    groups = group_by_class(labels, images_per_class)
    prompts = model.class_prompts(groups.classes)
    vectors = model.proxy_head(encode(retriever, pixel_values, prompts, groups.rows))
    with torch.autocast(embeddings.device.type, enabled=False):
        rows = model.proxies.new_rows(vectors, groups)
        proxies = model.proxies.proxies(groups.classes, rows)
        loss = proxy_anchor_loss(embeddings @ proxies.T, labels, model.config.loss_alpha, model.config.loss_delta)
    return VPTSPMetricLearningOutput(loss=loss, embeddings=embeddings, proxy_classes=groups.classes, proxy_rows=rows)


def forward_without_prompts(model, pixel_values, labels, loss_function):
    """Full fine-tuning with Proxy-Anchor: transformers' own forward pass, all weights trained."""
    backbone = model.vptsp.backbone
    embeddings = model.vptsp.head(backbone(pixel_values).last_hidden_state[:, 0])
    with torch.autocast(embeddings.device.type, enabled=False):
        loss = loss_function(embeddings @ model.proxies.proxies().T, labels)
    return VPTSPMetricLearningOutput(loss=loss, embeddings=embeddings)
