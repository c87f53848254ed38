"""A search for hyperparameters by Optuna, of which every trial is a run of its own: nothing is left of another."""

from __future__ import annotations

import copy
import gc
import importlib
import inspect
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback
from transformers.trainer_utils import BestRun

from ..configuration_vptsp import check_field
from ..names.registry import nearest
from .output_folder import check_output_folder
from .run_errors import ConfigError


# Options of a study's `optimize`; all others are of `create_study`.
_OF_OPTIMIZE = ("timeout", "catch")
# What every trial has of its own, or what it must not do.
_NOT_FOR_TRIALS = ("output_dir", "resume_from_checkpoint", "push_to_hub")


def default_hp_space(trial) -> dict:
    """The two learning rates, on a logarithmic scale.

    Args:
        trial: An `optuna.Trial`.
    """
    return {
        "learning_rate": trial.suggest_float("learning_rate", 1e-5, 1e-2, log=True),
        "proxy_learning_rate": trial.suggest_float("proxy_learning_rate", 1e-3, 1e-1, log=True),
    }


def search_hyperparameters(
    args, make_trainer, make_model, hp_space, compute_objective, n_trials, direction, hp_name, study_options
):
    """Run trials, and say which was best.

    Args:
        args: `VPTSPTrainingArguments` that trials begin with.
        make_trainer: Function of a model and arguments that gives the trainer of one trial.
        make_model: Function of a trial that gives its model.
        hp_space: As for `VPTSPTrainer.hyperparameter_search`.
        compute_objective: Likewise, as all that follow.
        n_trials: Number of trials.
        direction: `maximize` or `minimize`.
        hp_name: Function of a trial that names its folder; None for `run-0`, `run-1` and so on.
        study_options: For `optuna.create_study`, and `timeout` and `catch` for `optimize`.

    Returns:
        `BestRun`; None on all processes but the first.

    Raises:
        ImportError: Optuna is not installed.
        TypeError: an option is none of `create_study`.
        ValueError: what is given can't be searched by.
    """
    optuna = _optuna()
    _check_search(optuna, hp_space, compute_objective, n_trials, hp_name, study_options)
    is_main = args.process_index == 0

    def run(trial, prepared=None):
        values, model = prepared or _prepared(trial)
        trial_args = _trial_arguments(args, values, hp_name(trial) if hp_name else f"run-{trial.number}")
        trainer = make_trainer(model, trial_args)
        trainer.add_callback(_Report(trainer, trial if is_main else None, compute_objective))
        try:
            trainer.train()
            objective = compute_objective(trainer.evaluate())
        except _PrunedError as error:
            raise optuna.TrialPruned(str(error)) from None
        finally:
            trainer.accelerator.free_memory()
            gc.collect()  # a Trainer and its callbacks know each other
        return objective

    def _prepared(trial):
        values = (hp_space or default_hp_space)(trial)
        if not isinstance(values, Mapping):
            raise ConfigError(f"hp_space must give a mapping of fields to values, got {values!r}")
        values = dict(values)
        return values, make_model(trial, values.get("seed", args.seed))

    def objective(trial):
        prepared = _prepared(trial)  # first here, since what is drawn is what the other processes are told
        if args.world_size > 1:
            broadcast_object_list([optuna.trial.FixedTrial(trial.params, trial.number)])
        return run(trial, prepared)

    if not is_main:
        while (trial := broadcast_object_list([None])[0]) is not None:
            with suppress(optuna.TrialPruned, *_classes(study_options.get("catch", ()))):
                run(trial)
        return None
    options = {name: study_options.pop(name) for name in _OF_OPTIMIZE if name in study_options}
    study = optuna.create_study(direction=direction, **study_options)
    study.optimize(objective, n_trials=n_trials, **options)
    if args.world_size > 1:
        broadcast_object_list([None])
    best = study.best_trial
    return BestRun(str(best.number), best.value, best.params, study)


