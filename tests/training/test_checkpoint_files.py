"""What a checkpoint holds, what is refused, and what a disk can do wrong."""

import errno
import json
import math
import random
import shutil
import signal

import checkpoint_runs
import numpy as np
import pytest
import torch
from oracle import first_fingerprint
from safetensors import SafetensorError
from transformers import ViTModel

from vptsp import EvalTransform, ImageDataset, TrainTransform, VPTSPForMetricLearning, VPTSPTrainingArguments
from vptsp.data_scripts.data_fingerprint import relative_names
from vptsp.modeling_vptsp import backbone_fingerprint
from vptsp.training.checkpoints import (
    check_checkpoint,
    checkpoints_in,
    last_checkpoint,
    load_tree,
    prepare_root,
    random_state,
    rotate,
    save_tree,
    set_random_state,
)
from vptsp.training.run_errors import CheckpointError, CheckpointWriteError


TRAINING = {"num_train_epochs": 1, "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return checkpoint_runs.write_colours(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def splits(images, tmp_path_factory):
    return checkpoint_runs.make_splits(images, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def build(splits, backbone_folder):
    """A function that makes a trainer; like all that the others make, but for what is said."""

    def make(output, splits=splits, model=None, **training):
        request = {"output": str(output), "training": {**TRAINING, **training}, "model": model or {}}
        return checkpoint_runs.build_trainer(splits, backbone_folder, request)

    return make


@pytest.fixture(scope="module")
def finished(build, tmp_path_factory):
    """The folder of a run, with checkpoints 4 and 7."""
    output = tmp_path_factory.mktemp("finished") / "run"
    build(output).train()
    return output


@pytest.fixture
def output(finished, tmp_path):
    """A copy of it that may be spoiled."""
    return shutil.copytree(finished, tmp_path / "run")


# ---- What is in it


def test_it_is_safetensors_and_json_and_is_read_without_pickle(build, output, monkeypatch):
    for folder in checkpoints_in(output):
        endings = {path.suffix for path in folder.rglob("*")}
        assert endings <= {".json", ".safetensors", ".py"}
        record = check_checkpoint(folder)
        assert set(record["files"]) | {"run.json"} == {path.name for path in folder.iterdir()}
        assert {"optimizer.safetensors", "progress.safetensors", "trainer_state.json"} <= set(record["files"])
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("torch.load"))
    monkeypatch.setattr(torch, "save", lambda *args, **kwargs: pytest.fail("torch.save"))
    build(output).train(resume_from_checkpoint=str(output / "checkpoint-4"))


def test_its_configuration_leads_to_the_backbone(finished, backbone_folder):
    model = VPTSPForMetricLearning.from_pretrained(finished / "checkpoint-7")
    assert model.retriever.config.backbone_fingerprint is not None
    assert (
        finished / "checkpoint-7" / json.loads((finished / "checkpoint-7/config.json").read_text())["backbone"]
    ).samefile(backbone_folder)


def test_fingerprint_of_the_first_kind(build, output, backbone_folder):
    """Of a run that was interrupted before fingerprints saw every value: compared with the backbone's weights."""
    weights = ViTModel.from_pretrained(backbone_folder, add_pooling_layer=False).state_dict()

    def resume_with(fingerprint):
        path = output / "checkpoint-4" / "run.json"
        record = json.loads(path.read_text())
        record["model"]["backbone_fingerprint"] = fingerprint
        path.write_text(json.dumps(record))
        return build(output).checkpoint_to_resume(str(output / "checkpoint-4"))

    assert resume_with(first_fingerprint(weights)) == str(output / "checkpoint-4")
    weights["layernorm.weight"][0] += 1
    for other in (first_fingerprint(weights), backbone_fingerprint(weights)):
        with pytest.raises(CheckpointError, match=rf"model\.backbone_fingerprint: checkpoint '{other}', now 'v2:"):
            resume_with(other)


def test_at_an_epoch_s_end_it_has_the_epoch_s_evaluation(build, tmp_path):
    build(tmp_path, eval_strategy="epoch", save_steps=7, num_train_epochs=2, load_best_model_at_end=False).train()
    for step in (7, 14):
        log = json.loads((tmp_path / f"checkpoint-{step}/trainer_state.json").read_text())["log_history"]
        assert [entry["step"] for entry in log if "eval_map_at_r" in entry] == list(range(7, step + 1, 7))


def test_the_gradient_scaler_goes_on(build, tmp_path):
    trainer = build(tmp_path, max_steps=2, save_steps=1, eval_strategy="no")
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=3.0)
    trainer.train()
    other = build(tmp_path, max_steps=2, save_steps=1, eval_strategy="no")
    other.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=5.0)
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert other.accelerator.scaler.get_scale() == 3.0


