"""`model_init`, and a search for hyperparameters whose trials are runs of their own."""

import json
import sys
from pathlib import Path

import datasets
import pytest
import torch
from accelerate import debug_launcher
from test_trainer import make_args, make_model
from transformers import EarlyStoppingCallback

from vptsp import (
    EvalTransform,
    ImageDataset,
    TrainTransform,
    VPTSPForMetricLearning,
    VPTSPTrainer,
    load_splits,
)
from vptsp.training.output_folder import OutputFolderError
from vptsp.training.run_errors import ConfigError


class Counted:
    """A `model_init` that counts its models."""

    def __init__(self, backbone_folder, **fields):
        self.backbone_folder, self.fields, self.trials, self.models = backbone_folder, fields, [], []

    def __call__(self, trial):
        self.trials.append(trial)
        values = {"num_classes": 5, "embedding_dim": 12, "num_prompts": 3, "num_class_prompts": 2, **self.fields}
        if trial is not None:
            values["proxy_bias_ratio"] = trial.suggest_float("proxy_bias_ratio", 0.1, 0.9)
        self.models.append(VPTSPForMetricLearning.from_backbone(self.backbone_folder, **values))
        return self.models[-1]


def make_trainer(folder, init, train_dataset, eval_dataset=None, **options):
    fields = {
        "eval_strategy": "epoch" if eval_dataset is not None else "no",
        "num_train_epochs": 1,
        "load_best_model_at_end": False,
    }
    fields |= {name: options.pop(name) for name in list(options) if name not in ("callbacks", "optimizers")}
    args = make_args(folder, **fields)
    return VPTSPTrainer(model_init=init, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset, **options)


@pytest.mark.parametrize("store", ["dense", "offloaded"])
def test_every_training_has_a_new_model(backbone_folder, tmp_path, train_dataset, store):
    init = Counted(backbone_folder, class_prompt_store=store)
    trainer = make_trainer(tmp_path, init, train_dataset)
    trainer.train()
    assert len(init.models) == 1 and trainer.model is init.models[0] and init.trials == [None]
    first = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    assert len(init.models) == 2 and trainer.model is init.models[1]
    assert trainer.state.global_step == trainer.state.max_steps
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, first[name]), name
    if store == "offloaded":
        rows = [model.offloaded_class_prompts(torch.arange(5)) for model in init.models]
        assert all(torch.equal(a, b) for a, b in zip(*rows, strict=True))

    torch.manual_seed(trainer.args.seed)
    model = Counted(backbone_folder, class_prompt_store=store)(None)
    plain = VPTSPTrainer(model=model, args=trainer.args, train_dataset=train_dataset)
    plain.train()
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(tensor, first[name]), name


def test_models_that_can_not_be_made(backbone_folder, tmp_path, train_dataset):
    init = Counted(backbone_folder)
    args = make_args(tmp_path)
    with pytest.raises(ValueError, match="needs a model or a model_init, got both"):
        VPTSPTrainer(model=make_model(backbone_folder), model_init=init, args=args)
    with pytest.raises(ValueError, match="needs a model or a model_init, got none"):
        VPTSPTrainer(args=args)
    with pytest.raises(ValueError, match="optimizers must be left out with model_init"):
        make_trainer(tmp_path, init, train_dataset, optimizers=(object(), None))
    with pytest.raises(ValueError, match="model_init must be a function of no argument or of a trial, got one of 2"):
        make_trainer(tmp_path, lambda one, other: None, train_dataset)
    with pytest.raises(TypeError, match=r"model must be a VPTSPForMetricLearning, or .*, got NoneType"):
        make_trainer(tmp_path, lambda: None, train_dataset)


optuna = pytest.importorskip("optuna")
optuna.logging.set_verbosity(optuna.logging.WARNING)


def space(trial):
    return {
        "learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True),
        "proxy_learning_rate": trial.suggest_float("proxy_learning_rate", 1e-3, 1e-1, log=True),
        "num_train_epochs": trial.suggest_int("num_train_epochs", 1, 2),
    }


