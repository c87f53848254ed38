"""How prompts run through a frozen Hugging Face vision transformer, family by family.

VPT-deep throws the outputs at prompt positions away after every layer. Prompts therefore only ever act as keys and
values: they need no queries, no output projection and no MLP. `prompted_forward` uses that, and is exact: it computes
what concatenating prompts, running the whole layer and dropping their outputs would.

Shapes: B images, N tokens (CLS + patches), P prompts, D width, H heads, M distinct sets of prompts in a batch.
"""

from __future__ import annotations

import math
import os
import threading
import time
from difflib import get_close_matches
from typing import ClassVar, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import AutoModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging


logger = logging.get_logger(__name__)


# ---- Linear layers
#
# For float32 matrices on CPUs PyTorch brings two libraries along: the BLAS that it was built with (MKL in the usual
# builds), which `torch.nn.functional.linear` uses, and oneDNN. Which is faster depends on processor, threads and
# shape, by up to 25 % one way and 100 % the other. So both are timed when a product of a new kind first comes up, in
# some 40 ms. Sums come in another order in each, so another choice changes last bits: `VPTSP_LINEAR` forces one, and
# training keeps its choices in checkpoints.

_LEAST_WORK = 4e6  # multiplications: smaller products go to PyTorch's own, whose call is the shorter one
_TIMED_WORK = 1.5e8  # what a product that is timed has at most, of a larger one's first rows
_TIMED_ROUNDS = 7
_LEAST_GAIN = 0.96  # of PyTorch's time: less is noise


def _onednn_product():
    """oneDNN's product of dense matrices, `op(x, weight, bias, "none", [], "")`; None where PyTorch lacks it.

    The operator is not public: what a release without it, or with another form of it, does is in `test_fast_path.py`.
    """
    operator = _onednn_operator() if torch.backends.mkldnn.is_available() else None
    if operator is None:
        return None
    x, weight = torch.ones(2, 3, device="cpu"), torch.ones(4, 3, device="cpu")
    try:
        right = operator(x, weight, None, "none", [], "").tolist() == [[3.0] * 4] * 2
    except (RuntimeError, TypeError):
        right = False
    return operator if right else None


