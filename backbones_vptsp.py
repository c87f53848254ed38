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
from torch.autograd.function import once_differentiable
from transformers import AutoModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


# ---- Linear layers
#
# On CPUs `torch.nn.functional.linear` multiplies float32 matrices with the BLAS library that PyTorch was built with.
# That of the usual builds (MKL) leaves AVX-512 unused on processors of other makers, where oneDNN, which is part of
# the same builds, is about twice as fast (`benchmarks/step.py` prints both). Same arithmetic, another order of sums.


def _onednn_linear():
    """oneDNN's product of dense matrices, `op(x, weight, bias, "none", [], "")`; None where PyTorch lacks it."""
    if not torch.backends.mkldnn.is_available():
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


_ONEDNN_LINEAR = _onednn_linear()


class _OneDNNLinear(torch.autograd.Function):
    """`x @ weight.T + bias` of float32 tensors on the CPU, with gradients of what needs them."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        weight_is_tuned = ctx.needs_input_grad[1]  # else its input need not be kept
        ctx.save_for_backward(x if weight_is_tuned else None, weight)
        return _ONEDNN_LINEAR(x, weight, bias, "none", [], "")

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        gradient = gradient.contiguous()
        rows = gradient.flatten(0, -2)
        to_x = _ONEDNN_LINEAR(gradient, weight.t(), None, "none", [], "") if needs_x else None
        to_weight = rows.t() @ x.flatten(0, -2) if needs_weight else None
        to_bias = rows.sum(0) if needs_bias else None
        return to_x, to_weight, to_bias


def runs_as_written(module: nn.Module) -> bool:
    """Whether calling a module is its class's `forward` and nothing else.

    False with hooks of any kind (accelerate's offloading, pruning, norms of weights, somebody's probe) and with a
    `forward` of the instance's own (accelerate again): then it has to be called, since what its parameters hold by
    themselves need not be what it computes with. Also false where this release of PyTorch keeps hooks elsewhere.
    """
    state = vars(module)
    return "forward" not in state and not any(state.get(hooks, True) for hooks in _HOOKS)


_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def fast_linear(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`layer(x)`, whatever `layer` is; where it is a plain linear layer, by oneDNN if that is at hand.

    Args:
        layer: `nn.Linear` with weight `(out, in)`; any other module, and one that is hooked or whose weight is no
            ordinary parameter (quantised, offloaded, recomputed), is simply called.
        x: `(..., in)`.

    Returns:
        `(..., out)`.
    """
    if (
        _ONEDNN_LINEAR is None
        or type(layer) is not nn.Linear
        or type(layer.weight) is not nn.Parameter
        or type(x) is not torch.Tensor
        or not x.device.type == layer.weight.device.type == "cpu"
        or not x.dtype == layer.weight.dtype == torch.float32
        or x.numel() == 0
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
        or not runs_as_written(layer)
        or _global_hooks()
    ):
        return layer(x)
    return _OneDNNLinear.apply(x, layer.weight, layer.bias)


def _global_hooks() -> bool:
    """Whether hooks are registered for all modules at once."""
    return any(getattr(nn.modules.module, f"_global{hooks}", True) for hooks in _HOOKS)


# ---- Families


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
        num_class_tokens: How many of these, the first ones, pooling `cls` takes. Each gets a head of its own.
        model_options: Arguments of the model class. Retrieval does not use a pooling layer.
    """

    num_prefix_tokens = 1
    num_class_tokens = 1
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
    def taken_apart(layer):
        """The modules of a layer whose `forward` these methods stand for, the layer itself among them."""
        return layer, layer.attention, layer.mlp

    @staticmethod
    def never_called(backbone):
        """The modules around the layers that no pass ever calls."""
        return (backbone, backbone.layers)

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
    def attend(layer, query, key, value):
        """Attention of `(B, H, Q, D / H)` queries, projected: `(B, Q, D)`."""
        return layer.dropout(_attention_output(layer.attention, query, key, value))

    @staticmethod
    def feed_forward(layer, hidden):
        """Norm and MLP, without the residual."""
        mlp = layer.mlp
        expanded = mlp.activation_fn(fast_linear(mlp.fc1, layer.layernorm_after(hidden)))
        return layer.dropout(fast_linear(mlp.fc2, expanded))


class DeiTFamily(ViTFamily):
    """`DeiTModel`, distilled DeiT (Touvron et al., ICML 2021): a CLS and a distillation token, layers as in ViT."""

    num_prefix_tokens = 2
    num_class_tokens = 2


class Dinov2Family(ViTFamily):
    """`Dinov2Model` (without registers): ViT's layers, with a scale on what each branch adds."""

    model_options: ClassVar = {}

    @staticmethod
    def embed(backbone, pixel_values, interpolate_pos_encoding=False):
        """As in ViT; transformers' own code would interpolate without being asked."""
        height, width = pixel_values.shape[2:]
        side = backbone.config.image_size
        if not interpolate_pos_encoding and (height, width) != (side, side):
            raise ValueError(f"Input image size ({height}*{width}) doesn't match model ({side}*{side}).")
        return backbone.embeddings(pixel_values)

    @staticmethod
    def layers(backbone):
        return backbone.encoder.layer

    @staticmethod
    def attention_norm(layer, hidden):
        return layer.norm1(hidden)

    @staticmethod
    def taken_apart(layer):
        return layer, layer.attention

    @staticmethod
    def never_called(backbone):
        return (backbone, backbone.encoder, backbone.encoder.layer)

    @staticmethod
    def attend(layer, query, key, value):
        return layer.drop_path(layer.layer_scale1(_attention_output(layer.attention, query, key, value)))

    @staticmethod
    def feed_forward(layer, hidden):
        return layer.drop_path(layer.layer_scale2(layer.mlp(layer.norm2(hidden))))