def test_trees_come_back_as_they_were(tmp_path):
    tree = {
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(2, 3, dtype=torch.bfloat16).T}, 1: {}},
        "groups": [{"betas": (0.9, 0.999), "lr": 1e-3 / 3, "fused": None, "params": [0, 1]}],
        "array": np.array([1, 2**32 - 1], dtype=np.uint32),
        "best": [math.inf, True, "text"],
    }
    save_tree(tmp_path, "tree", tree)
    found = load_tree(tmp_path, "tree")
    moments, expected = found["state"].pop(0), tree["state"].pop(0)
    assert torch.equal(moments["exp_avg"], expected["exp_avg"]) and torch.equal(moments["step"], expected["step"])
    assert found["array"].dtype == np.uint32 and found.pop("array").tolist() == tree.pop("array").tolist()
    assert found == tree and isinstance(found["groups"][0]["betas"], tuple)
    with pytest.raises(TypeError, match="tree/a/0 can't be saved in a checkpoint: object is no tensor"):
        save_tree(tmp_path, "tree", {"a": [object()]})
    (tmp_path / "tree.json").write_text('{"tensor": "tree/other"}')
    with pytest.raises(CheckpointError, match=r"tree.json and .safetensors don't belong together"):
        load_tree(tmp_path, "tree")


def test_random_generators_go_on(tmp_path):
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    save_tree(tmp_path, "random", random_state(torch.device("cpu")))
    expected = draw()
    assert draw() != expected
    set_random_state(load_tree(tmp_path, "random"), torch.device("cpu"))
    assert draw() == expected


# ---- Which runs may go on


@pytest.mark.parametrize(
    "model, training, line",
    [
        ({}, {"learning_rate": 0.5}, r"  settings.learning_rate: checkpoint 0.01, now 0.5"),
        (
            {},
            {"seed": 7, "optim": "sgd"},
            r"  settings.optim: checkpoint '\w+', now 'sgd'\n  settings.seed: .*, now 7",
        ),
        ({}, {"num_train_epochs": 4}, r"  settings.num_train_epochs: checkpoint 1, now 4"),
        ({}, {"gradient_accumulation_steps": 2}, r"  settings.gradient_accumulation_steps: checkpoint 1, now 2"),
        ({}, {"per_device_train_batch_size": 6}, r"  settings.global_batch_size: checkpoint 4, now 6"),
        ({"proxy_bias_ratio": 0.1}, {}, r"  model.proxy_bias_ratio: checkpoint 0.5, now 0.1"),
        (
            {"bitfit": False},
            {},
            r"  model.bitfit: checkpoint True, now False\n  tuned: only in the checkpoint 'vptsp.b",
        ),
    ],
)
def test_other_settings_are_refused_and_listed(build, finished, model, training, line):
    trainer = build(finished, model=model, **training)
    with pytest.raises(
        CheckpointError, match=rf"checkpoint-7 is of another run:\n(.|\n)*{line}(.|\n)*Give what it had"
    ):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 0


