"""benchmarks/compare_methods.py on a tiny backbone, and the presets of table 2."""

import contextlib
import io
import json
import statistics
from pathlib import Path

import compare_methods
import numpy as np
import paired_rows
import pytest
import resumable_runs
import torch
from conftest import tiny_vit_config
from PIL import Image

from vptsp import VPTSPConfig, VPTSPForMetricLearning, train
from vptsp.losses.loss_registry import check_loss
from vptsp.training.run_arguments import check_run, parse_arguments
from vptsp.training.run_errors import ConfigError


ROOT = Path(__file__).resolve().parents[2]
PRESETS = sorted((ROOT / "configs" / "table2").glob("*.yaml"))


@pytest.fixture
def images(tmp_path):
    """Six classes of four noisy colours."""
    rng = np.random.default_rng(0)
    for label in range(6):
        folder = tmp_path / "images" / f"class{label}"
        folder.mkdir(parents=True)
        colour = rng.integers(40, 216, 3)
        for i in range(4):
            pixels = np.clip(colour + rng.normal(0, 25, (18, 18, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / "images"


@pytest.fixture
def overrides(images, backbone_folder, tmp_path):
    """What makes a run of seconds of the presets of CUB."""
    values = {
        "dataset_name": "folder",
        "data_dir": images,
        "data_cache_dir": tmp_path / "cache",
        "backbone": backbone_folder,
        "image_size": 16,
        "embedding_dim": 8,
        "num_prompts": 2,
        "per_device_train_batch_size": 4,
        "images_per_class": 2,
        "max_steps": 4,
        "disable_tqdm": "true",
    }
    return [text for name, value in values.items() for text in (f"--{name}", str(value))] + ["--use_cpu"]


def launch(arguments, log, started):
    """`train.py` in this process."""
    started.append(arguments)
    with log.open("w") as file, contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(file):
        try:
            train.main(arguments)
        except SystemExit as exit_info:
            return exit_info.code
    return 0


def test_rows_and_seeds_become_a_table(overrides, tmp_path):
    broken = tmp_path / "broken.yaml"
    broken.write_text("num_prompst: 3")
    recall_at_k = ROOT / "configs" / "table2" / "recall_at_k.yaml"
    configs = compare_methods.find_configs([str(recall_at_k), str(broken)])
    output, started = tmp_path / "compare", []
    rows = compare_methods.compare(configs, [0, 1], output, overrides, lambda *args: launch(*args, started))
    assert len(started) == 4
    results = [json.loads((output / "recall_at_k" / f"seed-{s}" / "all_results.json").read_text()) for s in (0, 1)]
    assert [run["seed"] for run in results] == [0, 1]
    scores = [run["final_map_at_r"] for run in results]
    assert rows["recall_at_k"]["mean"]["map_at_r"] == pytest.approx(sum(scores) / 2)
    assert rows["recall_at_k"]["deviation"]["map_at_r"] == pytest.approx(statistics.stdev(scores))
    assert rows["recall_at_k"]["mean"]["training_only_parameters"] == 0
    assert rows["broken"]["seeds"] == 0
    table = (output / "comparison.md").read_text()
    frozen = " | ".join(f"{100 * results[0][f'frozen_{name}']:.1f}" for name in compare_methods.SCORES)
    assert f"| frozen backbone |  | {frozen} | 0 |" in table
    mean, deviation = 100 * sum(scores) / 2, 100 * statistics.stdev(scores)
    line = next(line for line in table.splitlines() if line.startswith("| recall_at_k | 2 |"))
    assert f"| {mean:.1f} ± {deviation:.1f} |" in line
    assert table.count("broken.yaml: there is no field 'num_prompst'; did you mean 'num_prompts'?") == 2
    assert json.loads((output / "comparison.json").read_text()) == rows
    assert Image.open(output / "comparison.png").size == (2100, 1050)

    # once more: what is finished stays, what failed is tried again
    again = compare_methods.compare(configs, [0, 1], output, overrides, lambda *args: launch(*args, started))
    assert again == rows
    assert [Path(arguments[0]).stem for arguments in started[4:]] == ["broken", "broken"]
    with pytest.raises(ValueError, match=r"seed-0 holds a run with other options; .* --max_steps 4"):
        compare_methods.compare(configs, [0], output, [*overrides, "--max_steps", "5"], launch)


def test_rows_are_compared_on_the_same_queries(overrides, tmp_path):
    """Against what the runs themselves scored, and differences against subtraction."""
    names = ("vpt", "bitfit")
    configs = compare_methods.find_configs([str(ROOT / "configs" / "table1" / f"{name}.yaml") for name in names])
    output = tmp_path / "compare"
    overrides = [*overrides, "--learning_rate", "0.05", "--final_metrics", "retrieval"]
    rows = compare_methods.compare(
        configs, [0, 1], output, overrides, lambda *args: launch(*args, []), None, "vpt", "queries"
    )
    table = json.loads((output / "paired.json").read_text())["rows"]
    results = [json.loads(path.read_text()) for path in sorted(output.glob("vpt/*/all_results.json"))]
    for measure in ("recall_at_1", "map_at_r"):
        bitfit, vpt = (rows[name]["mean"][measure] for name in ("bitfit", "vpt"))
        assert table["bitfit"][measure]["interval"]["mean"] == pytest.approx(bitfit)
        assert table["bitfit"][measure]["difference"]["difference"] == pytest.approx(bitfit - vpt)
        assert table["bitfit"][measure]["seeds"] == [0, 1]
        assert table["vpt"][measure]["difference"] is None
        frozen = results[0][f"frozen_{measure}"]
        assert table["frozen backbone"][measure]["interval"]["mean"] == pytest.approx(frozen)
        assert table["frozen backbone"][measure]["difference"]["difference"] == pytest.approx(frozen - vpt)
    text = (output / "comparison.md").read_text()
    assert "| row | R@1 | R@1 interval | R@1 difference | R@1 p | MAP@R |" in text
    assert "of 2 comparisons, one below 0.0250 counts" in text
    (output / "bitfit" / "seed-1" / "embeddings" / "done").unlink()  # as if another process had just done the run
    assert compare_methods.write_tables(output, overrides, "lora") == rows
    assert "No differences: the row lora has no finished run." in (output / "comparison.md").read_text()
    assert "Not among them yet: bitfit/seed-1." in (output / "comparison.md").read_text()


def test_differences_are_of_common_seeds_and_common_images():
    rng = np.random.default_rng(0)
    labels = torch.arange(10).repeat_interleave(3)

    def run(ids="abc"):
        scores = {name: torch.tensor(rng.random(30)) for name in paired_rows.MEASURES}
        return {"scores": scores, "labels": labels, "ids": [list(ids)]}

    runs = {"ours": {0: run(), 1: run()}, "theirs": {1: run(), 2: run()}, "alone": {5: run()}}
    table = paired_rows.compare_rows(runs, "ours")
    entry = table["theirs"]["map_at_r"]
    own, other = (runs[name][1]["scores"]["map_at_r"].numpy() for name in ("theirs", "ours"))
    assert entry["seeds"] == [1]
    assert entry["difference"]["difference"] == pytest.approx((own - other).mean())
    assert entry["difference"]["num_clusters"] == 10
    both = (own + runs["theirs"][2]["scores"]["map_at_r"].numpy()) / 2
    assert entry["interval"]["mean"] == pytest.approx(both.mean())
    assert table["alone"]["map_at_r"]["difference"] is None
    with pytest.raises(ValueError, match="odd, seed 0, was scored on other images"):
        paired_rows.compare_rows({**runs, "odd": {0: run("abd")}}, "ours")


def test_two_commands_share_one_table(overrides, tmp_path):
    """Each has rows of its own; what the second writes has the first's too."""
    paths = [str(ROOT / "configs" / "table1" / f"{name}.yaml") for name in ("vpt", "bitfit")]
    started = []
    for path in paths:
        configs = compare_methods.find_configs([path])
        rows = compare_methods.compare(configs, [0], tmp_path, overrides, lambda *args: launch(*args, started))
    assert list(rows) == ["bitfit", "vpt"]
    assert "| vpt | 1 |" in (tmp_path / "comparison.md").read_text()
    with pytest.raises(ValueError, match=r"bitfit/seed-0 holds a run with other options"):
        compare_methods.compare(configs, [1], tmp_path, [*overrides, "--num_prompts", "3"], launch)


def test_what_another_process_does_comes_last(tmp_path):
    seen = []

    def do(task):
        seen.append(task)
        if task == "busy" and seen.count("busy") < 3:
            raise resumable_runs.InUseError("it is in use")

    resumable_runs.share(["busy", "a", "b"], do, pause=0)
    assert seen == ["busy", "a", "b", "busy", "busy"]
    with resumable_runs.locked(tmp_path / ".run.lock", "a run"), pytest.raises(resumable_runs.InUseError):
        resumable_runs.finish(tmp_path, [], None)


def test_interrupted_run_goes_on_from_its_checkpoint(overrides, tmp_path):
    configs, started = compare_methods.find_configs([str(PRESETS[0])]), []
    overrides = [*overrides, "--save_strategy", "steps", "--save_steps", "2"]
    rows = compare_methods.compare(configs, [0], tmp_path / "whole", overrides, lambda *a: launch(*a, started))
    folder = tmp_path / "whole" / PRESETS[0].stem / "seed-0"
    (folder / "all_results.json").unlink()  # as if it had been stopped at its end
    (folder / "checkpoint-4" / "model.safetensors").rename(tmp_path / "kept")
    for path in sorted((folder / "checkpoint-4").rglob("*")):
        path.unlink()
    (folder / "checkpoint-4").rmdir()
    resumed = compare_methods.compare(configs, [0], tmp_path / "whole", overrides, lambda *a: launch(*a, started))
    assert started[1][-2:] == ["--resume_from_checkpoint", str(folder / "checkpoint-2")]
    name = PRESETS[0].stem
    assert resumed[name]["mean"]["map_at_r"] == rows[name]["mean"]["map_at_r"]
    assert (tmp_path / "kept").read_bytes() == (folder / "checkpoint-4" / "model.safetensors").read_bytes()


@pytest.mark.distributed
def test_a_run_is_a_process_and_its_failure_a_line(tmp_path):
    configs = compare_methods.find_configs([str(PRESETS[0])])
    rows = compare_methods.compare(configs, [3], tmp_path, ["--data_dir", "nowhere"])
    assert rows[PRESETS[0].stem]["failures"][0].startswith("train.py: error: ")
    assert "nowhere" in (tmp_path / "comparison.md").read_text()


def test_configs_that_can_not_be_rows(tmp_path):
    with pytest.raises(ValueError, match=r"there is no file none\.yaml"):
        compare_methods.find_configs(["none.yaml"])
    twin = tmp_path / PRESETS[0].name
    twin.write_text("")
    with pytest.raises(ValueError, match="would be one row"):
        compare_methods.find_configs([str(PRESETS[0]), str(twin)])
    assert set(compare_methods.find_configs([])) >= {path.stem for path in PRESETS}


def test_fields_for_single_rows(tmp_path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("vpt: {num_prompts: 4, learning_rate: 0.1, recall_at: [1, 2]}\nlora: {bitfit: true}")
    second.write_text("vpt: {learning_rate: 0.001, loss_kwargs: {alpha: 16}}")
    options = compare_methods.read_row_overrides([first, second], compare_methods.find_configs([]))
    assert options["lora"] == ["--bitfit", "true"]
    started = []
    configs = compare_methods.find_configs([str(ROOT / "configs" / "table1" / "vpt.yaml")])
    common = ["--num_prompts", "7", "--embedding_dim", "8", "--loss", "proxy_nca"]
    compare_methods.compare(
        configs, [0], tmp_path, common, lambda arguments, log: started.append(arguments) or log.write_text("") or 1,
        options,
    )  # fmt: skip
    model_fields, training_args, *_ = parse_arguments(started[0])
    assert (model_fields["num_prompts"], model_fields["embedding_dim"]) == (4, 8)
    assert (training_args.learning_rate, training_args.recall_at) == (0.001, [1, 2])
    assert model_fields["loss_kwargs"] == {"alpha": 16}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("vpt: 0.1", "must map rows to fields"),
        ("- vpt", "must map rows to fields"),
        ("vpt: [", r"rows\.yaml can't be read: while parsing"),
        ("vpd: {num_prompts: 4}", "names vpd, which is none of the rows adapter, "),
        (None, r"rows\.yaml can't be read: .*No such file"),
    ],
)
def test_fields_for_single_rows_that_can_not_be_used(tmp_path, text, message):
    path = tmp_path / "rows.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        compare_methods.read_row_overrides([path], compare_methods.find_configs([]))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_of_table_2_parse_and_take_a_step(path):
    model_fields, training_args, data_args, _ = parse_arguments([str(path)])
    assert model_fields["loss"] == path.stem
    assert data_args.dataset_name == "cub"
    assert training_args.per_device_train_batch_size // training_args.images_per_class <= 100  # classes of CUB
    fields = {**model_fields, "backbone": None, "backbone_config": tiny_vit_config(), "num_classes": 3}
    check_loss(VPTSPConfig(**fields))
    model = VPTSPForMetricLearning(VPTSPConfig(**fields))
    model(torch.randn(6, 3, 16, 16), torch.arange(3).repeat_interleave(2), images_per_class=2).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_keywords_of_a_loss_from_the_command_line():
    options = ["--loss", "hyperbolic", "--loss_kwargs", '{"temperature": 0.5}', "--proxy_update", "none"]
    model_fields, *_ = parse_arguments(options)
    assert model_fields["loss_kwargs"] == {"temperature": 0.5}
    with pytest.raises(ConfigError, match="loss_kwargs must be a JSON mapping"):
        parse_arguments(["--loss_kwargs", "temperature: 0.5"])


def test_losses_that_can_not_work_are_refused_before_anything_is_loaded(overrides):
    for options, message in {
        ("--loss", "tripletloss"): "loss must be one of",
        ("--loss", "hyperbolic", "--loss_kwargs", '{"tau": 0.5}'): "hyperbolic has no keyword 'tau'",
        ("--proxy_update", "gru_relu"): "'hyperbolic' has no proxies: proxy_update must be none",
    }.items():
        arguments = parse_arguments([str(PRESETS[0]), *overrides, *options])
        with pytest.raises(ConfigError, match=message):
            check_run(*arguments)
