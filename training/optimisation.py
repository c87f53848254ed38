"""Optimiser and schedule of a run: two groups of parameters, two learning rates, a cosine with a floor."""

from __future__ import annotations

import math

import torch
from torch.optim.lr_scheduler import LambdaLR


def build_optimizer(named_parameters, args, cls_and_kwargs, own):
    """An optimiser of two groups: original proxies and parameters of the loss, with a learning rate of their own, and
    all else that is tuned.

    Args:
        named_parameters: Pairs; those that need no gradient are left out.
        args: `VPTSPTrainingArguments`.
        cls_and_kwargs: The optimiser that `args.optim` names, and its options.
        own: Another class and its options, which then decide; None for none. Learning rate and weight decay are,
            unless given there, those of `args`.
    """
    tuned = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    groups = [
        {"params": [parameter for name, parameter in tuned if not _is_proxy(name)]},
        {"params": [parameter for name, parameter in tuned if _is_proxy(name)], "lr": args.proxy_learning_rate},
    ]
    if own is None:
        optimizer_cls, options = cls_and_kwargs
        options = {**options, "weight_decay": args.weight_decay}
        if optimizer_cls is torch.optim.SGD:
            options |= {"momentum": args.sgd_momentum, "fused": True}
    else:
        optimizer_cls, given = own
        decay = {"weight_decay": args.weight_decay} if args.weight_decay else {}
        options = {"lr": args.learning_rate, **decay, **given}
    return optimizer_cls([group for group in groups if group["params"]], **options)


def cosine_schedule(optimizer, num_steps, warmup, floor) -> LambdaLR:
    """Warm-up, then cosine decay of each group's rate to `floor`, which it keeps.

    Args:
        optimizer: Whose rates it sets.
        num_steps: At which the floor is reached.
        warmup: Steps.
        floor: Learning rate.
    """
    rates = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
    return LambdaLR(optimizer, [_cosine_factor(num_steps, warmup, floor, rate) for rate in rates])


def _is_proxy(name):
    """Whether a parameter is the original proxies, or (weights and margins of classes) one of the loss."""
    return name.endswith("original_proxies") or name.startswith("criterion.")


def _cosine_factor(steps, warmup, floor, base):
    """Factor on a group's base rate, as a function of the step."""
    least = min(floor / base, 1.0) if base > 0 else 0.0

    def factor(step):
        if step < warmup:
            return (step + 1) / warmup
        progress = min((step - warmup) / max(steps - warmup, 1), 1.0)
        return least + (1 - least) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor


__all__ = ["build_optimizer", "cosine_schedule"]