def test_other_data_are_refused_and_listed(build, finished, images, tmp_path):
    def refused(folder):
        splits = checkpoint_runs.make_splits(folder, tmp_path / "cache")
        with pytest.raises(CheckpointError) as error:
            build(finished, splits).checkpoint_to_resume(True)
        return str(error.value).splitlines()[1:-1]

    shutil.copytree(images, tmp_path / "moved")
    moved = checkpoint_runs.make_splits(tmp_path / "moved", tmp_path / "cache")
    assert build(finished, moved).checkpoint_to_resume(True) == str(finished / "checkpoint-7")

    (tmp_path / "moved/class7").rename(tmp_path / "moved/other")
    assert refused(tmp_path / "moved")[0] == "  eval_data.classes: only in the checkpoint 'class7', only now 'other'"
    (tmp_path / "moved/other").rename(tmp_path / "moved/class7")
    (tmp_path / "moved/class0/0.png").unlink()
    assert refused(tmp_path / "moved")[0] == "  train_data.images: checkpoint 30, now 29"
    shutil.copy(images / "class1/0.png", tmp_path / "moved/class0/0.png")
    assert refused(tmp_path / "moved")[0].startswith("  train_data.contents: checkpoint")


def test_other_transforms_are_refused(build, finished, splits):
    trainer = build(finished)
    trainer.train_dataset = ImageDataset(splits["train"], TrainTransform(16, scale=(0.5, 1.0)))
    with pytest.raises(
        CheckpointError, match=r"train_data.transform: checkpoint 'TrainTransform\(size=16, scale=\(0.08"
    ):
        trainer.checkpoint_to_resume(True)
    assert relative_names(["C:\\x\\a\\1.jpg", None, "C:\\x\\b\\1.jpg"]) == ["a/1.jpg", None, "b/1.jpg"]


def test_what_may_differ_may_differ(build, output, tmp_path, caplog):
    record = json.loads((output / "checkpoint-4/run.json").read_text())
    record["versions"]["torch"] = "1.0"
    (output / "checkpoint-4/run.json").write_text(json.dumps(record))
    free = {"eval_strategy": "no", "save_steps": 2, "logging_steps": 1, "per_device_eval_batch_size": 2}
    free |= {"dataloader_num_workers": 1, "load_best_model_at_end": False, "recall_at": [1, 3]}
    trainer = build(tmp_path / "elsewhere", **free)
    trainer.train(resume_from_checkpoint=str(output / "checkpoint-4"))
    assert [path.name for path in checkpoints_in(tmp_path / "elsewhere")] == ["checkpoint-6", "checkpoint-7"]
    assert [entry["step"] for entry in trainer.state.log_history] == [2, 4, 4, 5, 6, 7, 7]
    assert "going on with other versions, which may round otherwise: torch: checkpoint '1.0', now" in caplog.text


def test_the_best_checkpoint_is_found_where_the_run_is_now(build, output, tmp_path):
    state = json.loads((output / "checkpoint-7/trainer_state.json").read_text())
    best = state["best_model_checkpoint"]
    assert best.endswith(("/run/checkpoint-4", "/run/checkpoint-7")) and not best.startswith(str(output))
    trainer = build(output)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.best_model_checkpoint == str(output / best.rsplit("/", 1)[1])

    def with_best(value):
        text = json.dumps({**state, "best_model_checkpoint": value})
        (output / "checkpoint-7/trainer_state.json").write_text(text)
        record = json.loads((output / "checkpoint-7/run.json").read_text())
        record["files"]["trainer_state.json"] = len(text)
        (output / "checkpoint-7/run.json").write_text(json.dumps(record))
        return build(output)

    with pytest.raises(CheckpointError, match="the best checkpoint so far, checkpoint-3, is gone from"):
        with_best("/nowhere/checkpoint-3").checkpoint_to_resume(True)
    with pytest.raises(CheckpointError, match="best_model_checkpoint is no checkpoint, got '/etc/x'"):
        with_best("/etc/x").checkpoint_to_resume(True)


# ---- Which folders are checkpoints


def test_no_checkpoint(build, tmp_path):
    with pytest.raises(CheckpointError, match=r"resume_from_checkpoint: output_dir .*/run holds no checkpoint$"):
        build(tmp_path / "run").train(resume_from_checkpoint=True)
    with pytest.raises(CheckpointError, match=r"there is no checkpoint folder .*nowhere"):
        build(tmp_path / "run").train(resume_from_checkpoint=str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match=r" is no checkpoint of VPTSPTrainer: it has no run.json"):
        build(tmp_path / "run").train(resume_from_checkpoint=str(tmp_path))


def test_damage_is_named_and_the_last_whole_one_is_taken(output, caplog):
    last = output / "checkpoint-7"

    def damaged(message):
        with pytest.raises(CheckpointError, match=message):
            check_checkpoint(last)
        shutil.rmtree(last)
        shutil.copytree(whole, last)

    whole = shutil.copytree(last, output / "whole")
    (last / "model.safetensors").unlink()
    damaged("checkpoint-7 lacks model.safetensors")
    (last / "optimizer.safetensors").write_bytes((last / "optimizer.safetensors").read_bytes()[:-1])
    damaged(r"optimizer.safetensors has \d+ bytes, expected \d+: it is damaged")
    (last / "progress.safetensors").write_bytes(b"\xff" * (last / "progress.safetensors").stat().st_size)
    damaged(r"progress.safetensors has another content than was written \(its SHA-256 differs\): it is damaged")
    (last / "trainer_state.json").write_bytes(b"{" * (last / "trainer_state.json").stat().st_size)
    damaged("trainer_state.json has another content than was written")
    record = json.loads((last / "run.json").read_text())
    (last / "run.json").write_text(json.dumps({**record, "files": {"../../secret.json": 3}}))
    damaged(r"lists the file '../../secret.json', which is outside of it")
    (last / "run.json").write_text(json.dumps({**record, "format_version": 3}))
    damaged("run.json has format_version 3, expected 1 or 2")
    (last / "run.json").write_text("[")
    damaged("run.json is damaged")

    (last / "config.json").unlink()
    assert last_checkpoint(output) == output / "checkpoint-4"
    assert "checkpoint-7 lacks config.json; going on from checkpoint-4" in caplog.text
    (output / "checkpoint-4" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds no checkpoint that is whole: .*checkpoint-7 lacks config.json"):
        last_checkpoint(output)


def test_a_checkpoint_of_the_model_alone_is_refused(build, tmp_path):
    build(tmp_path, save_only_model=True, max_steps=1, eval_strategy="no").train()
    with pytest.raises(CheckpointError, match=r"checkpoint-1 was saved without optimizer.json \(save_only_model\)"):
        check_checkpoint(tmp_path / "checkpoint-1")


def test_what_was_cut_short_is_cleared_away(tmp_path):
    for name in (".checkpoint-3.partial", ".checkpoint-1.replaced", ".checkpoint-2.replaced", ".checkpoint-0.deleted"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    for name in ("checkpoint-2", "target", ".checkpoint-other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    (tmp_path / ".checkpoint-9.partial").symlink_to(tmp_path / "target")
    prepare_root(tmp_path)
    found = {path.name: (path / "file").read_text() for path in tmp_path.iterdir()}
    assert found == {
        "checkpoint-1": ".checkpoint-1.replaced",  # there was no other
        "checkpoint-2": "checkpoint-2",
        "target": "target",
        ".checkpoint-other": ".checkpoint-other",
    }


@pytest.mark.parametrize(
    "limit, keep, left",
    [
        (None, [], [2, 10, 30]),
        (2, ["checkpoint-30"], [10, 30]),
        (1, ["checkpoint-30"], [30]),
        (1, ["checkpoint-10", "x/checkpoint-2"], [2, 10]),
        (2, ["checkpoint-10", None], [10, 30]),  # gone on with from an earlier one
    ],
)
def test_rotation_keeps_the_new_one_and_the_best(tmp_path, limit, keep, left):
    for step in (2, 10, 30):
        (tmp_path / f"checkpoint-{step}" / "folder").mkdir(parents=True)
    (tmp_path / "checkpoint-notes").mkdir()
    rotate(tmp_path, limit, keep)
    assert [path.name for path in checkpoints_in(tmp_path)] == [f"checkpoint-{step}" for step in left]
    assert len(list(tmp_path.iterdir())) == len(left) + 1


# ---- What a disk can do wrong


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("No space left")])
@pytest.mark.parametrize("written", [1, 2, 3])
def test_a_full_disk_leaves_earlier_checkpoints_intact(build, tmp_path, monkeypatch, error, written):
    """The disk fills up in the second checkpoint, at one of its three files of tensors."""
    import vptsp.training.checkpoints as checkpoints

    trainer, count = build(tmp_path), 0

    def full(name):
        original = getattr(*name)

        def save(*args, **kwargs):
            nonlocal count
            count += 1
            if count == 3 + written:
                raise error
            return original(*args, **kwargs)

        monkeypatch.setattr(*name, save)

    full((trainer.model, "save_pretrained"))
    full((checkpoints, "save_file"))
    with pytest.raises(CheckpointWriteError) as caught:
        trainer.train()
    message = r"checkpoint-7 could not be written (earlier checkpoints are intact, the last is checkpoint-4): No space"
    assert message in str(caught.value)
    assert caught.value.errno == getattr(error, "errno", None)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-4", ".lock", ".run"}
    check_checkpoint(tmp_path / "checkpoint-4")


def test_the_system_s_own_refusal_to_write(build, tmp_path):
    """A limit on the size of files, which stops the file in the middle as a full disk does."""
    resource = pytest.importorskip("resource")
    trainer = build(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))  # between the model's file and the optimiser's
    try:
        with pytest.raises(
            CheckpointWriteError, match=r"checkpoint-4 could not be written \(there was none before\): .*"
        ):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_folder_that_can_not_be_one_is_refused_before_training(build, tmp_path):
    trainer = build(tmp_path / "run")
    (tmp_path / "run").rmdir()
    (tmp_path / "run").write_text("")
    with pytest.raises(CheckpointWriteError, match=r"output_dir .*/run can't take checkpoints: Not a directory"):
        trainer.train()
    assert trainer.state.global_step == 0