def _onednn_operator():
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def _processor_name() -> str:
    """Empty where this release of PyTorch does not tell."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return str(capabilities.get("cpu_name", ""))


class LinearProducts:
    """Which library multiplies the float32 matrices of linear layers on the CPU: `vptsp.linear_products`.

    Attributes:
        available: The libraries that this PyTorch has.
        choices: Of each product that was timed, `(kind, rows, in, out, threads)`, the library. `kind` is `output`,
            `input` or `weight` (gradients of these); `rows` are rounded up to a power of two, up to what is timed.
    """

    def __init__(self, library):
        self._onednn = _onednn_product()
        self.available = ("torch",) if self._onednn is None else ("torch", "onednn")
        self._timing = threading.Lock()
        self.choices = {}
        self.library = library

    @property
    def library(self):
        """`measured` (the faster one), `torch` or, where there is one, `onednn`; `VPTSP_LINEAR` sets it at the start.

        Raises:
            ValueError: set to anything else.
        """
        return self._library

    @library.setter
    def library(self, library):
        if library not in ("measured", *self.available):
            possible = ", ".join(("measured", *self.available))
            raise ValueError(f"VPTSP_LINEAR must be one of {possible} with this PyTorch, got {library!r}")
        self._library = "torch" if self._onednn is None else library

    def output(self, x, weight, bias):
        """`x @ weight.T + bias`: `(..., in)`, `(out, in)`, `(out,)` or None -> `(..., out)`."""
        return self._product("output", x, weight, bias)

    def to_input(self, gradient, weight):
        """`gradient @ weight`, the gradient of `x`: `(..., out)`, `(out, in)` -> `(..., in)`."""
        return self._product("input", gradient, weight)

    def to_weight(self, gradient, x):
        """`gradient.T @ x`, the gradient of `weight`: `(rows, out)`, `(rows, in)` -> `(out, in)`."""
        return self._product("weight", gradient, x)

    def saved(self):
        """The choices in plain values, for a checkpoint, with what they hold for."""
        return {"machine": self._machine(), "choices": [[*key, library] for key, library in self.choices.items()]}

    def restore(self, saved):
        """Choose as a run did that goes on here; on another processor or release of PyTorch, anew."""
        if saved["machine"] == self._machine():
            self.choices |= {tuple(key): library for *key, library in saved["choices"]}

    @staticmethod
    def _machine():
        return f"{_processor_name()}, PyTorch {torch.__version__}"

    def _product(self, kind, a, b, bias=None):
        onednn = self._library == "onednn" or (
            self._library == "measured" and self._choice(kind, a, b, bias) == "onednn"
        )
        return (self._by_onednn if onednn else self._by_torch)(kind, a, b, bias)

    def _choice(self, kind, a, b, bias):
        rows = a.numel() // a.shape[-1]
        if a.numel() * (b.numel() / (rows if kind == "weight" else a.shape[-1])) < _LEAST_WORK:
            return "torch"
        inputs, outputs = b.shape[1], a.shape[1] if kind == "weight" else b.shape[0]
        rows = min(1 << (rows - 1).bit_length(), max(1, int(_TIMED_WORK / (inputs * outputs))))
        key = (kind, rows, inputs, outputs, torch.get_num_threads())
        if key not in self.choices:
            with self._timing:
                if key not in self.choices:
                    self.choices[key] = self._time(key, a, b, bias)
        return self.choices[key]

    @torch.no_grad()
    def _time(self, key, a, b, bias):
        """The faster library for a product, by its first rows."""
        kind, rows, inputs, outputs, threads = key
        a = a.detach().flatten(0, -2)[:rows]
        b = b.detach()[:rows] if kind == "weight" else b.detach()
        least = {"torch": math.inf, "onednn": math.inf}
        clock = time.thread_time if threads == 1 else time.perf_counter  # the first one leaves out other processes
        for turn in range(1 + _TIMED_ROUNDS):  # the first one prepares kernels
            for library, product in (("torch", self._by_torch), ("onednn", self._by_onednn)):
                begin = clock()
                product(kind, a, b, bias)
                if turn:
                    least[library] = min(least[library], clock() - begin)
        library = "onednn" if least["onednn"] < _LEAST_GAIN * least["torch"] else "torch"
        logger.info(
            "product %s of %d rows, %d inputs, %d outputs, %d threads: PyTorch's own %.2f ms, oneDNN %.2f ms: %s",
            kind, len(a), inputs, outputs, threads, 1e3 * least["torch"], 1e3 * least["onednn"], library,
        )  # fmt: skip
        return library

    def _by_torch(self, kind, a, b, bias):
        if kind == "output":
            return nn.functional.linear(a, b, bias)
        return a @ b if kind == "input" else a.t() @ b

    def _by_onednn(self, kind, a, b, bias):
        if kind == "weight":
            a = a.t()
        return self._onednn(a, b if kind == "output" else b.t(), bias, "none", [], "")


linear_products = LinearProducts(os.environ.get("VPTSP_LINEAR", "measured"))


class _Linear(torch.autograd.Function):
    """`x @ weight.T + bias` of float32 tensors on the CPU, with gradients of what needs them."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        weight_is_tuned = ctx.needs_input_grad[1]  # else its input need not be kept
        ctx.save_for_backward(x if weight_is_tuned else None, weight)
        return linear_products.output(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        gradient = gradient.contiguous()
        rows = gradient.flatten(0, -2)
        to_x = linear_products.to_input(gradient, weight) if needs_x else None
        to_weight = linear_products.to_weight(rows, x.flatten(0, -2)) if needs_weight else None
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
    """`layer(x)`, whatever `layer` is; a plain linear layer by [`linear_products`], that is the faster library.

    Args:
        layer: `nn.Linear` with weight `(out, in)`; any other module, and one that is hooked or whose weight is no
            ordinary parameter (quantised, offloaded, recomputed), is simply called.
        x: `(..., in)`.

    Returns:
        `(..., out)`.
    """
    if (
        linear_products.library == "torch"
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
    return _Linear.apply(x, layer.weight, layer.bias)


def _global_hooks() -> bool:
    """Whether hooks are registered for all modules at once."""
    return any(getattr(nn.modules.module, f"_global{hooks}", True) for hooks in _HOOKS)


# ---- Attention
#
# PyTorch's fused attention is slow in bfloat16 on CPUs, above all backwards: where processors multiply bfloat16
# matrices by themselves, plain products of blocks of images are faster (`benchmarks/bfloat16_attention.py`).

_BLOCK_WEIGHTS = 1_000_000  # attention weights of a block of images: 2 MB, near a core's cache


def _multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for it; False where this release of PyTorch does not tell."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


_MULTIPLIES_BFLOAT16 = _multiplies_bfloat16()


def fastest_dtype(device: torch.device | str) -> torch.dtype:
    """What `dtype: auto` computes in: `torch.bfloat16` where a device multiplies it by itself, else `torch.float32`.

    These are processors with AVX512-BF16 or AMX, and NVIDIA's GPUs from compute capability 8.0. What other devices
    do is not known.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if kind == "cpu" and _MULTIPLIES_BFLOAT16 else torch.float32


class _BlockwiseAttention(torch.autograd.Function):
    """Attention as products of matrices, for a block of images at a time, forward and backward.

    Weights are computed again for the backward pass: they are never all in memory. Scores and weights are rounded to
    the tensors' dtype, where PyTorch's fused attention keeps them in float32: in bfloat16 the error of the output is
    0.004 instead of 0.002, relative, about that of rounding the output.
    """

    @staticmethod
    def forward(ctx, query, key, value, scaling):
        ctx.save_for_backward(query, key, value)
        ctx.scaling = scaling
        output = torch.empty_like(query)
        with torch.autocast(query.device.type, enabled=False):  # which would compute softmax in float32
            for queries, keys, values, attended in _blocks(query, key, value, output):
                weights = torch.softmax((queries * scaling) @ keys.transpose(-2, -1), dim=-1)
                attended.copy_(weights @ values)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        tensors = ctx.saved_tensors
        gradients = [torch.empty_like(tensor) for tensor in tensors]
        blocks = _blocks(*tensors, gradient, *gradients)
        for query, key, value, to_output, to_query, to_key, to_value in blocks:
            query = query * ctx.scaling
            weights = torch.softmax(query @ key.transpose(-2, -1), dim=-1)
            to_value.copy_(weights.transpose(-2, -1) @ to_output)
            to_weights = to_output @ value.transpose(-2, -1)
            to_weights -= (to_weights * weights).sum(-1, keepdim=True)
            to_scores = to_weights.mul_(weights)
            to_query.copy_((to_scores @ key).mul_(ctx.scaling))
            to_key.copy_(to_scores.transpose(-2, -1) @ query)
        return *gradients, None


def _blocks(query, key, *others):
    """Tensors `(B, H, ...)` as tuples of them with some images each, no more than `_BLOCK_WEIGHTS` stands for."""
    _, num_heads, num_queries, _ = query.shape
    images = max(1, _BLOCK_WEIGHTS // (num_heads * num_queries * key.shape[2]))
    return zip(*(tensor.split(images) for tensor in (query, key, *others)), strict=True)


def _goes_blockwise(implementation, dropout, query, key, value):
    """Whether [`_BlockwiseAttention`] stands for what the backbone is set to, and is faster."""
    return (
        _MULTIPLIES_BFLOAT16
        and implementation == "sdpa"
        and not dropout
        and all(type(x) is torch.Tensor and x.device.type == "cpu" and x.numel() for x in (query, key, value))
        and query.dtype == key.dtype == value.dtype == torch.bfloat16
        and not torch.compiler.is_compiling()
    )


# ---- Families


class PromptKeyValue(NamedTuple):
    """Prompts of one layer as all that the layer makes of them: keys and values.

    Attributes:
        key: `(H, P, D / H)`, shared by all images, or `(M, H, P, D / H)`.
        value: Likewise.
    """

    key: torch.Tensor
    value: torch.Tensor


class ImageTokens(NamedTuple):
    """Images as the layers get them.

    Attributes:
        hidden: `(B, N, D)`.
        rotation: Cosines and sines, `(N, D / H)` each, of the angles by which every layer rotates its queries and keys
            (rotary positions). What has no position, as prompts, has cosine 1 and sine 0. None: no layer rotates.
    """

    hidden: torch.Tensor
    rotation: tuple[torch.Tensor, torch.Tensor] | None = None


class ViTFamily:
    """`ViTModel`, which also serves the DINO checkpoints: pre-norm layers, one CLS token in front of the patches.

    A family is everything `prompted_forward` knows of a backbone: how to build it, how to embed an image, for each
    layer its norms, its queries, keys and values, its attention output and its MLP, and what may be pooled. To support
    another family, write these for it and add it to `FAMILIES` (`vptsp.register_family` does).

    Args:
        config: The backbone's configuration.

    Attributes:
        num_prefix_tokens: Tokens in front of those of the patches.
        num_class_tokens: How many of these, the first ones, pooling `cls` takes. Each gets a head of its own.
        has_head: Whether the model has a pooling head of its own, for pooling `head`.
        default_pooling: What the model's authors take as its description of an image.
        image_size: Side of the images in pixels, or height and width.
        position_table: Name of the tensor of position embeddings that are interpolated once for images of another
            size, when weights are loaded; None where each pass finds positions for the size that it gets.
        interpolates_positions: Whether positions for other sizes are interpolated, not computed.
        model_options: Arguments of the model class. A dense layer on CLS, BERT's pooler, is left out.
    """

    num_prefix_tokens = 1
    num_class_tokens = 1
    has_head = False
    default_pooling = "cls"
    position_table = "embeddings.position_embeddings"
    interpolates_positions = True
    model_options: ClassVar = {"add_pooling_layer": False}

    def __init__(self, config):
        self.config = config

    @property
    def image_size(self):
        return self.config.image_size

    def build(self, config) -> nn.Module:
        """Backbone with random weights."""
        return AutoModel.from_config(config, **self.model_options)

    # ---- What goes in

    def embed(self, backbone, pixel_values, interpolate_pos_encoding=False):
        """`(B, 3, height, width)` -> tokens with positions (unless these are rotary), `(B, N, D)`."""
        weight = backbone.embeddings.patch_embeddings.projection.weight
        return backbone.embeddings(pixel_values.to(weight.dtype), interpolate_pos_encoding=interpolate_pos_encoding)

    def rotation(self, backbone, pixel_values, hidden):
        """Rotary positions of the tokens that `embed` gave, as in [`ImageTokens`]; None without."""

    def check_size(self, pixel_values, interpolate_pos_encoding):
        """Raise a `ValueError` for images of another size than the model's, unless such are asked for.

        Where transformers would take them without being asked, or stumble over shapes.
        """
        size = self.image_size
        sides = (size, size) if isinstance(size, int) else tuple(size)
        height, width = pixel_values.shape[2:]
        if not interpolate_pos_encoding and (height, width) != sides:
            raise ValueError(f"Input image size ({height}*{width}) doesn't match model ({sides[0]}*{sides[1]}).")

    # ---- The layers

    def layers(self, backbone):
        return backbone.layers

    def attention(self, layer):
        """The module with `q_proj`, `k_proj` and `v_proj`."""
        return layer.attention

    def taken_apart(self, layer):
        """The modules of a layer whose `forward` these methods stand for, the layer itself among them."""
        return layer, self.attention(layer)

    def never_called(self, backbone):
        """The modules around the layers that no pass ever calls."""
        return (backbone, backbone.layers)

    def attention_norm(self, layer, hidden):
        return layer.layernorm_before(hidden)

    def query(self, layer, normed):
        """Queries of normed tokens `(..., T, D)`, `(..., H, T, D / H)`, not yet rotated."""
        own = self.attention(layer)
        return _split_heads(fast_linear(own.q_proj, normed), own.head_dim)

    def key_value(self, layer, normed):
        """Keys and values, likewise."""
        own = self.attention(layer)
        key, value = fast_linear(own.k_proj, normed), fast_linear(own.v_proj, normed)
        return _split_heads(key, own.head_dim), _split_heads(value, own.head_dim)

    def attend(self, layer, query, key, value):
        """Attention of `(B, H, Q, D / H)` queries, projected: `(B, Q, D)`."""
        own = layer.attention
        return layer.dropout(attention_output(own, own.o_proj, own.scaling, own.attention_dropout, query, key, value))

    def feed_forward(self, layer, hidden):
        """Norm and MLP, without the residual."""
        return layer.dropout(mlp_output(layer.mlp, layer.layernorm_after(hidden)))

    # ---- What comes out

    def final_norm(self, backbone, hidden):
        return backbone.layernorm(hidden)

    def head(self, backbone, patches):
        """The model's own pooling of normed patch tokens: `(B, N - num_prefix_tokens, D)` -> `(B, D)`."""
        raise NotImplementedError

    def check_pooling(self, pooling):
        """Raise a `ValueError` that says why, if this family can't pool like that."""
        reasons = {}
        if not self.num_class_tokens:
            reasons |= dict.fromkeys(("cls", "cls+mean"), "it has no class token")
        if not self.has_head:
            reasons["head"] = "it has no pooling head of its own"
        if pooling in reasons:
            possible = [name for name in ("cls", "mean", "cls+mean", "head") if name not in reasons]
            raise ValueError(
                f"pooling must be one of {', '.join(possible)} with this {self.config.model_type} backbone, got "
                f"{pooling!r}: {reasons[pooling]}"
            )

    def is_used(self, name, pooling):
        """Whether a tensor of the backbone takes part in any pass: not what pretraining alone used, nor a head that
        is not pooled by. What takes no part can't be tuned."""
        return name != "embeddings.mask_token" and (pooling == "head" or not name.startswith("head."))


class DeiTFamily(ViTFamily):
    """`DeiTModel`, distilled DeiT (Touvron et al., ICML 2021): a CLS and a distillation token, layers as in ViT."""

    num_prefix_tokens = 2
    num_class_tokens = 2


class ViTMSNFamily(ViTFamily):
    """`ViTMSNModel` (Assran et al., ECCV 2022): as ViT."""

    model_options: ClassVar = {}


class IJepaFamily(ViTFamily):
    """`IJepaModel` (Assran et al., CVPR 2023): ViT's layers without a class token; the mean over the patches."""

    num_prefix_tokens = 0
    num_class_tokens = 0
    default_pooling = "mean"


class Dinov2Family(ViTFamily):
    """`Dinov2Model` (without registers): ViT's layers, with a scale on what each branch adds."""

    model_options: ClassVar = {}

    def embed(self, backbone, pixel_values, interpolate_pos_encoding=False):
        self.check_size(pixel_values, interpolate_pos_encoding)
        return backbone.embeddings(pixel_values)

    def layers(self, backbone):
        return backbone.encoder.layer

    def never_called(self, backbone):
        return (backbone, backbone.encoder, backbone.encoder.layer)

    def attention_norm(self, layer, hidden):
        return layer.norm1(hidden)

    def attend(self, layer, query, key, value):
        own = layer.attention
        output = attention_output(own, own.o_proj, own.scaling, own.attention_dropout, query, key, value)
        return layer.drop_path(layer.layer_scale1(output))

    def feed_forward(self, layer, hidden):
        return layer.drop_path(layer.layer_scale2(mlp_output(layer.mlp, layer.norm2(hidden))))


class Dinov2WithRegistersFamily(Dinov2Family):
    """`Dinov2WithRegistersModel` (Darcet et al., ICLR 2024): registers between CLS and patches."""

    @property
    def num_prefix_tokens(self):
        return 1 + self.config.num_register_tokens


class DINOv3ViTFamily(Dinov2WithRegistersFamily):
    """`DINOv3ViTModel` (Siméoni et al., 2025): rotary positions of the patches, none of CLS and registers."""

    position_table = None
    interpolates_positions = False

    def rotation(self, backbone, pixel_values, hidden):
        return _with_unrotated(backbone.rope_embeddings(pixel_values), in_front=self.num_prefix_tokens)

    def layers(self, backbone):
        return backbone.model.layer

    def never_called(self, backbone):
        return (backbone, backbone.model, backbone.model.layer)

    def attend(self, layer, query, key, value):
        own = layer.attention
        output = attention_output(own, own.o_proj, own.scaling, own.dropout, query, key, value)
        return layer.drop_path(layer.layer_scale1(output))

    def final_norm(self, backbone, hidden):
        return backbone.norm(hidden)


class CLIPFamily(ViTFamily):
    """`CLIPVisionModel` (Radford et al., ICML 2021): a norm in front of the layers, which have other names.

    transformers norms CLS alone behind them. Here `mean` takes the patches through the same norm.
    """

    position_table = "embeddings.position_embedding.weight"
    model_options: ClassVar = {}

    def embed(self, backbone, pixel_values, interpolate_pos_encoding=False):
        embedded = backbone.embeddings(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        return backbone.pre_layrnorm(embedded)

    def layers(self, backbone):
        return backbone.encoder.layers

    def attention(self, layer):
        return layer.self_attn

    def never_called(self, backbone):
        return (backbone, backbone.encoder, backbone.encoder.layers)

    def attention_norm(self, layer, hidden):
        return layer.layer_norm1(hidden)

    def attend(self, layer, query, key, value):
        own = self.attention(layer)
        return attention_output(own, own.out_proj, own.scale, own.dropout, query, key, value)

    def feed_forward(self, layer, hidden):
        return mlp_output(layer.mlp, layer.layer_norm2(hidden))

    def final_norm(self, backbone, hidden):
        return backbone.post_layernorm(hidden)


class MLCDFamily(CLIPFamily):
    """`MLCDVisionModel` (An et al., ECCV 2024): CLIP's layers with rotary positions, CLS at a learned one."""

    position_table = None
    interpolates_positions = False

    def embed(self, backbone, pixel_values, interpolate_pos_encoding=False):
        self.check_size(pixel_values, interpolate_pos_encoding)
        return backbone.pre_layrnorm(backbone.embeddings(pixel_values))

    def rotation(self, backbone, pixel_values, hidden):
        own = backbone.class_pos_emb
        if own.is_meta:
            raise ValueError(
                "weights of mlcd_vision_model can't be offloaded: class_pos_emb lies on the model itself, whose hooks "
                "never run"
            )
        rows, columns = (
            torch.arange(side // self.config.patch_size, device=hidden.device) for side in pixel_values.shape[2:]
        )
        places = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)
        cos, sin = backbone.vision_rotary_embedding(hidden, places)
        own = own.repeat(1, 2)
        return torch.cat([own.cos(), cos]), torch.cat([own.sin(), sin])


class SiglipFamily(CLIPFamily):
    """`SiglipVisionModel` (Zhai et al., ICCV 2023; SigLIP 2 of a fixed size): CLIP's layers, no class token, and a
    head in which a learned query attends to the patches."""

    num_prefix_tokens = 0
    num_class_tokens = 0

    @property
    def has_head(self):
        return getattr(self.config, "vision_use_head", True)  # releases without the field always have the head

    @property
    def default_pooling(self):
        return "head" if self.has_head else "mean"

    def embed(self, backbone, pixel_values, interpolate_pos_encoding=False):
        self.check_size(pixel_values, interpolate_pos_encoding)
        return backbone.embeddings(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)

    def head(self, backbone, patches):
        attentions = [module for module in backbone.head.modules() if isinstance(module, nn.MultiheadAttention)]
        if any(own.out_proj.weight.is_meta and hasattr(own.out_proj, "_hf_hook") for own in attentions):
            raise ValueError(
                "weights of SigLIP's pooling head can't be offloaded: PyTorch's attention reads those of its out_proj "
                "without calling it. Give backbone.head a device in the device_map"
            )
        return backbone.head(patches)


class Siglip2NaFlexFamily(SiglipFamily):
    """`Siglip2VisionModel`, SigLIP 2 NaFlex (Tschannen et al., 2025): as SigLIP, for images of any shape.

    Images of a batch have one size here, a multiple of the patch size, so that nothing is padded and no attention
    masked. The model's own size is that of its table of positions.
    """

    position_table = None  # every pass interpolates it, as transformers does

    @property
    def image_size(self):
        return getattr(self.config, "image_size", self._grid * self.config.patch_size)

    @property
    def _grid(self):
        return int(self.config.num_patches**0.5)

    def embed(self, backbone, pixel_values, interpolate_pos_encoding=False):
        self.check_size(pixel_values, interpolate_pos_encoding)
        side, embeddings = self.config.patch_size, backbone.embeddings
        patches = pixel_values.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # (B, 3, rows, side, columns, side)
        rows, columns = patches.shape[2], patches.shape[4]
        patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        shape = torch.tensor([[rows, columns]])
        if not runs_as_written(embeddings):
            return embeddings(patches, shape.expand(len(patches), 2))
        # called, not read: its weights may be elsewhere until then
        positions = embeddings.position_embedding(torch.arange(self._grid**2, device=pixel_values.device))
        if (rows, columns) != (self._grid, self._grid):  # once for all images, where transformers does it for each
            table = positions.unflatten(0, (self._grid, self._grid))
            positions = embeddings.resize_positional_embeddings(table, shape, rows * columns)
        weight = embeddings.patch_embedding.weight
        return fast_linear(embeddings.patch_embedding, patches.to(weight.dtype)) + positions


FAMILIES = {
    "vit": ViTFamily,
    "deit": DeiTFamily,
    "dinov2": Dinov2Family,
    "dinov2_with_registers": Dinov2WithRegistersFamily,
    "dinov3_vit": DINOv3ViTFamily,
    "clip_vision_model": CLIPFamily,
    "siglip_vision_model": SiglipFamily,
    "siglip2_vision_model": Siglip2NaFlexFamily,
    "mlcd_vision_model": MLCDFamily,
    "mlcd": MLCDFamily,  # as the authors' own repositories call it
    "vit_msn": ViTMSNFamily,
    "ijepa": IJepaFamily,
}


def family_of(config) -> ViTFamily:
    """The family of a backbone's configuration, for backbones of this very configuration.

    Raises:
        ValueError: its model type is not supported.
    """
    if config.model_type not in FAMILIES:
        nearest = get_close_matches(config.model_type, FAMILIES, 1, cutoff=0)[0]
        raise ValueError(
            f"backbone model type must be one of {', '.join(FAMILIES)}, got {config.model_type!r}: its layers are not "
            f"known here. The nearest name is {nearest}"
        )
    return FAMILIES[config.model_type](config)


# ---- The prompted pass


def project_tokens(family, layer, tokens, num_queries=None):
    """Queries of the first `num_queries` tokens (None: of all), keys and values of all tokens of one layer.

    None of them depends on prompts, so for the first layer, all passes over an image can share them.

    Args:
        family: Of the backbone.
        layer: One of its layers.
        tokens: [`ImageTokens`].
        num_queries: Number of queries wanted.
    """
    normed = family.attention_norm(layer, tokens.hidden)
    query = family.query(layer, normed if num_queries is None else normed[:, :num_queries])
    key, value = family.key_value(layer, normed)
    return _rotated(query, tokens.rotation), _rotated(key, tokens.rotation), value


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


def check_hooks(family, backbone, adapters=()):
    """Raise where a hook would never run.

    Raises:
        ValueError: there is a forward hook on the backbone as a whole, or on what holds its layers or the adapters.
    """
    instead = "the backbone's parts are called one by one. Register them on its embeddings, its layers or their parts"
    for module in family.never_called(backbone):
        refuse_hooks(module, instead)
    if isinstance(adapters, nn.Module):
        refuse_hooks(adapters, "the adapters in it are called one by one. Register them on these")


def refuse_hooks(module, why):
    """Raise a `ValueError` if there are hooks on a module that is never called as a whole."""
    # those of accelerate only move tensors between devices, and lie on the parts as well
    if not runs_as_written(module) and not hasattr(module, "_hf_hook"):
        raise ValueError(f"hooks on {type(module).__name__} never run: {why}")


def append_prompts(tokens, prompts, prompt_rows=None) -> ImageTokens:
    """Prompts as tokens, for VPT-shallow: behind the others, so that these keep their places.

    Order means nothing to the layers, since positions are added before, or are angles of each token.

    Args:
        tokens: [`ImageTokens`] of N tokens.
        prompts: `(P, D)`, or `(M, P, D)` with a set for each group of images.
        prompt_rows: `(B,)` int64, the set of each image; needed with `(M, P, D)`.

    Returns:
        N + P tokens.
    """
    hidden = tokens.hidden
    prompts = _per_image(prompts.to(hidden.dtype), prompt_rows, hidden.shape[0])
    return ImageTokens(torch.cat([hidden, prompts], dim=1), _with_unrotated(tokens.rotation, behind=prompts.shape[1]))


def prompted_forward(
    family, backbone, tokens, prompts, prompt_rows=None, prefix_only=False, first_layer=None, adapters=()
):
    """Run the layers of a backbone with prompts in front of its tokens (VPT-deep).

    Args:
        family: What `family_of` says of `backbone`.
        backbone: The vision transformer.
        tokens: [`ImageTokens`].
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
    check_hooks(family, backbone, adapters)
    layers = family.layers(backbone)
    first_adapted = len(layers) - len(adapters)
    hidden = tokens.hidden
    for index, layer in enumerate(layers):
        layer_prompts = prompts[index] if index < len(prompts) and _number(prompts[index]) else None
        num_queries = family.num_class_tokens if prefix_only and index == len(layers) - 1 else None
        projected = first_layer if index == 0 and num_queries is None else None
        adapter = adapters[index - first_adapted] if index >= first_adapted else None
        tokens = ImageTokens(hidden, tokens.rotation)
        arguments = (family, layer, tokens, layer_prompts, prompt_rows, num_queries, projected, adapter)
        if getattr(layer, "gradient_checkpointing", False) and torch.is_grad_enabled():
            hidden = layer._gradient_checkpointing_func(_prompted_layer, *arguments)
        else:
            hidden = _prompted_layer(*arguments)
    return family.final_norm(backbone, hidden)


def _prompted_layer(family, layer, tokens, prompts, prompt_rows, num_queries, projected, adapter):
    if not can_take_apart(family, layer):
        return _whole_layer(layer, tokens, prompts, prompt_rows, num_queries, adapter)
    hidden = tokens.hidden
    if prompts is None or isinstance(prompts, PromptKeyValue) or projected is not None or hidden.shape[0] > 1:
        query, key, value = project_tokens(family, layer, tokens, num_queries) if projected is None else projected
        if prompts is not None:
            key, value = _with_prompts(family, layer, key, value, prompts, prompt_rows, hidden)
    else:  # of a single image, prompts are as many rows as tokens are: one product for both
        prompts = _per_image(prompts.to(hidden.dtype), prompt_rows, 1)
        normed = family.attention_norm(layer, torch.cat([prompts, hidden], dim=1))
        first, last = prompts.shape[1], None if num_queries is None else prompts.shape[1] + num_queries
        query, (key, value) = family.query(layer, normed[:, first:last]), family.key_value(layer, normed)
        query, key = _rotated(query, tokens.rotation), _rotated(key, _with_unrotated(tokens.rotation, in_front=first))
    hidden = hidden if num_queries is None else hidden[:, :num_queries]
    hidden = hidden + family.attend(layer, query, key, value)
    del query, key, value  # else the MLP's memory would come on top of theirs
    output = family.feed_forward(layer, hidden)
    return hidden + (output if adapter is None else adapter(hidden, output))


def _whole_layer(layer, tokens, prompts, prompt_rows, num_queries, adapter):
    """The plain way, for a layer with hooks (or another `forward`) that see it as a whole: with the prompts among the
    tokens, in front, their outputs thrown away."""
    if adapter is not None:
        raise ValueError(f"hooks on {type(layer).__name__} or its attention don't go with an adapter on it")
    hidden, rotation = tokens
    number = 0 if prompts is None else _number(prompts)
    if isinstance(prompts, PromptKeyValue):
        raise ValueError(
            f"a hook was put on {type(layer).__name__} after its prompts' keys and values were computed: compute "
            "them again"
        )
    if number:
        prompts = _per_image(prompts.to(hidden.dtype), prompt_rows, hidden.shape[0])
        hidden = torch.cat([prompts.to(hidden.device), hidden], dim=1)
        rotation = _with_unrotated(rotation, in_front=number)
    positions = {} if rotation is None else {"position_embeddings": rotation}
    output = layer(hidden, attention_mask=None, **positions)
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


def _with_unrotated(rotation, in_front=0, behind=0):
    """The rotation of more tokens, in front of the others or behind, that have no position."""
    if rotation is None:
        return None
    cos, sin = rotation
    rows = (0, 0, in_front, behind)
    return nn.functional.pad(cos, rows, value=1.0), nn.functional.pad(sin, rows)


def _rotated(tokens, rotation):
    """Queries or keys `(..., T, D / H)` of the first T tokens, rotated."""
    if rotation is None:
        return tokens
    cos, sin = (part[: tokens.shape[-2]] for part in rotation)
    first, second = tokens.chunk(2, dim=-1)
    return (tokens * cos + torch.cat([-second, first], dim=-1) * sin).to(tokens.dtype)


def attention_output(attention, projection, scaling, dropout, query, key, value):
    implementation = attention.config._attn_implementation
    dropout = dropout if attention.training else 0.0
    if _goes_blockwise(implementation, dropout, query, key, value):
        attended = _BlockwiseAttention.apply(query, key, value, scaling).transpose(1, 2)
        return fast_linear(projection, attended.flatten(2))
    interface = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, _eager_attention)
    attended, _ = interface(attention, query, key, value, None, dropout=dropout, scaling=scaling)
    return fast_linear(projection, attended.flatten(2))


def mlp_output(mlp, x):
    """`mlp(x)`, whatever `mlp` is; the linear layers of transformers' own, plain or gated, by `fast_linear`."""
    if not runs_as_written(mlp) or not type(mlp).__module__.startswith("transformers.models."):
        return mlp(x)
    if hasattr(mlp, "gate_proj"):
        gate = mlp.act_fn(fast_linear(mlp.gate_proj, x))
        return fast_linear(mlp.down_proj, gate * fast_linear(mlp.up_proj, x))
    if hasattr(mlp, "up_proj"):
        return fast_linear(mlp.down_proj, mlp.act_fn(fast_linear(mlp.up_proj, x)))
    return fast_linear(mlp.fc2, mlp.activation_fn(fast_linear(mlp.fc1, x)))


def _split_heads(projected, head_dim):
    return projected.unflatten(-1, (-1, head_dim)).transpose(-3, -2)


def _eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    weights = torch.softmax(query @ key.transpose(-2, -1) * scaling, dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


__all__ = [
    "FAMILIES",
    "CLIPFamily",
    "DINOv3ViTFamily",
    "DeiTFamily",
    "Dinov2Family",
    "Dinov2WithRegistersFamily",
    "IJepaFamily",
    "ImageTokens",
    "LinearProducts",
    "MLCDFamily",
    "PromptKeyValue",
    "Siglip2NaFlexFamily",
    "SiglipFamily",
    "ViTFamily",
    "ViTMSNFamily",
    "append_prompts",
    "attention_output",
    "can_take_apart",
    "check_hooks",
    "family_of",
    "fast_linear",
    "fastest_dtype",
    "linear_products",
    "mlp_output",
    "project_prompts",
    "project_tokens",
    "prompted_forward",
    "refuse_hooks",
    "runs_as_written",
]
