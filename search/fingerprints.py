"""What tells one embedding model from another, for the files that hold embeddings."""

from __future__ import annotations

import hashlib
import json

import torch

from ..loading_vptsp import name_today


# Entries of a saved image processor that say how it is run, not what it computes.
_NOT_PREPROCESSING = ("image_processor_type", "processor_class", "return_tensors", "device", "backend")
# Fields of configurations that change embeddings without changing tensors.
_BACKBONE_FIELDS = ("model_type", "num_attention_heads", "hidden_act", "layer_norm_eps", "image_size", "patch_size")
_ROTARY_FIELDS = ("rope_theta", "rope_parameters")
_TUNING_FIELDS = (
    "prompt_mode",
    "adapter_mode",
    "adapter_norm",
    "adapter_scale",
    "lora_alpha",
    "tuning",
    "tuning_kwargs",
)


def model_fingerprint(model, processor, backbone_only=False, views="one"):
    """Digest of everything that an embedding depends on beside the image.

    All values of all weights that take part (prompts, head, backbone), the layout of the prompts, the pooling, and the
    preprocessing. Two seconds per gigabyte of weights at most.

    Args:
        model: `VPTSPModel` in float32.
        processor: Image processor of transformers.
        backbone_only: Whether prompts and head take no part.
        views: Whose embeddings are averaged, of `VIEWS`.

    Returns:
        64 hexadecimal digits.
    """
    config = model.config
    preprocessing = {
        key: value
        for key, value in processor.to_dict().items()
        if not key.startswith("_") and key not in _NOT_PREPROCESSING and value is not None
    }
    # what changes the embeddings, but neither names nor values of tensors
    architecture = {name: getattr(config.backbone_config, name) for name in _BACKBONE_FIELDS}
    rotary = (name for name in _ROTARY_FIELDS if hasattr(config.backbone_config, name))
    architecture |= {name: getattr(config.backbone_config, name) for name in rotary}
    architecture |= {"pooling": config.pooling, "preprocessing": preprocessing}
    if views != "one":  # which older versions, that knew no other, didn't say
        architecture["views"] = views
    if not backbone_only:
        architecture["prompts"] = list(config.prompt_lengths)
        architecture |= {name: getattr(config, name) for name in _TUNING_FIELDS}
        if config.peft_config is not None:  # those without have the fingerprint that they always had
            architecture["peft_config"] = config.peft_config
    digest = hashlib.blake2b(digest_size=32)
    digest.update(json.dumps(architecture, sort_keys=True, default=str).encode())
    model_type = config.backbone_config.model_type  # whose tensors transformers has renamed
    state_dict = {
        name_today(name, model_type): tensor
        for name, tensor in (model.backbone if backbone_only else model).state_dict().items()
    }
    for name in sorted(state_dict):
        tensor = state_dict[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


__all__ = ["model_fingerprint"]