def test_trials_are_runs_of_their_own(backbone_folder, tmp_path, train_dataset, eval_dataset):
    init = Counted(backbone_folder)
    patience = EarlyStoppingCallback(early_stopping_patience=5)
    trainer = make_trainer(
        tmp_path, init, train_dataset, eval_dataset, save_strategy="epoch", callbacks=[patience],
        load_best_model_at_end=True, metric_for_best_model="map_at_r",
    )  # fmt: skip
    best = trainer.hyperparameter_search(space, n_trials=3, sampler=optuna.samplers.RandomSampler(seed=0))
    trials = best.run_summary.trials
    assert [trial.number for trial in trials] == [0, 1, 2] and len(init.models) == 4
    assert best.objective == max(trial.value for trial in trials) and best.run_id == str(
        best.run_summary.best_trial.number
    )
    assert set(best.hyperparameters) == {
        "learning_rate",
        "proxy_learning_rate",
        "num_train_epochs",
        "proxy_bias_ratio",
    }
    assert trainer.args.learning_rate == 1e-2 and trainer.args.output_dir == str(tmp_path)  # as they were
    for trial in trials:
        # the trial's value is that of a run by hand with its settings, one trial after the other changing nothing
        fields = {name: trial.params[name] for name in ("learning_rate", "proxy_learning_rate", "num_train_epochs")}
        values = {"proxy_bias_ratio": trial.params["proxy_bias_ratio"]}
        torch.manual_seed(trainer.args.seed)
        alone = VPTSPTrainer(
            model=Counted(backbone_folder, **values)(None),
            args=make_args(
                tmp_path / f"alone{trial.number}", eval_strategy="epoch", save_strategy="epoch",
                load_best_model_at_end=True, metric_for_best_model="map_at_r", **fields,
            ),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
        )  # fmt: skip
        alone.train()
        assert alone.evaluate()["eval_map_at_r"] == trial.value
        folders = sorted((tmp_path / f"run-{trial.number}").glob("checkpoint-*"))
        record = json.loads((folders[0] / "run.json").read_text())
        assert record["settings"]["learning_rate"] == trial.params["learning_rate"]
        assert record["model"]["proxy_bias_ratio"] == trial.params["proxy_bias_ratio"]
        assert len(trial.intermediate_values) == trial.params["num_train_epochs"]
    with pytest.raises(OutputFolderError, match=r"run-0 holds an earlier run"):
        trainer.hyperparameter_search(space, n_trials=1)


def test_pruned_trials(backbone_folder, tmp_path, train_dataset, eval_dataset):
    trainer = make_trainer(tmp_path, Counted(backbone_folder), train_dataset, eval_dataset, num_train_epochs=3)
    pruner = optuna.pruners.ThresholdPruner(lower=2.0, n_warmup_steps=3)
    with pytest.raises(ValueError, match="No trials are completed"):
        trainer.hyperparameter_search(n_trials=2, pruner=pruner)
    pruner = optuna.pruners.NopPruner()
    best = trainer.hyperparameter_search(n_trials=1, pruner=pruner, hp_name=lambda trial: f"try{trial.number}")
    assert (tmp_path / "try0").is_dir()
    assert set(best.hyperparameters) == {"learning_rate", "proxy_learning_rate", "proxy_bias_ratio"}


REFUSED = {
    "field": (
        {"hp_space": lambda trial: {"learning_rat": 1.0}},
        ConfigError,
        "got learning_rat; did you mean 'learning_rate'",
    ),
    "no mapping": ({"hp_space": lambda trial: None}, ConfigError, "hp_space must give a mapping of fields .* None"),
    "no function": ({"hp_space": {"learning_rate": 1.0}}, ValueError, "hp_space must be a function, got {"),
    "no trials": ({"n_trials": 0}, ValueError, "n_trials must be an integer >= 1, got 0"),
    "half a trial": ({"n_trials": 1.5}, ValueError, "n_trials must be an integer >= 1, got 1.5"),
    "for ever": ({"n_trials": None}, ValueError, "n_trials must be an integer >= 1, got None"),
    "sampler": ({"sampler": "tpe"}, ValueError, "sampler must be an object of a class of optuna.samplers, got 'tpe'"),
    "model field": (
        {"hp_space": lambda trial: {"num_prompts": 3}},
        ConfigError,
        r"got num_prompts\. What the model is",
    ),
    "folder": ({"hp_space": lambda trial: {"output_dir": "x"}}, ConfigError, "got output_dir"),
    "value": ({"hp_space": lambda trial: {"learning_rate": -1.0}}, ValueError, "learning_rate must be .* got -1.0"),
    "backend": ({"backend": "ray"}, ValueError, "backend must be optuna, got 'ray'"),
    "direction": ({"direction": "up"}, ValueError, "direction must be maximize or minimize, got 'up'"),
    "threads": ({"n_jobs": 2}, ValueError, "n_jobs must be left out"),
    "option": ({"samplers": 2}, TypeError, "has no option samplers; did you mean 'sampler'"),
}


