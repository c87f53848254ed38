"""VPTSP retriever: a frozen vision transformer with tuned prompts (or what else is tuned) and an embedding head.

This file and those that it imports are all that a shared retriever needs. The proxies and losses of training are in
`modeling_metric_learning.py`.

Shapes: B images, N tokens (CLS + patches), P prompts, D backbone width, E embedding width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.utils import ModelOutput

from .adapters_vptsp import build_adapters
from .backbones_vptsp import (
    ImageTokens,
    append_prompts,
    can_take_apart,
    family_of,
    project_prompts,
    project_tokens,
    prompted_forward,
)
from .configuration_vptsp import VPTSPConfig
from .lora_vptsp import add_lora
from .pretrained_vptsp import VPTSPPreTrainedModel, backbone_fingerprint, load_backbone
from .tuning_vptsp import add_tuning


@dataclass
class VPTSPModelOutput(ModelOutput):
    """Output of [`VPTSPModel`].

    Attributes:
        embeddings: `(B, E)` float32 (float64 for a float64 model), L2-normalised.
        pooler_output: The same tensor, under the name that `AutoModel` users look for.
    """

    embeddings: torch.FloatTensor | None = None
    pooler_output: torch.FloatTensor | None = None


class Prompts(nn.Module):
    """Learnable prompt tokens of consecutive layers, Xavier normal (paper section 3.1).

    Layer i has `lengths[i]` of them. All lie in one parameter `tokens` of shape `(sum(lengths), D)`. Each layer's
    tokens are drawn as the first rows of a table of `num_prompts` rows would be. None where there are no prompts.
    """

    def __init__(self, lengths, num_prompts, width):
        super().__init__()
        self.lengths = tuple(lengths)
        self.std = math.sqrt(2.0 / (num_prompts + width))
        self.tokens = nn.Parameter(torch.empty(sum(self.lengths), width)) if sum(self.lengths) else None

    def init_weights(self):
        if self.tokens is not None:
            init.normal_(self.tokens, std=self.std)

    def forward(self):
        """Tokens of each layer, `(P_i, D)`."""
        return () if self.tokens is None else self.tokens.split(self.lengths)


class EmbeddingHead(nn.Module):
    """LayerNorm and a linear layer (Xavier uniform, zero bias) to the embedding width, then L2 normalisation."""

    def __init__(self, pooled_dim, embedding_dim):
        super().__init__()
        self.norm = nn.LayerNorm(pooled_dim)
        self.projection = nn.Linear(pooled_dim, embedding_dim)

    def project(self, pooled):
        """`(B, pooled_dim)` -> `(B, E)`, not yet normalised, in float32 or wider."""
        return at_least_float32(self.projection(self.norm(pooled)))

    def forward(self, pooled):
        """`(B, pooled_dim)` -> `(B, E)`, L2-normalised, in float32 or wider."""
        return F.normalize(self.project(pooled), dim=-1)


class DistilledEmbeddingHead(EmbeddingHead):
    """Head on a CLS and a distillation token: a LayerNorm and a linear layer for each, and the mean of both outputs,
    as distilled DeiT averages its two classifiers; then L2 normalisation, once."""

    def __init__(self, pooled_dim, embedding_dim):
        super().__init__(pooled_dim, embedding_dim)
        self.distillation_norm = nn.LayerNorm(pooled_dim)
        self.distillation_projection = nn.Linear(pooled_dim, embedding_dim)

    def project(self, pooled):
        """`(B, 2, pooled_dim)` -> `(B, E)`, not yet normalised, in float32 or wider."""
        from_cls = self.projection(self.norm(pooled[:, 0]))
        from_distillation = self.distillation_projection(self.distillation_norm(pooled[:, 1]))
        return (at_least_float32(from_cls) + at_least_float32(from_distillation)) / 2


def embedding_head(config) -> EmbeddingHead:
    """The head that fits what `config.pooling` takes from the backbone."""
    distilled = config.pooling == "cls" and family_of(config.backbone_config).num_class_tokens == 2
    return (DistilledEmbeddingHead if distilled else EmbeddingHead)(config.pooled_dim, config.embedding_dim)


def at_least_float32(tensor):
    """Half-precision tensors as float32, others as they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


class VPTSPModel(VPTSPPreTrainedModel):
    """Retriever: images to L2-normalised embeddings, by a frozen vision transformer with tuned prompts.

    Method of Ren et al., ICLR 2024, section 3.1; the prompts run as in VPT-deep (Jia et al., ECCV 2022).
    """

    retriever_prefix = ""

    def __init__(self, config: VPTSPConfig):
        super().__init__(config)
        if config.backbone_config is None:
            raise ValueError("backbone_config must be set to build a model, got None; see from_backbone")
        self.family = family_of(config.backbone_config)
        self.backbone = self.family.build(config.backbone_config)
        if config.lora_rank:
            add_lora(self.backbone, config.lora_rank, config.lora_alpha, config.lora_targets)
        self.adapters = build_adapters(config)
        self.prompts = Prompts(config.prompt_lengths, config.num_prompts, config.backbone_config.hidden_size)
        self.head = embedding_head(config)
        self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        add_tuning(self)
        self.post_init()
        self.freeze_backbone()
        self.backbone.train(config.tune_backbone)  # before anyone calls `train` or `eval`: DINOv3 draws positions anew

    def tuned_names(self) -> set[str]:
        """Names in `state_dict()` of everything but the frozen part of the backbone and what no pass touches of it."""
        names = super().tuned_names()
        if self.config.bitfit:  # as attention of PyTorch's own calls them
            names |= {name for name in self.state_dict() if name.startswith("backbone.") and name.endswith("_bias")}
        unused = {
            name
            for name in names
            if name.startswith("backbone.")
            and not self.family.is_used(name.removeprefix("backbone."), self.config.pooling)
        }
        return names - unused

    def forward(
        self,
        pixel_values,
        interpolate_pos_encoding=False,
        prompt_key_values=None,
        return_dict=None,
        output_attentions=None,
        output_hidden_states=None,
    ):
        """Embed images.

        Args:
            pixel_values: `(B, 3, height, width)` float, normalised as the backbone expects.
            interpolate_pos_encoding: Take images of another size than the model's, as transformers' own model does:
                with its position embeddings interpolated in this very pass, or (rotary positions) as they are. For
                one size throughout, see `image_size` of `from_backbone`.
            prompt_key_values: What `project_prompts` gave, where the weights have not changed since; None computes it.
            return_dict: False gives a tuple; None is what the configuration says.
            output_attentions: Not to be had; see `vptsp.eval.attention` for where the CLS token looks.
            output_hidden_states: Not to be had; register a forward hook on a layer of `backbone`.

        Returns:
            [`VPTSPModelOutput`].

        Raises:
            ValueError: `pixel_values` is missing, of a wrong shape or not floating point, or attentions or hidden
                states are asked for.
        """
        self.refuse_intermediate_outputs(output_attentions, output_hidden_states)
        tokens = self.embed_patches(pixel_values, interpolate_pos_encoding)
        prompts = self.prompts() if prompt_key_values is None else prompt_key_values
        embeddings = self.embedding_dropout(self.head(self.encode(tokens, prompts)))
        output = VPTSPModelOutput(embeddings=embeddings, pooler_output=embeddings)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def refuse_intermediate_outputs(self, output_attentions=None, output_hidden_states=None):
        """Raise a `ValueError` if the caller or the configuration asks for what the prompted pass does not keep."""
        asked = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        for name, value in asked.items():
            if getattr(self.config, name) if value is None else value:
                raise ValueError(f"{name} must be false, got true: the prompted pass gives embeddings alone")

    def embed_patches(self, pixel_values, interpolate_pos_encoding=False) -> ImageTokens:
        """`(B, 3, height, width)` -> tokens that every pass starts from, with what the layers need of positions."""
        if pixel_values is None or pixel_values.dim() != 4:
            shape = None if pixel_values is None else tuple(pixel_values.shape)
            raise ValueError(f"pixel_values must have shape (B, 3, height, width), got {shape}")
        if not pixel_values.is_floating_point():
            raise ValueError(f"pixel_values must be normalised floats, got {pixel_values.dtype}")
        patch_size = self.config.backbone_config.patch_size
        if interpolate_pos_encoding and any(side % patch_size for side in pixel_values.shape[2:]):
            raise ValueError(
                f"height and width must be multiples of the patch size {patch_size}, got "
                f"{tuple(pixel_values.shape[2:])}"
            )
        hidden = self.family.embed(self.backbone, pixel_values, interpolate_pos_encoding)
        return ImageTokens(hidden, self.family.rotation(self.backbone, pixel_values, hidden))

    def project_prompts(self):
        """The shared prompts as all that the layers make of them, to be given to `forward` again and again.

        Nothing is kept in the model: what is returned is right for the weights, the dtype and the autocast of this
        moment. Spares each batch 2 of the 12 products that a prompt would cost a plain layer: worth it for single
        images and many prompts, hardly for batches.

        Returns:
            List of a [`PromptKeyValue`] for each prompted layer.
        """
        tokens = self.prompts()
        if self.config.prompt_mode == "shallow":
            return tokens
        layers = self.family.layers(self.backbone)[: len(tokens)]
        return [project_prompts(self.family, layer, part) for layer, part in zip(layers, tokens, strict=True)]

    def project_first_layer(self, tokens):
        """What every pass over the same tokens computes in the first layer, to be given to `encode`.

        None where it is not worth keeping: with gradient checkpointing, only one layer, or prompts among the tokens;
        and where the layer has to be called as a whole.
        """
        first, *others = self.family.layers(self.backbone)
        checkpointing = getattr(first, "gradient_checkpointing", False)
        if (
            not others
            or checkpointing
            or self.config.prompt_mode == "shallow"
            or not can_take_apart(self.family, first)
        ):
            return None
        return project_tokens(self.family, first, tokens)

    def encode(self, tokens, prompts=(), prompt_rows=None, first_layer=None, adapted=True):
        """[`ImageTokens`] through the prompted layers, pooled. See `prompted_forward`.

        `adapted=False` leaves the adapters out.

        Returns:
            `(B, pooled_dim)`; `(B, 2, D)` with `cls` pooling of a backbone with two class tokens.
        """
        pooling, num_tokens = self.config.pooling, tokens.hidden.shape[1]
        prefix_only = pooling == "cls"
        if self.config.prompt_mode == "shallow" and prompts:
            tokens, prompts = append_prompts(tokens, prompts[0], prompt_rows), ()
        hidden = prompted_forward(
            self.family,
            self.backbone,
            tokens,
            prompts,
            prompt_rows,
            prefix_only,
            first_layer,
            adapters=self.adapters if adapted else (),
        )
        if prefix_only:
            return hidden[:, 0] if self.family.num_class_tokens == 1 else hidden
        patches = hidden[:, self.family.num_prefix_tokens : num_tokens]
        if pooling == "head":
            return self.family.head(self.backbone, patches)
        mean = patches.mean(dim=1)
        return mean if pooling == "mean" else torch.cat([hidden[:, 0], mean], dim=-1)

    def embed_with_backbone(self, pixel_values, interpolate_pos_encoding=False):
        """Embeddings of the backbone alone, without prompts, adapters or head: the line to beat. `(B, pooled_dim)`.

        Of two class tokens, the mean. Where tuning changes the backbone itself (BitFit, LoRA, full fine-tuning), this
        is the pretrained backbone only before training.
        """
        pooled = self.encode(self.embed_patches(pixel_values, interpolate_pos_encoding), adapted=False)
        pooled = pooled.mean(dim=1) if pooled.dim() == 3 else pooled
        return F.normalize(at_least_float32(pooled), dim=-1)


VPTSPModel.register_for_auto_class("AutoModel")

__all__ = ["VPTSPModel", "VPTSPModelOutput", "VPTSPPreTrainedModel", "backbone_fingerprint", "load_backbone"]