FAMILIES = {"vit": ViTFamily, "deit": DeiTFamily, "dinov2": Dinov2Family}


def family_of(config):
    """The family of a backbone's configuration.

    Raises:
        ValueError: its model type is not supported.
    """
    if config.model_type not in FAMILIES:
        raise ValueError(f"backbone model type must be one of {', '.join(FAMILIES)}, got {config.model_type!r}")
    return FAMILIES[config.model_type]


# ---- The prompted pass


def project_tokens(family, layer, hidden, num_queries=None):
    """Queries of the first `num_queries` tokens (None: of all), keys and values of all tokens of one layer.

    None of them depends on prompts, so for the first layer, all passes over an image can share them.
    """
    normed = family.attention_norm(layer, hidden)
    query = family.query(layer, normed if num_queries is None else normed[:, :num_queries])
    return query, *family.key_value(layer, normed)


def project_prompts(family, layer, prompts):
    """Keys and values of prompt tokens `(P, D)` or `(M, P, D)` in one layer: a [`PromptKeyValue`].

    Where the layer has to be called as a whole, there are none apart from it: the tokens, as they are.
    """
    if not can_take_apart(family, layer):
        return prompts
    return PromptKeyValue(*family.key_value(layer, family.attention_norm(layer, prompts)))


def can_take_apart(family, layer) -> bool:
    """Whether a layer's parts may be computed one by one: nothing waits for the call of what contains them."""
    return all(runs_as_written(module) for module in family.taken_apart(layer))


def check_hooks(family, backbone):
    """Raise where a hook would never run.

    Raises:
        ValueError: there is a forward hook on the backbone as a whole, or on what holds its layers.
    """
    for module in family.never_called(backbone):
        # those of accelerate only move tensors between devices, and lie on the parts as well
        if not runs_as_written(module) and not hasattr(module, "_hf_hook"):
            raise ValueError(
                f"hooks on {type(module).__name__} never run: the backbone's parts are called one by one. Register "
                "them on its embeddings, its layers or their parts"
            )


def append_prompts(hidden, prompts, prompt_rows=None):
    """Prompts as tokens, for VPT-shallow: behind the others, so that these keep their places.

    Order means nothing to the layers, since positions are added before.

    Args:
        hidden: `(B, N, D)`.
        prompts: `(P, D)`, or `(M, P, D)` with a set for each group of images.
        prompt_rows: `(B,)` int64, the set of each image; needed with `(M, P, D)`.

    Returns:
        `(B, N + P, D)`.
    """
    return torch.cat([hidden, _per_image(prompts.to(hidden.dtype), prompt_rows, hidden.shape[0])], dim=1)


def prompted_forward(
    family, backbone, hidden, prompts, prompt_rows=None, prefix_only=False, first_layer=None, adapters=()
):
    """Run the layers of a backbone with prompts in front of its tokens (VPT-deep).

    Args:
        family: Entry of `FAMILIES` that describes `backbone`.
        backbone: The vision transformer.
        hidden: `(B, N, D)`, output of `family.embed`.
        prompts: Prompt tokens of the first layers: `(P_i, D)` each where all images share them, or `(M, P_i, D)`
            with a set for each group of images. P_i may be 0, and layers past the end of the sequence have none.
            Where they are known already, [`PromptKeyValue`] instead.
        prompt_rows: `(B,)` int64, the set of each image; needed with `(M, P_i, D)`.
        prefix_only: Only the class tokens (CLS) of the last layer are wanted, so only they are computed.
        first_layer: `project_tokens` of the first layer, where it is known already.
        adapters: Modules that turn the tokens in front of the MLP and its output into another output, for as many
            last layers as there are adapters.

    Returns:
        `(B, N, D)`, or `(B, family.num_class_tokens, D)` with `prefix_only`; after the final norm.

    Raises:
        ValueError: hooks on the backbone, or on an adapted layer, could not be run.
    """
    check_hooks(family, backbone)
    layers = family.layers(backbone)
    first_adapted = len(layers) - len(adapters)
    for index, layer in enumerate(layers):
        layer_prompts = prompts[index] if index < len(prompts) and _number(prompts[index]) else None
        num_queries = family.num_class_tokens if prefix_only and index == len(layers) - 1 else None
        projected = first_layer if index == 0 and num_queries is None else None
        adapter = adapters[index - first_adapted] if index >= first_adapted else None
        arguments = (family, layer, hidden, layer_prompts, prompt_rows, num_queries, projected, adapter)
        if getattr(layer, "gradient_checkpointing", False) and torch.is_grad_enabled():
            hidden = layer._gradient_checkpointing_func(_prompted_layer, *arguments)
        else:
            hidden = _prompted_layer(*arguments)
    return family.final_norm(backbone, hidden)


