"""LoRA through the package peft: low-rank matrices beside linear layers of a frozen backbone.

Part of what a shared retriever needs, like `modeling_vptsp.py`; peft itself only where `lora_rank` is not 0.
"""

from __future__ import annotations

import importlib

from torch import nn


DEFAULT_TARGETS = ("q_proj", "v_proj")


def add_lora(backbone, rank, alpha, targets=None):
    """Put LoRA matrices (Hu et al., ICLR 2022) beside linear layers, in place: `W x + (alpha / rank) * B A x`.

    A is drawn Kaiming uniform and B is 0, so that the backbone starts as it was pretrained.

    They lie in the transformer's layers alone: what embeds patches or pools tokens may read weights without calling
    the linear layer that holds them, as PyTorch's own attention does, so that LoRA beside it would never run.

    Args:
        backbone: The vision transformer.
        rank: Rows of A and columns of B.
        alpha: Scale.
        targets: Names of the linear layers, whole (`layers.0.attention.q_proj`) or their ends (`q_proj`); None for
            `DEFAULT_TARGETS`, which layers of every family have.

    Raises:
        ImportError: peft is not installed.
        ValueError: a target is no linear layer of the backbone's layers.
    """
    try:  # not an import statement: transformers would ask for peft wherever this file is loaded as remote code
        peft = importlib.import_module("peft")
    except ImportError as error:
        raise ImportError(f"lora_rank is {rank}, which needs the package peft: pip install peft") from error
    targets = list(targets or DEFAULT_TARGETS)
    linear = {name for name, module in backbone.named_modules() if isinstance(module, nn.Linear)}
    for target in targets:
        if not any(_is_target(name, [target]) for name in linear):
            ends = sorted({name.rpartition(".")[2] for name in linear if _is_in_layer(name)})
            raise ValueError(
                f"lora_targets must name linear layers of the backbone ({', '.join(ends)}), got {target!r}"
            )
    targets = sorted(name for name in linear if _is_target(name, targets))
    peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets), backbone)
    for name, module in backbone.named_modules():
        if is_lora(name):
            module._is_hf_initialized = True  # or the backbone would draw A and B as it draws its own weights


def is_lora(name) -> bool:
    """Whether a module or tensor of a backbone is LoRA's."""
    return any(part.startswith("lora_") for part in name.split("."))


def names_with_lora(weights, config):
    """A pretrained backbone's tensors under the names that they have beside LoRA: peft wraps what it is put beside.

    Args:
        weights: `state_dict()` of the pretrained backbone.
        config: The `VPTSPConfig`.
    """
    if not config.lora_rank:
        return weights
    named = {}
    for name, tensor in weights.items():
        module, _, kind = name.rpartition(".")
        wrapped = _is_target(module, config.lora_targets or DEFAULT_TARGETS)
        named[f"{module}.base_layer.{kind}" if wrapped else name] = tensor
    return named


def _is_target(module, targets) -> bool:
    named = any(module == target or module.endswith(f".{target}") for target in targets)
    return named and _is_in_layer(module)


def _is_in_layer(module) -> bool:
    """Whether a module's name leads through a list of layers."""
    return any(part.isdigit() for part in module.split("."))


__all__ = ["add_lora", "is_lora", "names_with_lora"]
