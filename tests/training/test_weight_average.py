"""`ema_decay`: the average is that of a plain loop, is what is evaluated and saved, and survives interruption."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from test_trainer import make_args, make_model
from transformers import TrainerCallback

from vptsp import VPTSPForMetricLearning, VPTSPModel, VPTSPTrainer
from vptsp.training.run_errors import CheckpointError


DECAY = 0.7


class Watch(TrainerCallback):
    """Notes the tuned weights after every step, and a float64 average of them."""

    def __init__(self, model):
        self.model, self.average, self.steps = model, None, 0

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1
        now = {n: p.detach().double() for n, p in self.model.retriever.named_parameters() if p.requires_grad}
        if self.average is None:
            self.average = {name: weight.clone() for name, weight in now.items()}
        for name, weight in now.items():
            self.average[name] = DECAY * self.average[name] + (1 - DECAY) * weight


def average_of(model):
    return {name: p.detach().double() for name, p in model.retriever.named_parameters() if p.requires_grad}


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def make_trainer(backbone_folder, folder, train_dataset, eval_dataset=None, model=None, **fields):
    model = make_model(backbone_folder) if model is None else model
    args = make_args(folder, **{"ema_decay": DECAY, **fields})
    return VPTSPTrainer(model=model, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset)


def test_the_average_is_that_of_a_plain_loop(backbone_folder, tmp_path, train_dataset):
    trainer = make_trainer(backbone_folder, tmp_path, train_dataset)
    watch = Watch(trainer.model)
    trainer.add_callback(watch)
    trainer.train()
    assert watch.steps > 5
    assert_close(average_of(trainer.model), watch.average)

    raw = make_trainer(backbone_folder, tmp_path, train_dataset, ema_decay=None)
    raw.train()
    names = [n for n, p in raw.model.named_parameters() if not n.startswith("vptsp.") and p.requires_grad]
    assert names  # training itself is not touched
    for name in names:
        assert torch.equal(raw.model.get_parameter(name), trainer.model.get_parameter(name)), name
    assert not torch.equal(raw.model.vptsp.prompts.tokens, trainer.model.vptsp.prompts.tokens)


def test_the_average_is_evaluated_and_saved(backbone_folder, tmp_path, train_dataset, eval_dataset):
    found = []

    class Compare(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            raw = average_of(trainer.model)
            expected = copy.deepcopy(trainer.model.retriever).eval()
            with torch.no_grad():
                for name, parameter in expected.named_parameters():
                    if parameter.requires_grad:
                        parameter.copy_(watch.average[name])
            pixels = torch.stack([eval_dataset[i]["pixel_values"] for i in range(len(eval_dataset))]).float()
            with torch.no_grad():
                embeddings = expected((pixels / 255 - 0.5) / 0.5).embeddings
            own = trainer.embed(eval_dataset)[0]
            torch.testing.assert_close(own, embeddings, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(torch.from_numpy(trainer.predict(eval_dataset).predictions), own)
            trainer.save_retriever(tmp_path / "shared")
            found.append((state.global_step, VPTSPModel.from_pretrained(tmp_path / "shared"), own))
            assert_close(average_of(trainer.model), raw)  # the weights are back

    trainer = make_trainer(
        backbone_folder, tmp_path / "run", train_dataset, eval_dataset, eval_strategy="epoch", save_strategy="epoch"
    )
    watch = Watch(trainer.model)
    trainer.add_callback(watch)
    trainer.add_callback(Compare())
    trainer.train()
    assert len(found) == 2
    for step, shared, _ in found:
        folder = tmp_path / "run" / f"checkpoint-{step}"
        loaded = VPTSPForMetricLearning.from_pretrained(folder)
        for name, parameter in shared.named_parameters():
            assert torch.equal(parameter, loaded.vptsp.get_parameter(name)), name
        assert (folder / "raw_weights.safetensors").is_file()
    best = trainer.state.best_global_step
    expected = load_file(tmp_path / "run" / f"checkpoint-{best}" / "model.safetensors")
    for name, parameter in trainer.model.named_parameters():
        if name.startswith("vptsp.") and parameter.requires_grad:
            assert torch.equal(parameter, expected[name]), name
    assert torch.equal(trainer.embed(eval_dataset)[0], {step: own for step, _, own in found}[best])


@pytest.mark.parametrize("end", [3, 4])
def test_a_run_that_goes_on_is_the_same(backbone_folder, tmp_path, train_dataset, end):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop |= state.global_step == end

    fields = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None}
    whole = make_trainer(backbone_folder, tmp_path / "whole", train_dataset, **fields)
    whole.train()
    first = make_trainer(backbone_folder, tmp_path / "cut", train_dataset, **fields)
    first.add_callback(Stop())
    first.train()
    second = make_trainer(backbone_folder, tmp_path / "cut", train_dataset, **fields)
    second.train(resume_from_checkpoint=True)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name
    last = whole.state.global_step
    for name in ("model", "raw_weights"):
        files = [load_file(tmp_path / run / f"checkpoint-{last}" / f"{name}.safetensors") for run in ("whole", "cut")]
        assert files[0].keys() == files[1].keys()
        assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])


def test_a_checkpoint_without_averages_is_refused(backbone_folder, tmp_path, train_dataset):
    fields = {"save_strategy": "steps", "save_steps": 3}
    make_trainer(backbone_folder, tmp_path, train_dataset, ema_decay=None, **fields).train()
    trainer = make_trainer(backbone_folder, tmp_path, train_dataset, **fields)
    with pytest.raises(CheckpointError, match=r"settings.ema_decay: checkpoint None, now 0.7"):
        trainer.train(resume_from_checkpoint=True)
    folder = next(tmp_path.glob("checkpoint-*"))
    with pytest.raises(CheckpointError, match=r"raw_weights\.json: its run had no ema_decay"):
        trainer.load_checkpoint(folder)


@pytest.mark.parametrize("decay", [1.0, -0.1, float("nan"), "much"])
def test_decays_that_are_none(tmp_path, decay):
    with pytest.raises(ValueError, match=r"ema_decay must be .*got"):
        make_args(tmp_path, ema_decay=decay)
