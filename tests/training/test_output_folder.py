"""Whose folder a run writes to, that it has it alone, and that what it leaves there belongs together."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import checkpoint_runs
import pytest
import torch
from safetensors.torch import load_file

from vptsp import VPTSPModel, VPTSPTrainingArguments
from vptsp.examples import pretrain_backbone
from vptsp.files.locks import InUseError
from vptsp.training import run_pictures
from vptsp.training.checkpoints import checkpoints_in
from vptsp.training.output_folder import (
    PICTURES,
    OutputFolderError,
    check_output_folder,
    finish_replacing,
    output_held,
    refuse_other_model,
    replaced_together,
)
from vptsp.training.run_record import run_differences


SHORT = {"max_steps": 2, "save_strategy": "no", "eval_strategy": "no"}


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    images = checkpoint_runs.write_colours(tmp_path_factory.mktemp("data") / "images")
    return checkpoint_runs.make_splits(images, tmp_path_factory.mktemp("cache"))


@pytest.fixture
def build(splits, backbone_folder):
    def make(output, backbone=backbone_folder, **training):
        return checkpoint_runs.build_trainer(splits, backbone, {"output": str(output), "training": SHORT | training})

    return make


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


# ---- Whose it is


def test_the_backbone_is_not_overwritten(build, backbone_folder, tmp_path):
    backbone = shutil.copytree(backbone_folder, tmp_path / "backbone")
    before = contents(backbone)
    with pytest.raises(OutputFolderError, match="is the folder of the backbone, which would be overwritten"):
        build(backbone, backbone=backbone)
    with pytest.raises(OutputFolderError, match="is the folder of the backbone"):
        build(tmp_path / "run", backbone=backbone).save_model(str(backbone))
    (tmp_path / "link").symlink_to(backbone)
    with pytest.raises(OutputFolderError, match="is the folder of the backbone"):
        check_output_folder(tmp_path / "link", str(backbone), overwrite=True)
    with pytest.raises(OutputFolderError, match=r"holds another model \(config.json, of type 'vit'\)"):
        build(backbone)  # on a copy of it elsewhere
    assert contents(backbone) == before


@pytest.mark.parametrize(
    "files, message",
    [
        ({"config.json": '{"model_type": "bert"}'}, r"another model \(config.json, of type 'bert'\)"),
        ({"config.json": "{"}, r"another model \(config.json, of type None\)"),
        ({"config.json": "[]"}, r"another model \(config.json, of type None\)"),
        ({"pytorch_model.bin": "x"}, r"another model \(pytorch_model.bin, without config.json\)"),
        ({"adapter_model.safetensors": "x"}, r"another model \(adapter_model.safetensors, without config.json\)"),
        ({"run.json": "{}", "config.json": '{"model_type": "vptsp"}'}, "is a checkpoint of another run"),
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_any_other_model_is_not_overwritten(tmp_path, files, message, overwrite):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    before = contents(tmp_path)
    with pytest.raises(OutputFolderError, match=message):
        check_output_folder(tmp_path, overwrite=overwrite)
    with pytest.raises(OutputFolderError, match=message):
        refuse_other_model(tmp_path)
    assert contents(tmp_path) == before


def test_an_earlier_run_is_replaced_only_where_that_is_said(tmp_path):
    for name in ("all_results.json", "config.json", ".retriever.ready", "checkpoint-3"):
        folder = tmp_path / name.strip(".")
        (folder / name).mkdir(parents=True) if "json" not in name else folder.mkdir()
        if "json" in name:
            (folder / name).write_text('{"model_type": "vptsp"}')
        with pytest.raises(OutputFolderError, match=r"holds an earlier run\. Give another output_dir"):
            check_output_folder(folder)
        with pytest.raises(OutputFolderError, match="holds an earlier run"):
            check_output_folder(folder, resume=str(tmp_path / "other" / "checkpoint-1"))
        check_output_folder(folder, overwrite=True)
        check_output_folder(folder, resume=True)
        check_output_folder(folder, resume=str(folder / "checkpoint-1"))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("x")
    check_output_folder(tmp_path / "notes")


def test_a_pretrained_backbone_replaces_nothing_but_its_like(tmp_path, capsys, backbone_folder):
    backbone = shutil.copytree(backbone_folder, tmp_path / "backbone")
    before = contents(backbone)
    shape = ["--image_size", "16", "--resize_size", "16", "--hidden_size", "8", "--num_attention_heads", "2"]
    shape += ["--num_hidden_layers", "1", "--patch_size", "8", "--digit_size", "16", "--use_cpu", "true"]
    digits = ["--dataset_name", "digits", "--train_classes", "0", *shape, "--data_cache_dir", str(tmp_path / "cache")]

    def main(folder, *options):
        pretrain_backbone.main(["--output_dir", str(folder), *digits, "--num_train_epochs", "0.1", *options])

    for options, message in {
        (): "holds another model (config.json): give another one",
        ("--overwrite_output",): "holds another model (config.json): give another one",
        ("--num_train_epochs", "-1"): "num_train_epochs must be > 0, got -1.0",
        ("--learning_rate", "nan"): "learning_rate must be >= 0, got nan",
    }.items():
        with pytest.raises(SystemExit, match="2"):
            main(backbone, *options)
        assert message in capsys.readouterr().err
    assert contents(backbone) == before
    main(tmp_path / "new")
    with pytest.raises(SystemExit, match="2"):
        main(tmp_path / "new")
    assert "holds an earlier backbone: give another one or --overwrite_output" in capsys.readouterr().err
    main(tmp_path / "new", "--overwrite_output")


# ---- That it is alone there

HOLD = """
import sys
from vptsp.files.locks import locked
with locked(sys.argv[1] + "/.lock", "a run"):
    print("held", flush=True)
    input()