# ---- What is not for this trainer


@pytest.mark.parametrize(
    "name, variable", [("fsdp", "ACCELERATE_USE_FSDP"), ("deepspeed", "ACCELERATE_USE_DEEPSPEED")]
)
def test_sharding_is_refused(tmp_path, monkeypatch, name, variable):
    message = f"{name} is not supported: it shards weights.*the backbone is frozen.*torchrun or accelerate launch"
    with pytest.raises(ValueError, match=message):
        VPTSPTrainingArguments(str(tmp_path), use_cpu=True, **{name: "full_shard"})
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ValueError, match=message):
        VPTSPTrainingArguments(str(tmp_path), use_cpu=True)


def test_transformers_own_way_of_saving_on_sigterm_is_refused(tmp_path):
    with pytest.raises(ValueError, match="enable_jit_checkpoint must be false, got True: SIGTERM and Ctrl-C save a"):
        VPTSPTrainingArguments(str(tmp_path), use_cpu=True, enable_jit_checkpoint=True)


@pytest.mark.parametrize(
    "given, meant", [("true", True), ("False", False), (True, True), ("a/checkpoint-3",) * 2, (None, None)]
)
def test_the_command_line_s_true_is_true(tmp_path, given, meant):
    assert (
        VPTSPTrainingArguments(str(tmp_path), use_cpu=True, resume_from_checkpoint=given).resume_from_checkpoint
        == meant
    )


def test_evaluation_with_workers_sees_every_image(build, splits, tmp_path):
    trainer = build(tmp_path, dataloader_num_workers=2)
    assert len(trainer.embed(ImageDataset(splits["test"], EvalTransform(18, 16)))[1]) == 18
