"""train.py: what it parses, refuses, prints and writes."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from remote_code import remote_model
from transformers import AutoImageProcessor

from vptsp import VPTSPConfig, VPTSPModel, VPTSPTrainer, train
from vptsp.files.atomic import write_json
from vptsp.files.locks import locked
from vptsp.training import run, run_arguments
from vptsp.training.run import save_results
from vptsp.training.run_arguments import RunArguments, check_run, parse_arguments


ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Six classes of five noisy colours."""
    root = tmp_path_factory.mktemp("data") / "images"
    rng = np.random.default_rng(0)
    for label in range(6):
        (root / f"class{label}").mkdir(parents=True)
        colour = rng.integers(40, 216, 3)
        for i in range(5):
            pixels = np.clip(colour + rng.normal(0, 15, (20, 24, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / f"class{label}" / f"{i}.jpg")
    return root


@pytest.fixture
def arguments(images, backbone_folder, tmp_path):
    """A configuration file and the options that make it a run of seconds."""
    values = {
        "backbone": str(backbone_folder),
        "data_dir": str(images),
        "data_cache_dir": str(tmp_path / "cache"),
        "image_size": 16,
        "embedding_dim": 12,
        "num_prompts": 3,
        "num_class_prompts": 2,
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "learning_rate": "1e-3",
        "picture_queries": 0,
        "output_dir": str(tmp_path / "run"),
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return [str(path), "--use_cpu", "--disable_tqdm", "true"]


def refused(argv, capsys):
    """The one line that a refused run prints."""
    with pytest.raises(SystemExit) as exit_info:
        train.main(argv)
    assert exit_info.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("train.py: error: ")
    return error[-1]


def test_run_from_configuration_to_reloaded_retriever(arguments, tmp_path, images, capsys, backbone_folder):
    train.main([*arguments, "--picture_queries", "2", "--picture_proxies", "true", "--logging_steps", "2"])
    printed = capsys.readouterr().out
    output = tmp_path / "run"
    results = json.loads((output / "all_results.json").read_text())

    retriever = VPTSPModel.from_pretrained(output)
    assert results["tuned_parameters"] == sum(p.numel() for p in retriever.parameters() if p.requires_grad)
    assert results["retriever_parameters"] == sum(p.numel() for p in retriever.parameters())
    described = ": vit, 4 layers of width 24, patches of 8, images of 16 pixels, pooling cls\n"
    assert f"backbone          {backbone_folder}{described}" in printed[: printed.index("frozen backbone")]
    assert f"{results['tuned_parameters']:,} of {results['retriever_parameters']:,} parameters" in printed
    header = (output / "model.safetensors").stat().st_size - round(1e6 * results["shipped_megabytes"])
    assert 0 < header < 8000
    assert results["seed"] == 42
    assert results["versions"]["torch"] == torch.__version__
    assert results["command"].startswith("train.py ")
    assert results["steps"] == 2 * 3
    assert {"train_images": 15, "test_images": 15, "train_classes": 3}.items() <= results["dataset"].items()
    assert printed.count("frozen backbone") == 2
    names = ("attention", "before_after", "confusion", "curves", "failures", "map", "neighbours", "proxies")
    drawn = {path.stem for path in (output / "pictures").iterdir()}
    assert set(names) >= drawn >= set(names) - {"failures", "confusion"}  # of these there may be none
    assert results["final_map_at_r_low"] <= results["final_map_at_r"] <= results["final_map_at_r_high"]
    assert {"final_nmi", "final_map_at_1000", "final_spectral_decay"} <= set(results)
    assert "frozen_nmi" not in results
    lines = printed.splitlines()
    last = max(i for i, line in enumerate(lines) if line.startswith("frozen backbone"))
    frozen, tuned, low, high = lines[last : last + 4]
    shown = lambda name: f"{100 * results[name]:.1f}"  # noqa: E731
    assert frozen.split()[2] == shown("frozen_recall_at_1") and frozen.split()[-1] == shown("frozen_map_at_r")
    assert tuned.split()[2] == shown("final_recall_at_1") and tuned.split()[-1] == shown("final_map_at_r")
    assert low.startswith("  95 % from") and low.split()[-1] == shown("final_map_at_r_low")
    assert high.split()[-1] == shown("final_map_at_r_high")

    reloaded = remote_model(output)
    processor = AutoImageProcessor.from_pretrained(output)
    picture = Image.open(images / "class5" / "0.jpg")
    pixel_values = processor(images=picture, return_tensors="pt").pixel_values
    assert pixel_values.shape == (1, 3, 16, 16)
    assert torch.equal(reloaded(pixel_values).embeddings, retriever(pixel_values).embeddings)


def test_options_win_over_the_file(arguments):
    model_fields, training_args, data_args, run_args = parse_arguments(
        [*arguments, "--num_prompts", "7", "--proxy_learning_rate", "0.3", "--test_share", "0.4", "--no_bitfit"]
    )
    assert (model_fields["num_prompts"], model_fields["bitfit"]) == (7, False)
    assert model_fields["num_class_prompts"] == 2
    assert (training_args.proxy_learning_rate, training_args.learning_rate) == (0.3, 1e-3)
    assert (data_args.test_share, data_args.image_size) == (0.4, 16)
    assert run_args.overwrite_output is False


def test_every_model_field_can_be_given(arguments):
    model_fields, *_ = parse_arguments(arguments)
    derived = {"num_classes", "backbone_fingerprint", "format_version"}
    own = set(VPTSPConfig.__annotations__) - {"model_type", "sub_configs"} - derived
    assert set(model_fields) == own


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configurations_parse(path, tmp_path):
    model_fields, training_args, data_args, _ = parse_arguments([str(path)])
    given = yaml.safe_load(path.read_text())
    parsed = {**model_fields, **vars(training_args), **vars(data_args)}
    for name in ("num_prompts", "embedding_dim", "learning_rate", "proxy_learning_rate", "image_size"):
        assert parsed[name] == given[name]
    VPTSPConfig(**{**model_fields, "num_classes": 10})


def test_random_backbone_from_a_configuration(arguments, tmp_path):
    config = {"model_type": "vit", "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config |= {"intermediate_size": 32, "image_size": 16, "patch_size": 8}
    values = yaml.safe_load(Path(arguments[0]).read_text())
    del values["backbone"]
    Path(arguments[0]).write_text(yaml.safe_dump({**values, "num_train_epochs": 1}))
    options = ["--backbone_config", json.dumps(config), "--picture_queries", "0", "--eval_strategy", "no"]
    train.main([*arguments, *options])
    assert VPTSPModel.from_pretrained(tmp_path / "run").config.backbone_config.num_hidden_layers == 2


def test_another_image_size_than_the_backbones(arguments, tmp_path):
    train.main([*arguments, "--image_size", "24", "--num_train_epochs", "1", "--picture_queries", "0"])
    reloaded = remote_model(tmp_path / "run")
    assert reloaded.config.backbone_config.image_size == 24
    processor = AutoImageProcessor.from_pretrained(tmp_path / "run")
    pixel_values = processor(images=Image.new("RGB", (30, 40)), return_tensors="pt").pixel_values
    assert reloaded(pixel_values).embeddings.shape == (1, 12)


def test_earlier_results_are_not_overwritten(arguments, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "all_results.json").write_text("{}")
    assert "holds an earlier run" in refused(arguments, capsys)
    assert (tmp_path / "run" / "all_results.json").read_text() == "{}"
    check_run(*parse_arguments([*arguments, "--overwrite_output"]))
    check_run(*parse_arguments([*arguments, "--resume_from_checkpoint", "true"]))


@pytest.mark.parametrize(
    "options, message",
    [
        (["--data_dir", "nowhere"], "nowhere"),
        (["--dataset_name", "cob"], "unknown dataset_name 'cob'; did you mean 'cub'"),
        (["--backbone", "./no-such-folder"], "backbone: there is no folder ./no-such-folder"),
        (["--backbone", "a b"], "backbone is neither a folder nor a Hub name: 'a b'"),
        (["--backbone_config", "{", "--backbone", "x/y"], "backbone_config must be JSON with a model_type"),
        (["--per_device_train_batch_size", "5"], "must be divisible by images_per_class, got 5 and 2"),
        (["--test_share", "1.5"], "test_share must be between 0 and 1"),
        (["--image_size", "20"], "image_size must be a multiple of the backbone's patch size 8, got 20"),
        (["--final_metrics", "most"], "final_metrics must be one of retrieval, all, got 'most'"),
        (
            ["--test_classes", "class5"],
            "all metrics need at least two test classes whose queries can be answered, got 1",
        ),
        (["--num_prompts", "-1"], "num_prompts must be an integer >= 0, got -1"),
        (
            ["--prompt_depth", "9"],
            "prompt_depth must be None or an integer >= 0 and <= the backbone's 4 layers, got 9",
        ),
        (["--backbone_config", '{"model_type": "vit"}'], "backbone_config is for a random backbone, but backbone is"),
        (["--backbone_revision", "main"], "backbone_revision is of a backbone on the Hub, got 'main' with the folder"),
        (["--num_train_epochs", "-1"], "num_train_epochs must be > 0, got -1.0"),
        (["--num_train_epochs", "nan"], "num_train_epochs must be > 0, got nan"),
        (["--gradient_accumulation_steps", "-1"], "gradient_accumulation_steps must be an integer >= 1, got -1"),
        (["--gradient_accumulation_steps", "0"], "gradient_accumulation_steps must be an integer >= 1, got 0"),
        (["--learning_rate", "nan"], "learning_rate must be >= 0, got nan"),
        (["--loss_delta", "nan"], "loss_delta must be a number, got nan"),
        (["--label_smoothing_factor", "0.1"], "label_smoothing_factor must be 0.0, got 0.1: "),
        (["--picture_queries", "-1"], "picture_queries must be an integer >= 0, got -1"),
        (["--loss_kwargs", '{"a": 1, "a": 2}'], "loss_kwargs must be a JSON mapping: 'a' is there twice"),
    ],
)
def test_what_can_not_work_is_refused_in_one_line(arguments, capsys, options, message):
    assert message in refused([*arguments, *options], capsys)


def test_bad_files_are_named(arguments, tmp_path, capsys, images):
    path = Path(arguments[0])
    assert "there is no field 'num_promts'; did you mean 'num_prompts'?" in refused(
        [str(_write(tmp_path / "a.yaml", "num_promts: 3"))], capsys
    )
    assert "is not YAML" in refused([str(_write(tmp_path / "b.yaml", "a: [1"))], capsys)
    assert "b.yaml is not YAML: quote it: '010'" in refused([str(_write(tmp_path / "b.yaml", "seed: 010"))], capsys)
    twice = "num_prompts: 3\nseed: 1\nnum_prompts: 4"
    assert "'num_prompts' is there twice" in refused([str(_write(tmp_path / "b.yaml", twice))], capsys)
    assert "must hold 'field: value' lines, got str" in refused([str(_write(tmp_path / "c.yaml", "x"))], capsys)
    none = tmp_path / "none.yaml"
    assert refused([str(none)], capsys) == f"train.py: error: there is no configuration {none}"
    assert "neither a file nor a preset; the presets are cars_vitb16, " in refused(["unheard-of"], capsys)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert f"backbone: the folder {empty} holds no config.json" in refused(
        [str(path), "--backbone", str(empty)], capsys
    )
    (tmp_path / "file").write_text("")
    assert "output_dir must be a folder" in refused([str(path), "--output_dir", str(tmp_path / "file")], capsys)


def test_folders_that_can_not_be_used_are_named(arguments, tmp_path, images, capsys):
    for name, message in {"none": "is empty", "one": "one class only"}.items():
        root = tmp_path / name
        root.mkdir()
        if name == "one":
            shutil.copytree(images / "class0", root / "class0")
        assert message in refused([*arguments, "--data_dir", str(root)], capsys)


def test_corrupt_image_is_named(arguments, tmp_path, images, capsys):
    root = tmp_path / "broken"
    shutil.copytree(images, root)
    (root / "class4" / "2.jpg").write_bytes(b"\xff\xd8\xff no picture")
    message = refused([*arguments, "--data_dir", str(root)], capsys)
    assert str(Path("class4") / "2.jpg") in message


def test_a_corrupt_training_image_is_found_before_anything_is_loaded(arguments, tmp_path, images, capsys, monkeypatch):
    root = tmp_path / "broken"
    shutil.copytree(images, root)
    for place in ("class0/2.jpg", "class1/0.jpg"):
        (root / place).write_bytes(b"\xff\xd8\xff no picture")
    monkeypatch.setattr(run, "build_model", lambda *args: pytest.fail("a model was built"))
    message = refused([*arguments, "--data_dir", str(root)], capsys)
    assert f"{root / 'class0' / '2.jpg'}: can't read this image" in message and "so can't 1 others" in message
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.fixture
def _heeds_ctrl_c():
    """As in a terminal; shells have what runs behind them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_heeds_ctrl_c")
@pytest.mark.parametrize("moment", ["parse_arguments", "evaluate_backbone", "print_comparison"])
@pytest.mark.parametrize("signum, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_outside_of_the_steps_says_what_was_saved(
    arguments, tmp_path, capsys, monkeypatch, moment, signum, status
):
    place = {"evaluate_backbone": VPTSPTrainer, "print_comparison": run, "parse_arguments": run_arguments}[moment]
    monkeypatch.setattr(place, moment, lambda *args, **kwargs: signal.raise_signal(signum))
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(SystemExit) as ended:
        train.main([*arguments, "--num_train_epochs", "1"])
    assert ended.value.code == status
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    folder = tmp_path / "run"
    said = {
        "parse_arguments": "nothing was saved",
        "evaluate_backbone": f"nothing was saved, {folder} holds no checkpoint",
        "print_comparison": f"what was saved before stays, up to checkpoint-3 in {folder}",
    }[moment]
    name = "SIGTERM" if signum == signal.SIGTERM else "interrupted"
    assert capsys.readouterr().err.splitlines()[-1] == f"train.py: {name}: {said}"
    assert bool(list(folder.glob("checkpoint-*"))) == (moment == "print_comparison")


def test_corrupt_images_can_be_skipped_and_are_listed(arguments, tmp_path, images):
    root = tmp_path / "broken"
    shutil.copytree(images, root)
    broken = [root / "class0" / "1.jpg", root / "class4" / "2.jpg"]
    for path in broken:
        path.write_bytes(b"\xff\xd8\xff no picture")
    train.main([*arguments, "--data_dir", str(root), "--skip_corrupt", "--num_train_epochs", "8"])
    results = json.loads((tmp_path / "run" / "all_results.json").read_text())
    assert results["dataset"]["skipped_images"] == [str(path) for path in broken]
    assert (results["final_num_unreadable"], results["final_num_queries"]) == (1, 14)


def test_streaming_scores_the_backbone_as_the_tables_do(arguments, tmp_path):
    results = {}
    for streaming in (False, True):
        output = tmp_path / f"run-{streaming}"
        train.main([*arguments, "--output_dir", str(output), "--streaming", str(streaming), "--picture_queries", "2"])
        results[streaming] = json.loads((output / "all_results.json").read_text())
        assert (output / "pictures" / "neighbours.png").is_file()
    assert results[True]["frozen_map_at_r"] == results[False]["frozen_map_at_r"]
    assert results[True]["steps"] == results[False]["steps"] == 6
    assert results[True]["dataset"] == results[False]["dataset"]


def test_a_class_with_one_image_trains_and_is_counted_in_evaluation(arguments, tmp_path, images):
    root = tmp_path / "lone"
    shutil.copytree(images, root)
    for name in ("class0", "class5"):
        for i in range(1, 5):
            (root / name / f"{i}.jpg").unlink()
    train.main([*arguments, "--data_dir", str(root), "--picture_queries", "0"])
    results = json.loads((tmp_path / "run" / "all_results.json").read_text())
    assert results["final_num_unanswerable"] == 1
    assert results["final_num_queries"] == 10


@pytest.mark.distributed
def test_accelerate_launches_it(arguments, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu"]
    command += [str(ROOT / "train.py"), *arguments, "--max_steps", "2", "--picture_queries", "0"]
    subprocess.run(command, check=True, cwd=tmp_path, capture_output=True)
    assert json.loads((tmp_path / "run" / "all_results.json").read_text())["steps"] == 2


def _write(path, text):
    path.write_text(text)
    return path


def test_picture_needs_no_second_pass_and_takes_query_and_gallery(arguments, tmp_path, images, monkeypatch):
    root = tmp_path / "split"
    for part, names in {"train": "012", "query": "345", "gallery": "345"}.items():
        for name in names:
            shutil.copytree(images / f"class{name}", root / part / f"class{name}")
    passes = []
    embed = VPTSPTrainer._embed_all
    monkeypatch.setattr(VPTSPTrainer, "_embed_all", lambda self, *args: passes.append(args) or embed(self, *args))
    train.main([*arguments, "--data_dir", str(root), "--eval_strategy", "no", "--picture_queries", "2"])
    assert len(passes) == 4  # queries and gallery, before and after
    assert (tmp_path / "run" / "pictures" / "neighbours.png").is_file()


def test_pushing_a_retriever_on_a_local_backbone_is_refused(arguments, capsys, backbone_folder):
    error = refused([*arguments, "--push_to_hub", "true", "--hub_model_id", "ann/birds"], capsys)
    assert f"push_to_hub: the backbone is the local folder {backbone_folder}, which others don't have" in error


def test_what_is_drawn_of_a_run(monkeypatch, tmp_path):
    """Curves begin with the frozen scores, its embeddings are the `before`, and proxies are drawn on request alone."""
    drawn = []
    monkeypatch.setattr(run, "draw_run", lambda *args, **options: drawn.append((args, options)) or ([], {}))
    monkeypatch.setattr(run, "EvaluatedImages", lambda dataset, evaluated: (dataset, evaluated))
    trainer = SimpleNamespace(
        args=SimpleNamespace(output_dir=tmp_path, seed=3), eval_dataset="validation", last_evaluated="after",
        split_record=None,
        processing_class=None, state=SimpleNamespace(log_history=[{"step": 4}]),
        model=SimpleNamespace(retriever=SimpleNamespace(eval=lambda: "retriever")),
    )  # fmt: skip
    results = {"frozen_recall_at_1": 0.1, "final_recall_at_1": 0.2, "seed": 0}
    for proxies in (False, True):
        run.draw_pictures(
            tmp_path, trainer, "data", results, "before", RunArguments(picture_queries=2, picture_proxies=proxies)
        )
    (arguments, options), (others, _) = drawn
    assert arguments[1] == ("data", "after") and options["frozen"] == ("data", "before")
    assert arguments[4] == [{"step": 0, "epoch": 0.0, "frozen_recall_at_1": 0.1}, {"step": 4}]
    assert (arguments[5], others[5]) == (None, [])
    results["frozen_validation_recall_at_1"] = 0.3  # the classes whose scores the curves are of
    run.draw_pictures(tmp_path, trainer, "data", results, "before", RunArguments())
    assert drawn[-1][0][4][0]["frozen_recall_at_1"] == 0.3


def test_the_pictures_get_the_frozen_evaluation(monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr(run, "draw_pictures", lambda folder, trainer, *others: given.append(others) or set())
    done = {name: lambda *args, **kwargs: True for name in ("save_retriever", "delete_replaced", "create_model_card")}
    trainer = SimpleNamespace(args=SimpleNamespace(output_dir=tmp_path), is_world_process_zero=lambda: True, **done)
    results = {"frozen_recall_at_1": 0.1, "final_recall_at_1": 0.2, "seed": 0}
    evaluated, options = {"query": None}, RunArguments(picture_queries=2)
    save_results(results, trainer, options, evaluated, "tests")
    assert given == [("tests", results, evaluated, options)]
    assert results["picture"] is None


def test_the_backbone_s_folder_is_no_output_dir(arguments, tmp_path, capsys, backbone_folder):
    backbone = shutil.copytree(backbone_folder, tmp_path / "backbone")
    before = {path.name: path.read_bytes() for path in backbone.iterdir()}
    options = ["--backbone", str(backbone), "--output_dir", str(backbone), "--overwrite_output"]
    assert "is the folder of the backbone, which would be overwritten" in refused([*arguments, *options], capsys)
    assert {path.name: path.read_bytes() for path in backbone.iterdir()} == before


def test_a_stream_can_not_go_on_with_the_run_of_a_table(arguments, tmp_path, capsys):
    train.main(arguments)
    resume = [*arguments, "--resume_from_checkpoint", "true"]
    assert "train_data.kind: checkpoint 'table', now 'stream'" in _refusal([*resume, "--streaming", "true"], capsys)
    assert "data.crop_scale_min: checkpoint 0.08, now 0.5" in _refusal([*resume, "--crop_scale_min", "0.5"], capsys)


def _refusal(argv, capsys):
    """All lines of a refusal."""
    with pytest.raises(SystemExit, match="2"):
        train.main(argv)
    return capsys.readouterr().err


def test_a_second_run_in_the_same_folder_is_refused(arguments, tmp_path, capsys):
    with locked(tmp_path / "run" / ".lock", "a run"):
        assert f"output_dir {tmp_path / 'run'} is in use by another process" in refused(arguments, capsys)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_a_run_that_takes_the_place_of_another(arguments, tmp_path):
    output = tmp_path / "run"
    train.main([*arguments, "--picture_queries", "2", "--seed", "1"])
    (output / "notes.txt").write_text("mine")
    first = {path.name: path.stat().st_ino for path in output.glob("checkpoint-*")}
    train.main([*arguments, "--picture_queries", "0", "--seed", "2", "--max_steps", "4", "--overwrite_output"])
    results = json.loads((output / "all_results.json").read_text(), parse_constant=pytest.fail)
    assert (results["seed"], results["steps"]) == (2, 4)
    assert "--seed 2" in (output / "README.md").read_text()
    assert (output / "notes.txt").read_text() == "mine"
    assert not list((output / "pictures").iterdir())  # those of the other run
    left = {path.name: path.stat().st_ino for path in output.glob("checkpoint-*")}
    assert left.keys() == {"checkpoint-3", "checkpoint-4"} and not left.items() & first.items()


def test_results_that_are_no_numbers_are_null(tmp_path):
    trainer = SimpleNamespace(args=SimpleNamespace(output_dir=tmp_path), is_world_process_zero=lambda: True)
    trainer.save_retriever = lambda results: write_json(tmp_path / "all_results.json", results)
    trainer.delete_replaced = lambda: None
    save_results({"final_nmi": float("nan")}, trainer, RunArguments(picture_queries=0), None, None)
    assert (tmp_path / "all_results.json").read_text() == '{\n  "final_nmi": null\n}\n'