@pytest.mark.parametrize("options, error, message", REFUSED.values(), ids=REFUSED)
def test_searches_that_are_refused(
    backbone_folder,
    tmp_path,
    train_dataset,
    eval_dataset,
    options,
    error,
    message,
):
    trainer = make_trainer(tmp_path, Counted(backbone_folder), train_dataset, eval_dataset)
    with pytest.raises(error, match=message):
        trainer.hyperparameter_search(**{"n_trials": 1, **options})


def test_a_metric_that_there_is_not(backbone_folder, tmp_path, train_dataset, eval_dataset):
    options = {"eval_strategy": "no", "metric_for_best_model": "map_at_rr"}
    trainer = make_trainer(tmp_path, Counted(backbone_folder), train_dataset, eval_dataset, **options)
    with pytest.raises(
        ConfigError, match=r"map_at_rr is none of what evaluation gives: .*did you mean 'eval_map_at_r'"
    ):
        trainer.hyperparameter_search(n_trials=1)
    trainer.args.metric_for_best_model = None
    with pytest.raises(ValueError, match="compute_objective must be given where metric_for_best_model is None"):
        trainer.hyperparameter_search(n_trials=1)


def test_what_a_search_needs(backbone_folder, tmp_path, train_dataset, eval_dataset, monkeypatch):
    init = Counted(backbone_folder)
    with pytest.raises(ValueError, match="needs an eval_dataset, by which trials are compared"):
        make_trainer(tmp_path, init, train_dataset).hyperparameter_search()
    plain = VPTSPTrainer(model=init(None), args=make_args(tmp_path), eval_dataset=eval_dataset)
    with pytest.raises(ValueError, match="hyperparameter_search needs a model_init"):
        plain.hyperparameter_search()
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match="needs the package optuna: pip install optuna"):
        make_trainer(tmp_path, init, train_dataset, eval_dataset).hyperparameter_search()


def search_on_ranks(folder, backbone_folder, data, cache):
    """What a rank of two does: a search of three trials, of which one is pruned."""
    torch.set_num_threads(1)
    found = load_splits("folder", data, cache_dir=cache, train_classes=[f"class{c}" for c in range(5)])
    train, test = ImageDataset(found["train"], TrainTransform(16)), ImageDataset(found["test"], EvalTransform(18, 16))
    init = Counted(backbone_folder)
    trainer = make_trainer(folder, init, train, test, per_device_train_batch_size=2, num_train_epochs=2)
    best = trainer.hyperparameter_search(n_trials=3, pruner=Second(), sampler=optuna.samplers.RandomSampler(seed=0))
    told = {"models": [float(model.proxies.original_proxies.sum()) for model in init.models]}
    told["trials"] = [trial.params for trial in init.trials[1:]]
    if best is not None:
        told["states"] = [trial.state.name for trial in best.run_summary.trials]
        told["values"] = [trial.value for trial in best.run_summary.trials]
    (folder / f"rank{trainer.args.process_index}.json").write_text(json.dumps(told))


class Second(optuna.pruners.BasePruner):
    """Prunes the second trial."""

    def prune(self, study, trial):
        return trial.number == 1


@pytest.mark.distributed
def test_several_processes_share_the_trials(backbone_folder, tmp_path, splits):
    """Every process trains the same models with the same settings, and all stop a pruned trial together."""
    files = [row["image"]["path"] for row in splits["train"].cast_column("image", datasets.Image(decode=False))]
    data = Path(files[0]).parents[1]
    debug_launcher(search_on_ranks, (tmp_path, backbone_folder, data, tmp_path / "cache"), num_processes=2)
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert first["states"] == ["COMPLETE", "PRUNED", "COMPLETE"]
    assert first["values"][0] is not None and first["values"][2] is not None
    assert first["trials"] == second["trials"] and len(first["trials"]) == 3
    assert first["models"] == second["models"] and len(first["models"]) == 4
