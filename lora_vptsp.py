"""LoRA through the package peft: low-rank matrices beside linear layers of a frozen backbone.

Part of what a shared retriever needs, like `modeling_vptsp.py`; peft itself only where `lora_rank` is not 0.
"""

from __future__ import annotations

import importlib
import sys

from torch import nn


DEFAULT_TARGETS = ("q_proj", "v_proj")
ADAPTER_NAME = "default"
LORA_INSTEAD = "for LoRA set lora_rank in the configuration (from_backbone(..., lora_rank=8))"


def add_lora(backbone, rank, alpha, targets=None):
    """Put LoRA matrices (Hu et al., ICLR 2022) beside linear layers, in place: `W x + (alpha / rank) * B A x`.

    A is drawn Kaiming uniform and B is 0, so that the backbone starts as it was pretrained.

    Args:
        backbone: The vision transformer.
        rank: Rows of A and columns of B.
        alpha: Scale.
        targets: Names of the linear layers, whole (`layers.0.attention.q_proj`) or their ends (`q_proj`); None for
            `DEFAULT_TARGETS`.

    Raises:
        ImportError: peft is not installed.
        ValueError: a target is no linear layer of the backbone.
    """
    try:  # not an import statement: transformers would ask for peft wherever this file is loaded as remote code
        peft = importlib.import_module("peft")
    except ImportError as error:
        raise ImportError(f"lora_rank is {rank}, which needs the package peft: pip install peft") from error
    targets = list(targets or DEFAULT_TARGETS)
    linear = {name for name, module in backbone.named_modules() if isinstance(module, nn.Linear)}
    for target in targets:
        if not any(_is_target(name, [target]) for name in linear):
            ends = sorted({name.rpartition(".")[2] for name in linear})
            raise ValueError(
                f"lora_targets must name linear layers of the backbone ({', '.join(ends)}), got {target!r}"
            )
    lora = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)
    peft.inject_adapter_in_model(lora, backbone, adapter_name=ADAPTER_NAME)
    for name, module in backbone.named_modules():
        if is_lora(name):
            module._is_hf_initialized = True  # or the backbone would draw A and B as it draws its own weights


def is_lora(name) -> bool:
    """Whether a module or tensor of a backbone is LoRA's."""
    return any(part.startswith("lora_") for part in name.split("."))


def refuse_other_adapters(model):
    """Raise if PEFT has wrapped a model or put something into it that its configuration does not know.

    Such a model is saved without what PEFT tunes, or under names that nobody can load.

    Args:
        model: A [`VPTSPPreTrainedModel`], or what PEFT made of one.

    Raises:
        ValueError: the message says what to do instead.
    """
    peft = sys.modules.get("peft")
    if peft is None:  # then there is nothing of it
        return
    if isinstance(model, (peft.PeftModel, peft.PeftMixedModel)):
        raise ValueError(f"got a {type(model).__name__} of PEFT, expected the model itself: {LORA_INSTEAD}")
    config = model.config
    targets = (config.lora_targets or DEFAULT_TARGETS) if config.lora_rank else ()
    for name in model.state_dict():
        module, wrapped, rest = name.partition(".base_layer")
        if not wrapped:
            module, wrapped, rest = name.partition(".lora_")
        own = "backbone" in module.split(".") and _is_target(module, targets) and ".base_layer" not in rest
        if wrapped and (not own or (wrapped == ".lora_" and rest.split(".")[1] != ADAPTER_NAME)):
            raise ValueError(f"PEFT has put an adapter into the model ({name}), which is not saved: {LORA_INSTEAD}")


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
    return any(module == target or module.endswith(f".{target}") for target in targets)


__all__ = ["add_lora", "is_lora", "names_with_lora", "refuse_other_adapters"]
