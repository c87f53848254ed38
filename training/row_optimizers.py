"""SGD and AdamW for some rows of a table, as torch computes them.

The lazy rule: a row takes part in the steps in which it got a gradient, and in no others. For it, the other steps did
not happen: no momentum moves it, no weight decay shrinks it, its states do not decay, and AdamW's bias correction
counts its own steps. A row that is in every batch moves as under the dense optimiser.

The computation is torch's own, over a list of tensors that are rows, in place.
"""

from __future__ import annotations

import math

import torch
from torch.optim import SGD, AdamW
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd


# `optim` of the training arguments that make one of these.
SUPPORTED_OPTIM = ("adamw_torch", "adamw_torch_fused", "sgd")


def check_optimizer(optimizer):
    """Refuse an optimiser that has no rule for rows.

    Raises:
        ValueError: it is not torch's SGD (without dampening) or AdamW (without amsgrad).
    """
    kind, group = type(optimizer), optimizer.param_groups[0]
    if (kind is SGD and not group["dampening"]) or (kind is AdamW and not group["amsgrad"]):
        return
    raise ValueError(
        "offloaded class prompts can be tuned by torch.optim.AdamW without amsgrad and torch.optim.SGD without "
        f"dampening, got {kind.__name__}; choose one of these, or class_prompt_store dense"
    )


def update_rows(optimizer, table, classes, gradients):
    """One step of some rows of a table and of their states, in place. A row whose gradient is not finite stays.

    Args:
        optimizer: One that `check_optimizer` accepts; the hyperparameters of its first group are taken.
        table: [`HostTable`], which gets the optimiser's states in the first step.
        classes: `(R,)` int64 on the CPU, no class twice.
        gradients: `(R, P, D)` float32 on the CPU.

    Raises:
        ValueError: the states of the table are not those of the optimiser.
    """
    names = _state_names(optimizer)
    if not table.states:
        table.states = table.new_states(names)
    if set(table.states) != set(names):
        raise ValueError(
            f"the class prompts have the optimiser states {', '.join(sorted(table.states))}, "
            f"but {type(optimizer).__name__} needs {', '.join(sorted(names)) or 'none'}"
        )
    finite = torch.linalg.vector_norm(gradients.flatten(1), ord=math.inf, dim=1).isfinite().tolist()
    chosen = [i for i, is_finite in enumerate(finite) if is_finite]
    rows = classes[chosen].tolist()
    if rows:
        _step(
            optimizer,
            [table.tokens[row] for row in rows],
            [gradients[i] for i in chosen],
            {name: [state[row] for row in rows] for name, state in table.states.items()},
        )


def _state_names(optimizer):
    """Names of the states that a row has, torch's; all as large as the row, but for `step`."""
    if type(optimizer) is AdamW:
        return ("step", "exp_avg", "exp_avg_sq")
    return ("momentum_buffer",) if optimizer.param_groups[0]["momentum"] else ()


def _step(optimizer, rows, gradients, states):
    """Torch's step of lists of tensors, in place; states are zeros before a row's first step."""
    group = optimizer.param_groups[0]
    options = {name: group[name] for name in ("lr", "weight_decay", "maximize")}
    if type(optimizer) is AdamW:
        beta1, beta2 = group["betas"]
        options |= {"beta1": beta1, "beta2": beta2, "eps": group["eps"], "amsgrad": False}
        adamw(rows, gradients, states["exp_avg"], states["exp_avg_sq"], [], states["step"], fused=True, **options)
    else:
        options |= {"momentum": group["momentum"], "dampening": 0.0, "nesterov": group["nesterov"]}
        sgd(rows, gradients, states.get("momentum_buffer", [None] * len(rows)), fused=True, **options)


__all__ = ["SUPPORTED_OPTIM", "check_optimizer", "update_rows"]