def _check_search(optuna, hp_space, compute_objective, n_trials, hp_name, study_options):
    """Refuse what can't work before a model is trained by it."""
    for name, function in {"hp_space": hp_space, "compute_objective": compute_objective, "hp_name": hp_name}.items():
        if function is not None and not callable(function):
            raise ValueError(f"{name} must be a function, got {function!r}")
    if n_trials is not None or study_options.get("timeout") is None:  # Optuna goes on until then, or for ever
        check_field("n_trials", n_trials, int, (1, math.inf))
    known = [*inspect.signature(optuna.create_study).parameters, *_OF_OPTIMIZE]
    if unknown := [name for name in study_options if name not in known]:
        near = nearest(unknown[0], known, most=1)
        raise TypeError(f"hyperparameter_search has no option {unknown[0]}{near}; Optuna's are {', '.join(known)}")
    kinds = {"sampler": optuna.samplers.BaseSampler, "pruner": optuna.pruners.BasePruner}
    for name, kind in kinds.items():
        value = study_options.get(name)
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"{name} must be an object of a class of optuna.{name}s, got {value!r}")


def objective_of(metric):
    """Function of the metrics of an evaluation that gives one of them.

    Args:
        metric: Its name, with `eval_` or without.

    Raises:
        ValueError: there is no name; on a call: there is no such metric.
    """
    if metric is None:
        raise ValueError("compute_objective must be given where metric_for_best_model is None")
    name = f"eval_{metric.removeprefix('eval_')}"

    def objective(metrics):
        if name not in metrics:
            raise ConfigError(
                f"metric_for_best_model {metric} is none of what evaluation gives: {', '.join(metrics)}"
                f"{nearest(name, metrics, most=1)}"
            )
        return metrics[name]

    return objective


def _classes(catch):
    return catch if isinstance(catch, tuple) else tuple(catch) if hasattr(catch, "__iter__") else (catch,)


def _optuna():
    try:
        return importlib.import_module("optuna")
    except ImportError as error:
        raise ImportError("a search for hyperparameters needs the package optuna: pip install optuna") from error


def _trial_arguments(args, values, name):
    """Arguments of a trial: checked as those of any run, in a folder of its own.

    Raises:
        ConfigError: a value is of no field, or of one that is the search's own.
        OutputFolderError: the folder holds an earlier run.
    """
    known = {item.name for item in fields(args) if item.init} - set(_NOT_FOR_TRIALS)
    if unknown := sorted(set(values) - known):
        near = nearest(unknown[0], known, most=1)
        raise ConfigError(
            f"hp_space must give fields of {type(args).__name__} that a trial may have of its own, got "
            f"{', '.join(unknown)}{near}. What the model is, model_init says, which gets the trial"
        )
    folder = Path(args.output_dir) / name
    check_output_folder(folder)
    return replace(copy.copy(args), **values, output_dir=str(folder), push_to_hub=False)


class _PrunedError(Exception):
    """A trial is not worth going on with."""


class _Report(TrainerCallback):
    """Tells a trial the objective after every evaluation of its training, and ends it where the trial says so.

    Args:
        trainer: Of the trial.
        trial: On the first process; None on others, which follow it.
        compute_objective: As for `search_hyperparameters`.
    """

    def __init__(self, trainer, trial, compute_objective):
        self._trainer, self._optuna_trial, self._compute_objective = trainer, trial, compute_objective

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        if not self._trainer.is_in_train:
            return
        prune = False
        if self._optuna_trial is not None:
            self._optuna_trial.report(self._compute_objective(dict(metrics)), state.global_step)
            prune = self._optuna_trial.should_prune()
        if args.world_size > 1:
            prune = broadcast_object_list([prune])[0]
        if prune:
            raise _PrunedError(f"pruned at step {state.global_step}")


__all__ = ["default_hp_space", "objective_of", "search_hyperparameters"]