def _prompted_layer(family, layer, hidden, prompts, prompt_rows, num_queries, projected, adapter):
    if not can_take_apart(family, layer):
        return _whole_layer(layer, hidden, prompts, prompt_rows, num_queries, adapter)
    if prompts is None or isinstance(prompts, PromptKeyValue) or projected is not None or hidden.shape[0] > 1:
        query, key, value = project_tokens(family, layer, hidden, num_queries) if projected is None else projected
        if prompts is not None:
            key, value = _with_prompts(family, layer, key, value, prompts, prompt_rows, hidden)
    else:  # of a single image, prompts are as many rows as tokens are: one product for both
        prompts = _per_image(prompts.to(hidden.dtype), prompt_rows, 1)
        normed = family.attention_norm(layer, torch.cat([prompts, hidden], dim=1))
        first, last = prompts.shape[1], None if num_queries is None else prompts.shape[1] + num_queries
        query, (key, value) = family.query(layer, normed[:, first:last]), family.key_value(layer, normed)
    hidden = hidden if num_queries is None else hidden[:, :num_queries]
    hidden = hidden + family.attend(layer, query, key, value)
    output = family.feed_forward(layer, hidden)
    return hidden + (output if adapter is None else adapter(hidden, output))


def _whole_layer(layer, hidden, prompts, prompt_rows, num_queries, adapter):
    """The plain way, for a layer with hooks (or another `forward`) that see it as a whole: with the prompts among the
    tokens, in front, their outputs thrown away."""
    if adapter is not None:
        raise ValueError(f"hooks on {type(layer).__name__} or its attention and MLP don't go with an adapter on it")
    number = 0 if prompts is None else _number(prompts)
    if isinstance(prompts, PromptKeyValue):
        raise ValueError(
            f"a hook was put on {type(layer).__name__} after its prompts' keys and values were computed: compute "
            "them again"
        )
    if number:
        tokens = _per_image(prompts.to(hidden.dtype), prompt_rows, hidden.shape[0])
        hidden = torch.cat([tokens.to(hidden.device), hidden], dim=1)
    output = layer(hidden)
    return output[:, number:] if num_queries is None else output[:, number : number + num_queries]


def _with_prompts(family, layer, key, value, prompts, prompt_rows, hidden):
    """Keys and values of all tokens, those of prompts in front: each `(B, H, P + N, D / H)`."""
    if not isinstance(prompts, PromptKeyValue):
        prompts = project_prompts(family, layer, prompts.to(hidden.dtype))
    elif prompts.key.dtype != key.dtype:
        raise ValueError(f"keys and values of prompts are {prompts.key.dtype}, those of images {key.dtype}")
    key = torch.cat([_per_image(prompts.key, prompt_rows, key.shape[0]), key], dim=2)
    return key, torch.cat([_per_image(prompts.value, prompt_rows, key.shape[0]), value], dim=2)


def _number(prompts):
    """P, of tokens or of what became of them."""
    return (prompts.key if isinstance(prompts, PromptKeyValue) else prompts).shape[-2]


def _per_image(prompts, prompt_rows, batch_size):
    """What all images share `(...)`, or sets of which each image has one `(M, ...)`: one view or row per image."""
    if prompt_rows is None:
        return prompts.expand(batch_size, *prompts.shape)
    return prompts.index_select(0, prompt_rows)


def _attention_output(attention, query, key, value):
    interface = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, _eager_attention)
    dropout = attention.attention_dropout if attention.training else 0.0
    attended, _ = interface(attention, query, key, value, None, dropout=dropout, scaling=attention.scaling)
    return fast_linear(attention.o_proj, attended.flatten(2))


def _split_heads(projected, head_dim):
    return projected.unflatten(-1, (-1, head_dim)).transpose(-3, -2)


def _eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    weights = torch.softmax(query @ key.transpose(-2, -1) * scaling, dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights
