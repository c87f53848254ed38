"""Adapters: tuned bottleneck MLPs beside the MLPs of the last layers of a frozen backbone.

Part of what a shared retriever needs, like `modeling_vptsp.py`.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import initialization as init


class DownProjection(nn.Linear):
    """Linear layer into the bottleneck: Kaiming uniform, zero bias."""

    def init_weights(self):
        init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        init.zeros_(self.bias)


class UpProjection(nn.Linear):
    """Linear layer out of the bottleneck: all 0."""

    def init_weights(self):
        init.zeros_(self.weight)
        init.zeros_(self.bias)


class Adapter(nn.Module):
    """Bottleneck MLP on one layer's MLP (Houlsby et al., ICML 2019; parallel: Chen et al., AdaptFormer, NeurIPS 2022).

        a(x) = norm_post(scale * (W_up relu(W_down norm_pre(x) + b_down) + b_up))

        parallel:    mlp_output + a(tokens in front of the MLP and its norm)
        sequential:  mlp_output + a(mlp_output)

    `W_up` starts as 0, so that the layer starts as it was pretrained. With a norm behind, that ends with the first
    step: a LayerNorm gives outputs of unit variance, however small what it gets.

    Args:
        width: Backbone width (D).
        dim: Width of the bottleneck.
        mode: `parallel` or `sequential`.
        norm: `pre`, `post` or `none`.
        scale: Factor on the output.
    """

    def __init__(self, width, dim, mode="parallel", norm="post", scale=1.0):
        super().__init__()
        self.sequential = mode == "sequential"
        self.scale = scale
        self.norm_before = nn.LayerNorm(width) if norm == "pre" else nn.Identity()
        self.down = DownProjection(width, dim)
        self.up = UpProjection(dim, width)
        self.norm_after = nn.LayerNorm(width) if norm == "post" else nn.Identity()

    def forward(self, hidden, mlp_output):
        """`(B, N, D)` tokens in front of the MLP and `(B, N, D)` what it gives -> `(B, N, D)` in its place."""
        bottleneck = torch.relu(self.down(self.norm_before(mlp_output if self.sequential else hidden)))
        return mlp_output + self.norm_after(self.scale * self.up(bottleneck))


def build_adapters(config) -> nn.ModuleList:
    """Adapters of the last `config.adapter_layers` layers, first to last."""
    return nn.ModuleList(
        Adapter(
            config.backbone_config.hidden_size,
            config.adapter_dim,
            config.adapter_mode,
            config.adapter_norm,
            config.adapter_scale,
        )
        for _ in range(config.adapter_layers)
    )


__all__ = ["Adapter", "build_adapters"]
