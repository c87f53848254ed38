"""SGD and AdamW for some rows of a table, as torch computes them.

The lazy rule: a row takes part in the steps in which it got a gradient, and in no others. For it, the other steps did
not happen: no momentum moves it, no weight decay shrinks it, its states do not decay, and AdamW's bias correction
counts its own steps. A row that is in every batch moves as under the dense optimiser.

The computation is torch's own, over a list of tensors that are rows, in place.
"""

from __future__ import annotations

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
    group = optimizer.param_groups[0]
    if type(optimizer) is SGD and not group["dampening"]:
        return
    if type(optimizer) is AdamW and not group["amsgrad"]:
        return
    raise ValueError(
        "offloaded class prompts can be tuned by torch.optim.AdamW without amsgrad and torch.optim.SGD without "
        f"dampening, got {type(optimizer).__name__}; choose one of these, or class_prompt_store dense"
    )


def state_names(optimizer) -> tuple[str, ...]:
    """Names of the states that a row has, torch's; all as large as the row, but for `step`."""
    if type(optimizer) is AdamW:
        return ("step", "exp_avg", "exp_avg_sq")
    return ("momentum_buffer",) if optimizer.param_groups[0]["momentum"] else ()


def update_rows(optimizer, rows, gradients, states):
    """One step of the rows, in place.

    Args:
        optimizer: One that `check_optimizer` accepts; the hyperparameters of its first group are taken.
        rows: List of float32 tensors on the CPU, contiguous.
        gradients: Their gradients, as many.
        states: Their states by name, as many each; zeros before a row's first step.
    """
    if not rows:
        return
    group = optimizer.param_groups[0]
    if type(optimizer) is AdamW:
        beta1, beta2 = group["betas"]
        adamw(
            rows,
            gradients,
            states["exp_avg"],
            states["exp_avg_sq"],
            [],
            states["step"],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )
    else:
        sgd(
            rows,
            gradients,
            states.get("momentum_buffer", [None] * len(rows)),
            fused=True,
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=0.0,
            nesterov=group["nesterov"],
            maximize=group["maximize"],
        )


__all__ = ["SUPPORTED_OPTIM", "check_optimizer", "state_names", "update_rows"]