"""


def test_a_second_run_in_the_same_folder_is_refused_until_the_first_is_killed(build, tmp_path):
    output = tmp_path / "run"
    trainer = build(output)
    command = [sys.executable, "-c", HOLD, str(output)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "held\n"
            with pytest.raises(InUseError, match=rf"output_dir {output} is in use by another process"):
                trainer.train()
            assert trainer.state.global_step == 0
        finally:
            process.kill()
    assert trainer.train().global_step == 2


def test_within_a_run_it_is_held_once(tmp_path):
    args = VPTSPTrainingArguments(str(tmp_path / "run"), use_cpu=True)
    with output_held(args), output_held(args):
        pass
    with pytest.raises(KeyError), output_held(args):
        raise KeyError
    with output_held(args):
        pass


def test_class_prompts_of_a_run_that_goes_on_are_not_written_over(build, tmp_path, splits, backbone_folder):
    output = tmp_path / "run"
    request = {"output": str(output), "training": {**SHORT, "class_prompt_folder": str(output / "class_prompts")}}
    request["model"] = {"class_prompt_store": "offloaded"}
    command = [sys.executable, "-c", HOLD, str(output)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "held\n"
            with pytest.raises(InUseError, match="is in use by another process"):
                checkpoint_runs.build_trainer(splits, backbone_folder, request)
            assert not (output / "class_prompts").exists()
        finally:
            process.kill()


# ---- Earlier checkpoints


def test_earlier_checkpoints_stay_until_the_new_run_has_one(build, tmp_path, monkeypatch):
    steps = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": False}
    build(tmp_path, **steps, save_total_limit=None).train()
    (tmp_path / "checkpoint-mine").mkdir()
    (tmp_path / "checkpoint-2" / "notes.txt").write_text("of the earlier run")
    before = [path.name for path in checkpoints_in(tmp_path)]
    trainer = build(tmp_path, **steps)
    trainer.replace_checkpoints()
    seen = []
    compute_loss = trainer.compute_loss

    def watch(*args, **kwargs):
        seen.append([path.name for path in checkpoints_in(tmp_path)])
        return compute_loss(*args, **kwargs)

    monkeypatch.setattr(trainer, "compute_loss", watch)
    trainer.train()
    assert before == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert seen == [before, ["checkpoint-1"], ["checkpoint-1", "checkpoint-2"]]
    assert (tmp_path / "checkpoint-mine").is_dir()

    trainer = build(tmp_path)  # saves none
    trainer.replace_checkpoints()
    trainer.train()
    assert [path.name for path in checkpoints_in(tmp_path)] == before
    trainer.save_model()
    trainer.delete_replaced()
    assert not checkpoints_in(tmp_path)


def test_a_run_that_fails_leaves_the_earlier_checkpoints(build, tmp_path, monkeypatch):
    steps = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": False}
    build(tmp_path, **steps).train()
    before = contents(tmp_path)
    trainer = build(tmp_path, **steps)
    trainer.replace_checkpoints()
    monkeypatch.setattr(trainer, "compute_loss", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert contents(tmp_path) == before


# ---- What it leaves belongs together


def marked(output, number):
    """A retriever whose every tensor and score is `number`, and a picture, saved as a run does."""
    config = json.loads((output.parent / "template" / "config.json").read_text())
    return {
        "config.json": json.dumps({**config, "loss_alpha": float(number)}),
        "weights.txt": str(number),
        "preprocessor_config.json": str(number),
        "all_results.json": json.dumps({"seed": number}),
    }


def write(folder, files):
    for name, text in files.items():
        (folder / name).write_text(text)


@pytest.fixture
def old(tmp_path):
    (tmp_path / "template").mkdir()
    (tmp_path / "template" / "config.json").write_text('{"model_type": "vptsp"}')
    output = tmp_path / "run"
    output.mkdir()
    write(output, marked(output, 1))
    (output / "pictures").mkdir()
    (output / "pictures" / "map.png").write_text("1")
    (output / "pictures" / "mine.png").write_text("mine")
    (output / "notes.txt").write_text("mine")
    return output


def kill_at(output, moment, action):
    """In a child: do something, and be killed at the n-th thing that is done to a file. Returns the exit status."""
    child = os.fork()
    if child == 0:
        count = 0

        def audit(event, arguments):
            nonlocal count
            writes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
            writes |= event == "open" and isinstance(arguments[1], str) and arguments[1] != "r"
            if writes and str(arguments[0]).startswith(str(output)):
                count += 1
                if count == moment:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(audit)
        action()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def replace(output):
    with replaced_together(output) as staged:
        write(staged, marked(output, 2))


def numbers(output):
    """Which save the files are of."""
    names = ("config.json", "weights.txt", "preprocessor_config.json", "all_results.json")
    texts = {name: (output / name).read_text() for name in names if (output / name).exists()}
    read = {
        "config.json": lambda text: json.loads(text)["loss_alpha"],
        "all_results.json": lambda t: json.loads(t)["seed"],
    }
    return {name: float(read.get(name, float)(text)) for name, text in texts.items()}


def test_killed_at_whatever_moment_the_files_are_of_one_save(old, tmp_path):
    outcomes, moment, status = [], 0, None
    while status != 0:
        moment += 1
        output = shutil.copytree(old, tmp_path / f"run-{moment}")
        status = kill_at(output, moment, functools.partial(replace, output))
        found = numbers(output)
        whole = len(found) == 4 and len(set(found.values())) == 1
        # else it is no finished run, or no model either, and the new save is all there
        assert whole or (output / ".retriever.ready").is_dir(), (moment, found)
        assert whole or "all_results.json" not in found, (moment, found)
        assert "config.json" not in found or len(set(found.values())) == 1, (moment, found)
        finish_replacing(output)
        found = numbers(output)
        assert len(found) == 4 and len(set(found.values())) == 1
        outcomes.append(found["config.json"])
        assert (output / "notes.txt").read_text() == (output / "pictures" / "mine.png").read_text() == "mine"
        assert (output / "pictures" / "map.png").exists() == (found["config.json"] == 1)
    assert outcomes == sorted(outcomes) and set(outcomes) == {1.0, 2.0}
    assert outcomes.count(2.0) > 5 and outcomes.count(1.0) > 5


def test_a_trainer_killed_as_it_saves_leaves_one_retriever_with_its_scores(build, tmp_path):
    output, embeddings = tmp_path / "run", {}
    trainer = build(output)
    pixels = torch.randn(2, 3, 16, 16)
    for number in (1, 2):
        with torch.no_grad():
            trainer.model.retriever.prompts.tokens.add_(1)
            embeddings[number] = trainer.model.retriever.eval()(pixels).embeddings
        if number == 1:
            trainer.save_model(results={"seed": 1})
    found, moment, status = [], 0, None
    while status != 0:
        moment += 7
        copy = shutil.copytree(output, tmp_path / f"run-{moment}")
        status = kill_at(copy, moment, lambda copy=copy: trainer.save_model(str(copy), results={"seed": 2}))
        finish_replacing(copy)
        number = json.loads((copy / "all_results.json").read_text())["seed"]
        assert torch.equal(VPTSPModel.from_pretrained(copy)(pixels).embeddings, embeddings[number])
        found.append(number)
    assert found == sorted(found) and set(found) == {1, 2} and found.count(1) > 1


def test_a_save_that_fails_changes_nothing(old):
    before = contents(old)
    with pytest.raises(KeyError), replaced_together(old) as staged:
        (staged / "config.json").write_text("{}")
        raise KeyError
    assert contents(old) == before


def test_pictures_are_those_that_are_drawn(monkeypatch):
    drawn = []
    for name in ("neighbours", "failures", "confusion", "map", "attention", "curves", "proxies", "before_after"):
        monkeypatch.setattr(run_pictures, f"draw_{name}", lambda path, *args, **kwargs: drawn.append(path) or path)
    run_pictures.draw_run("pictures", SimpleNamespace(subject="birds"), None, None, [], [], frozen=object())
    assert {Path(path).as_posix() for path in drawn} == set(PICTURES)


def test_the_trainer_saves_retriever_scores_and_card_together(build, tmp_path, backbone_folder):
    trainer = build(tmp_path)
    (tmp_path / "README.md").write_text("# Mine\n")
    trainer.save_model(results={"final_recall_at_1": float("nan"), "seed": 3})
    assert json.loads((tmp_path / "all_results.json").read_text()) == {"final_recall_at_1": None, "seed": 3}
    assert (tmp_path / "README.md").read_text() == "# Mine\n"
    assert (tmp_path / json.loads((tmp_path / "config.json").read_text())["backbone"]).samefile(backbone_folder)
    assert not list(tmp_path.glob(".retriever*")) and not list(tmp_path.glob(".saving*"))
    VPTSPModel.from_pretrained(tmp_path)


def test_save_pretrained_replaces_no_file_by_half_of_one(build, tmp_path, monkeypatch):
    model = build(tmp_path / "run").model
    model.retriever.save_pretrained(tmp_path / "saved")
    before = contents(tmp_path / "saved")
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", lambda *args, **kwargs: 1 / 0)
    with torch.no_grad():
        model.retriever.prompts.tokens.add_(1)
    model.config.loss_alpha = 5.0
    with pytest.raises(ZeroDivisionError):
        model.retriever.save_pretrained(tmp_path / "saved")
    assert contents(tmp_path / "saved") == before
    monkeypatch.undo()
    model.retriever.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert torch.equal(saved["prompts.tokens"], model.retriever.prompts.tokens)
    assert set(contents(tmp_path / "saved")) == set(before)


# ---- What is written is of the run that was there last


def test_a_run_does_not_save_over_another_that_came_after_it(build, tmp_path):
    """Each way to write into output_dir; in another folder, or after training there again, all is well."""
    first, second = build(tmp_path / "run"), build(tmp_path / "run", seed=5)
    untrained = build(tmp_path / "run", seed=6)
    first.train()
    first.save_model()
    second.train()
    before = contents(tmp_path / "run")
    message = "another run has trained in output_dir .* since: give another folder"
    for trainer in (first, untrained):
        for save in (
            trainer.save_model,
            trainer.save_retriever,
            lambda trainer=trainer: trainer.save_model(str(tmp_path / "other" / ".." / "run")),
            trainer.create_model_card,
            lambda trainer=trainer: trainer.save_metrics("eval", {"eval_map_at_r": 0.5}),
            trainer.save_state,
        ):
            with pytest.raises(OutputFolderError, match=message):
                save()
    assert contents(tmp_path / "run") == before
    first.save_model(str(tmp_path / "elsewhere"))
    second.save_model()
    later = build(tmp_path / "run", seed=7)  # of another process, say, that evaluates what is there
    later.save_metrics("eval", {"eval_map_at_r": 0.5})
    first.train()
    first.save_model()
    with pytest.raises(OutputFolderError, match=message):
        second.save_model()


def test_a_run_that_left_nothing_is_in_nobodys_way(build, tmp_path, monkeypatch):
    first, second = build(tmp_path), build(tmp_path, seed=5)
    first.train()
    monkeypatch.setattr(second, "compute_loss", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        second.train()
    first.save_model()


def test_nothing_is_saved_while_another_process_trains_there(build, tmp_path):
    trainer = build(tmp_path / "run")
    trainer.train()
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "held\n"
            with pytest.raises(InUseError, match="is in use by another process"):
                trainer.save_model()
        finally:
            process.kill()
    trainer.save_model()


def test_the_best_checkpoint_is_one_of_the_same_run(build, tmp_path):
    """Going on elsewhere, where another run has left a checkpoint of that name."""
    steps = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 1, "eval_steps": 1, "max_steps": 2}
    first, other = build(tmp_path / "first", **steps), build(tmp_path / "other", **steps, seed=5)
    first.train()
    other.train()
    best = Path(first.state.best_model_checkpoint).name
    goes_on = build(tmp_path / "other", **steps | {"max_steps": 2})
    found = goes_on._best_checkpoint(tmp_path / "first" / "checkpoint-2")
    assert found == str(tmp_path / "first" / best)
    record = json.loads((tmp_path / "first" / best / "run.json").read_text())
    again = build(tmp_path / "first", **steps)
    again.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-1"))
    resumed = json.loads((tmp_path / "first" / "checkpoint-2" / "run.json").read_text())
    assert resumed["run"] == record["run"] != json.loads((tmp_path / "other" / best / "run.json").read_text())["run"]


# ---- Numbers that JSON has not


def strict(path):
    def refuse(constant):
        raise AssertionError(f"{constant} in {path}")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_json_files_of_the_trainer_hold_no_nan(build, tmp_path, caplog):
    trainer = build(tmp_path)
    metrics = {"eval_nmi": float("nan"), "eval_map_at_r": 0.5, "eval_ratio": float("inf")}
    with caplog.at_level("WARNING"):
        trainer.save_metrics("eval", metrics)
        trainer.save_metrics("test", {"test_map_at_r": 0.25, "eval_map_at_r": 0.75})
        trainer.state.log_history.append({"step": 1, "eval_nmi": float("nan")})
        trainer.save_state()
        trainer.save_metrics("alone", {"x": 1.0}, combined=False)
    assert strict(tmp_path / "eval_results.json") == {"eval_map_at_r": 0.5, "eval_nmi": None, "eval_ratio": None}
    assert strict(tmp_path / "all_results.json") == {
        "eval_map_at_r": 0.75,
        "eval_nmi": None,
        "eval_ratio": None,
        "test_map_at_r": 0.25,
    }
    assert strict(tmp_path / "trainer_state.json")["log_history"] == [{"step": 1, "eval_nmi": None}]
    assert strict(tmp_path / "alone_results.json") == {"x": 1.0}
    assert "eval_results.json: eval_nmi, eval_ratio are no finite numbers and are written as null" in caplog.text
    assert "trainer_state.json: log_history.0.eval_nmi is no finite number and is written as null" in caplog.text
    trainer.create_model_card(results={"final_map_at_r": float("nan"), "final_recall_at_1": 0.5})
    assert "nan" not in (tmp_path / "README.md").read_text().lower().replace("finan", "")


def test_settings_without_a_number_are_told_from_none(build, tmp_path):
    finite, infinite = (build(tmp_path, lr_scheduler_type="polynomial") for _ in range(2))
    infinite.args.lr_scheduler_kwargs = {"power": float("inf")}
    finite.args.lr_scheduler_kwargs = {"power": None}
    found = run_differences(finite._run_record(), infinite._run_record())
    assert found == ["settings.lr_scheduler_kwargs.power: checkpoint None, now 'inf'"]
