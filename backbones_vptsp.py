"""How prompts run through a frozen Hugging Face vision transformer, family by family.

VPT-deep throws the outputs at prompt positions away after every layer. Prompts therefore only ever act as keys and
values: they need no queries, no output projection and no MLP. `prompted_forward` uses that, and is exact: it computes
what concatenating prompts, running the whole layer and dropping their outputs would.

Shapes: B images, N tokens (CLS + patches), P prompts, D width, H heads, M distinct sets of prompts in a batch.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import nn
from transformers import AutoModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .linear_vptsp import fast_linear


class PromptKeyValue(NamedTuple):
    """Prompts of one layer as all that the layer makes of them: keys and values.

    Attributes:
        key: `(H, P, D / H)`, shared by all images, or `(M, H, P, D / H)`.
        value: Likewise.
    """

    key: torch.Tensor
    value: torch.Tensor


class ViTFamily:
    """`ViTModel`, which also serves the DINO checkpoints: pre-norm layers, one CLS token in front of the patches.

    A family is everything `prompted_forward` knows of a backbone: how to build it, how to embed an image, and for each
    layer its norms, its queries, keys and values, its attention output and its MLP. To support another family, write
    these methods for it and add it to `FAMILIES`.

    Attributes:
        num_prefix_tokens: Tokens in front of those of the patches.
        model_options: Arguments of the model class. Retrieval does not use a pooling layer.
    """

    num_prefix_tokens = 1
    model_options: ClassVar = {"add_pooling_layer": False}

    @classmethod
    def build(cls, config) -> nn.Module:
        """Backbone with random weights."""
        return AutoModel.from_config(config, **cls.model_options)

    @staticmethod
    def embed(backbone, pixel_values, interpolate_pos_encoding=False):
        """`(B, 3, height, width)` -> tokens with positions, `(B, N, D)`."""
        weight = backbone.embeddings.patch_embeddings.projection.weight
        return backbone.embeddings(pixel_values.to(weight.dtype), interpolate_pos_encoding=interpolate_pos_encoding)

    @staticmethod
    def layers(backbone):
        return backbone.layers

    @staticmethod
    def final_norm(backbone, hidden):
        return backbone.layernorm(hidden)

    @staticmethod
    def attention_norm(layer, hidden):
        return layer.layernorm_before(hidden)

    @staticmethod
    def query(layer, normed):
        return _split_heads(fast_linear(layer.attention.q_proj, normed), layer.attention.head_dim)

    @staticmethod
    def key_value(layer, normed):
        """Keys and values of normed tokens `(..., T, D)`, each `(..., H, T, D / H)`."""
        attention = layer.attention
        return (
            _split_heads(fast_linear(attention.k_proj, normed), attention.head_dim),
            _split_heads(fast_linear(attention.v_proj, normed), attention.head_dim),
        )

    @staticmethod
    def key_value_modules(layer):
        """The modules whose weights turn prompts into keys and values."""
        return layer.layernorm_before, layer.attention.k_proj, layer.attention.v_proj

    @staticmethod
    def attend(layer, query, key, value):
        """Attention of `(B, H, Q, D / H)` queries, projected: `(B, Q, D)`."""
        attention = layer.attention
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, _eager_attention)
        attended, _ = interface(attention, query, key, value, None, dropout=0.0, scaling=attention.scaling)
        return fast_linear(attention.o_proj, attended.flatten(2))

    @staticmethod
    def feed_forward(layer, hidden):
        """Norm and MLP, without the residual."""
        mlp = layer.mlp
        expanded = mlp.activation_fn(fast_linear(mlp.fc1, layer.layernorm_after(hidden)))
        return fast_linear(mlp.fc2, expanded)


FAMILIES = {"vit": ViTFamily}


def family_of(config):
    """The family of a backbone's configuration.

    Raises:
        ValueError: its model type is not supported.
    """
    if config.model_type not in FAMILIES:
        raise ValueError(f"backbone model type must be one of {', '.join(FAMILIES)}, got {config.model_type!r}")
    return FAMILIES[config.model_type]


def project_tokens(family, layer, hidden, num_queries=None):
    """Queries of the first `num_queries` tokens (None: of all), keys and values of all tokens of one layer.

    None of them depends on prompts, so for the first layer, all passes over an image can share them.
    """
    normed = family.attention_norm(layer, hidden)
    query = family.query(layer, normed if num_queries is None else normed[:, :num_queries])
    return query, *family.key_value(layer, normed)


def project_prompts(family, layer, prompts):
    """Keys and values of prompt tokens `(P, D)` or `(M, P, D)` in one layer: a [`PromptKeyValue`]."""
    return PromptKeyValue(*family.key_value(layer, family.attention_norm(layer, prompts)))


def prompted_forward(family, backbone, hidden, prompts, prompt_rows=None, prefix_only=False, first_layer=None):
    """Run the layers of a backbone with prompts in front of its tokens (VPT-deep).

    Args:
        family: Entry of `FAMILIES` that describes `backbone`.
        backbone: The vision transformer.
        hidden: `(B, N, D)`, output of `family.embed`.
        prompts: Prompt tokens of the first layers: `(P_i, D)` each where all images share them, or `(M, P_i, D)`
            with a set for each group of images. P_i may be 0, and layers past the end of the sequence have none.
            Where they are known already, [`PromptKeyValue`] instead.
        prompt_rows: `(B,)` int64, the set of each image; needed with `(M, P_i, D)`.
        prefix_only: Only the prefix tokens (CLS) of the last layer are wanted, so only they are computed.
        first_layer: `project_tokens` of the first layer, where it is known already.

    Returns:
        `(B, N, D)`, or `(B, family.num_prefix_tokens, D)` with `prefix_only`; after the final norm.
    """
    layers = family.layers(backbone)
    for index, layer in enumerate(layers):
        layer_prompts = prompts[index] if index < len(prompts) and _number(prompts[index]) else None
        num_queries = family.num_prefix_tokens if prefix_only and index == len(layers) - 1 else None
        projected = first_layer if index == 0 and num_queries is None else None
        arguments = (family, layer, hidden, layer_prompts, prompt_rows, num_queries, projected)
        if getattr(layer, "gradient_checkpointing", False) and torch.is_grad_enabled():
            hidden = layer._gradient_checkpointing_func(_prompted_layer, *arguments)
        else:
            hidden = _prompted_layer(*arguments)
    return family.final_norm(backbone, hidden)


def _prompted_layer(family, layer, hidden, prompts, prompt_rows, num_queries, projected):
    query, key, value = project_tokens(family, layer, hidden, num_queries) if projected is None else projected
    if prompts is not None:
        if not isinstance(prompts, PromptKeyValue):
            prompts = project_prompts(family, layer, prompts.to(hidden.dtype))
        key = torch.cat([_per_image(prompts.key, prompt_rows, len(hidden)), key], dim=2)
        value = torch.cat([_per_image(prompts.value, prompt_rows, len(hidden)), value], dim=2)
    hidden = hidden if num_queries is None else hidden[:, :num_queries]
    hidden = hidden + family.attend(layer, query, key, value)
    return hidden + family.feed_forward(layer, hidden)


def _number(prompts):
    """P, of tokens or of what became of them."""
    return (prompts.key if isinstance(prompts, PromptKeyValue) else prompts).shape[-2]


def _per_image(heads, prompt_rows, batch_size):
    """Keys or values of shared prompts `(H, P, D / H)` or of sets `(M, H, P, D / H)`, one view or row per image."""
    if heads.dim() == 3:
        return heads.expand(batch_size, *heads.shape)
    return heads.index_select(0, prompt_rows)


def _split_heads(projected, head_dim):
    return projected.unflatten(-1, (-1, head_dim)).transpose(-3, -2)


def _eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    weights = torch.softmax(query @ key.transpose(-2, -1) * scaling, dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights
