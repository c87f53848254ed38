"""Checkpoints that can't be gone on from: one line that names the file, or an older one is taken, which is said."""

import json
import re
import shutil

import checkpoint_runs
import pytest
import torch
from safetensors.torch import load_file, save_file

from vptsp.files.digests import file_record
from vptsp.training.run_errors import CheckpointError


TRAINING = {"num_train_epochs": 1, "save_steps": 4, "eval_strategy": "no", "load_best_model_at_end": False}
LISTED = (
    *("model.safetensors", "optimizer.safetensors", "optimizer.json", "progress.safetensors", "progress.json"),
    *("trainer_state.json", "config.json"),
)


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    images = checkpoint_runs.write_colours(tmp_path_factory.mktemp("data") / "images")
    return checkpoint_runs.make_splits(images, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def build(splits, backbone_folder):
    def make(output):
        return checkpoint_runs.build_trainer(
            splits, backbone_folder, {"output": str(output), "training": TRAINING, "model": {}}
        )

    return make


@pytest.fixture(scope="module")
def trainer(build, tmp_path_factory):
    """After its run, with checkpoints 4 and 7."""
    trainer = build(tmp_path_factory.mktemp("finished") / "run")
    trainer.train()
    return trainer


@pytest.fixture
def output(trainer, tmp_path, monkeypatch):
    """A copy of the run that may be spoiled, which the trainer takes for its own."""
    shutil.copytree(trainer.args.output_dir, tmp_path / "run")
    monkeypatch.setattr(trainer.args, "output_dir", str(tmp_path / "run"))
    return tmp_path / "run"


def written(content):
    return lambda path: path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-3])


def changed(path):
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


def record(**fields):
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | fields))


CASES = {
    f"{name} {what}": (name, damage, rf"checkpoint-7.*{re.escape(name)}")
    for name in LISTED
    for what, damage in {
        "missing": lambda path: path.unlink(),
        "empty": written(b""),
        "cut": cut,
        "changed": changed,
    }.items()
}
RUN = r"checkpoint-7/run.json"
CASES |= {
    "run.json missing": (
        "run.json",
        lambda path: path.unlink(),
        "checkpoint-7 is no checkpoint .* it has no run.json",
    ),
    "run.json empty": ("run.json", written(b""), f"{RUN} is damaged"),
    "run.json cut": ("run.json", cut, f"{RUN} is damaged"),
    "run.json a list": ("run.json", written(b"[]"), f"{RUN}.* must hold"),
    "run.json of nothing": ("run.json", written(b"{}"), f"{RUN} has format_version None, expected 1 or 2"),
    "run.json of a newer version": ("run.json", record(format_version=9), f"{RUN} has format_version 9, expected"),
    "run.json twice a key": ("run.json", written(b'{"files": {}, "files": {}}'), f"{RUN}.* 'files' is there twice"),
    "no files": ("run.json", record(files=None), f"{RUN} lists no files"),
    "a list of files": ("run.json", record(files=["model.safetensors"]), f"{RUN} lists no files"),
    "files without records": (
        "run.json",
        record(files={"config.json": "x"}),
        "checkpoint-7 lists no size and checksum of config.json",
    ),
    "files with odd records": (
        "run.json",
        record(files={"config.json": {}}),
        "checkpoint-7 lists no size and checksum of config.json",
    ),
    "files elsewhere": ("run.json", record(files={"../a": 3}), "checkpoint-7 lists the file '../a', which is outside"),
    "a model that is none": ("run.json", record(model=[]), f"{RUN} must have a mapping as model, got a list"),
    "no settings": ("run.json", record(settings=None), f"{RUN} must have a mapping as settings, got a NoneType"),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_named_and_an_older_one_is_taken(case, trainer, output, caplog):
    name, damage, message = CASES[case]
    damage(output / "checkpoint-7" / name)
    with pytest.raises(CheckpointError, match=message) as caught:
        trainer.checkpoint_to_resume(str(output / "checkpoint-7"))
    assert "\n" not in str(caught.value)
    caplog.clear()
    assert trainer.checkpoint_to_resume(True) == str(output / "checkpoint-4")
    (line,) = [entry.getMessage() for entry in caplog.records if "going on" in entry.getMessage()]
    assert re.search(message, line) and line.endswith("; going on from checkpoint-4")
    shutil.rmtree(output / "checkpoint-4")
    with pytest.raises(CheckpointError, match=rf"holds no checkpoint that is whole: .*{message}") as caught:
        trainer.checkpoint_to_resume(True)
    assert "\n" not in str(caught.value)


def rewritten(folder, name, change):
    """A file of a checkpoint that holds something else, and is listed as that."""
    path = folder / name
    if path.suffix == ".safetensors":
        save_file(change(load_file(path)), path)
    else:
        path.write_text(json.dumps(change(json.loads(path.read_text()))))
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(run | {"files": run["files"] | {name: file_record(path)}}))


def reshaped(tensors):
    name = max(name for name, tensor in tensors.items() if tensor.dim())
    return tensors | {name: torch.zeros(3, 5)}


MISSHAPEN = {
    "model of other shapes": ("model.safetensors", reshaped, r"checkpoint-7.* \(3, 5\) instead of"),
    "model without a tensor": ("model.safetensors", lambda x: dict(list(x.items())[1:]), "checkpoint-7.* lacks "),
    "model of another": ("model.safetensors", lambda x: {"x": torch.zeros(2)}, "checkpoint-7.* lacks .* unknown x"),
    "optimizer of other shapes": ("optimizer.safetensors", reshaped, "checkpoint-7/optimizer"),
    "optimizer without tensors": ("optimizer.safetensors", lambda x: {"x": torch.zeros(2)}, "checkpoint-7/optimizer"),
    "optimizer of nothing": ("optimizer.json", lambda x: {"dict": []}, "checkpoint-7/optimizer.json"),
    "optimizer a number": ("optimizer.json", lambda x: 3, "checkpoint-7/optimizer.json"),
    "progress of nothing": ("progress.json", lambda x: [], "checkpoint-7/progress.json"),
    "progress a number": ("progress.json", lambda x: 3, "checkpoint-7/progress.json"),
    "progress without tensors": ("progress.safetensors", lambda x: {"x": torch.zeros(2)}, "checkpoint-7/progress"),
    "state of other fields": ("trainer_state.json", lambda x: {"step": 3}, "checkpoint-7/trainer_state.json"),
    "state a list": ("trainer_state.json", lambda x: [], "checkpoint-7/trainer_state.json"),
    "state before its start": ("trainer_state.json", lambda x: x | {"global_step": -3}, "checkpoint-7/trainer_state"),
    "state of another step": ("trainer_state.json", lambda x: x | {"global_step": 2}, "checkpoint-7/trainer_state"),
}


@pytest.mark.parametrize("case", MISSHAPEN)
def test_what_is_whole_but_of_something_else_is_refused(case, build, trainer, output):
    """Never a start from zero: not one step is made."""
    name, change, message = MISSHAPEN[case]
    rewritten(output / "checkpoint-7", name, change)
    fresh = build(output)
    with pytest.raises((CheckpointError, ValueError), match=message) as caught:
        fresh.train(resume_from_checkpoint=str(output / "checkpoint-7"))
    assert "\n" not in str(caught.value)
    assert fresh.state.global_step in (0, 7)


def test_a_checkpoint_of_transformers_own_trainer(trainer, output):
    foreign = output / "checkpoint-9"
    foreign.mkdir()
    (foreign / "trainer_state.json").write_text("{}")
    save_file({"x": torch.zeros(2)}, foreign / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"checkpoint-9 is no checkpoint of VPTSPTrainer: it has no run.json"):
        trainer.checkpoint_to_resume(str(foreign))
    assert trainer.checkpoint_to_resume(True) == str(output / "checkpoint-7")
