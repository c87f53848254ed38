"""benchmarks/choose_rates.py: the search, what it writes, and that test classes take no part."""

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image


BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
CONFIG = BENCHMARKS.parent / "configs" / "table1" / "linear_probe.yaml"


@pytest.fixture
def choose_rates(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))  # it imports the script beside it
    spec = importlib.util.spec_from_file_location("choose_rates", BENCHMARKS / "choose_rates.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("peak", "tried"),
    [
        (0, {-1, 0, 1}),
        (1, {-1, 0, 1, 2}),
        (-2, {-3, -2, -1, 0, 1}),
        (5, {-1, 0, 1, 2, 3}),  # out of reach: five runs and no more
    ],
)
def test_search_climbs_until_the_best_has_a_worse_one_on_either_side(choose_rates, peak, tried):
    scores = choose_rates.search(lambda step: -abs(step - peak))
    assert scores == {step: -abs(step - peak) for step in tried}


def test_rates_and_scores_are_written(choose_rates, tmp_path):
    peaks = {"low": 1e-3, "high": 1e-2, "lost": None}
    rows = {name: tmp_path / f"{name}.yaml" for name in peaks}
    started = []

    def launch(arguments, log):
        """As if MAP@R fell by 10 points per decade from the row's peak; "lost" fails."""
        folder, rate = Path(arguments[-1]), float(arguments[arguments.index("--learning_rate") + 1])
        started.append((folder.parent.name, rate))
        peak = peaks[folder.parent.name]
        log.write_text("FloatingPointError: the loss is nan")
        if peak is None:
            return 1
        score = 0.5 - 0.1 * abs(math.log10(rate / peak))
        (folder / "all_results.json").write_text(json.dumps({"final_map_at_r": score}))
        return 0

    options = {"high": ["--num_prompts", "3"]}
    table = choose_rates.choose(rows, tmp_path / "out", ["--epochs", "2"], options, 3.2e-3, 0, launch)
    rates = yaml.safe_load((tmp_path / "out" / "rates.yaml").read_text())
    assert rates == {"low": {"learning_rate": 1e-3}, "high": {"learning_rate": 1e-2}}
    assert set(table["low"]) == {"0.0032", "0.001", "0.01", "0.00032"}
    lines = (tmp_path / "out" / "rates.md").read_text().splitlines()
    assert lines[0] == "| method | 0.00032 | 0.001 | 0.0032 | 0.01 | 0.032 |"
    assert lines[2] == "| low | 45.1 | **50.0** | 44.9 | 40.0 |  |"
    assert lines[4] == "| lost |  | failed | failed | failed |  |"
    arguments = json.loads((tmp_path / "out" / "high" / "rate-0.01" / "arguments.json").read_text())
    assert arguments[5:11] == ["--epochs", "2", "--num_prompts", "3", "--learning_rate", "0.01"]

    count = len(started)  # once more: only what failed is tried again
    assert choose_rates.choose(rows, tmp_path / "out", ["--epochs", "2"], options, 3.2e-3, 0, launch) == table
    assert [name for name, _ in started[count:]] == ["lost"] * 3
    with pytest.raises(ValueError, match=r"rate-0\.0032 holds a run with other options"):
        choose_rates.choose(rows, tmp_path / "out", ["--epochs", "3"], options, 3.2e-3, 0, launch)


def test_only_training_classes_are_seen(choose_rates, backbone_folder, tmp_path):
    rng = np.random.default_rng(0)
    for label in range(14):
        folder = tmp_path / "images" / f"class{label:02}"
        folder.mkdir(parents=True)
        for i in range(3):
            Image.fromarray(rng.integers(0, 256, (18, 18, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    output = tmp_path / "rates"
    values = {
        "dataset_name": "folder",
        "data_dir": tmp_path / "images",
        "class_split": "alternate",
        "data_cache_dir": tmp_path / "cache",
        "backbone": backbone_folder,
        "image_size": 16,
        "embedding_dim": 8,
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "save_strategy": "no",
        "final_metrics": "retrieval",
        "disable_tqdm": "true",
    }
    options = [text for name, value in values.items() for text in (f"--{name}", str(value))]
    choose_rates.main(["--output", str(output), "--configs", str(CONFIG), *options, "--use_cpu"])
    # classes 0, 2, ..., 12 train: the third and the sixth of them validate
    assert (output / "test_classes.txt").read_text().split() == ["class04", "class10"]
    assert (output / "train_classes.txt").read_text().split() == [
        "class00",
        "class02",
        "class06",
        "class08",
        "class12",
    ]
    chosen = yaml.safe_load((output / "rates.yaml").read_text())["linear_probe"]["learning_rate"]
    results = {path.parent.name: json.loads(path.read_text()) for path in output.glob("*/*/all_results.json")}
    assert len(results) >= 3
    assert all(run["dataset"]["train_classes"] == 5 for run in results.values())
    assert all(run["final_num_queries"] == 2 * 3 for run in results.values())
    best = max(run["final_map_at_r"] for run in results.values())
    assert results[f"rate-{chosen:.2g}"]["final_map_at_r"] == best


def test_a_fixed_split_is_refused_before_any_run(choose_rates, tmp_path, capsys):
    with pytest.raises(SystemExit):
        choose_rates.main(["--output", str(tmp_path), "--configs", str(CONFIG), "--data_dir", str(tmp_path)])
    assert "the data set 'cub' has no option 'train_classes', 'test_classes'" in capsys.readouterr().err
    assert not list(tmp_path.glob("*/*"))


def test_an_interruption_is_no_failed_run(choose_rates, monkeypatch, tmp_path):
    for code, stops in ((2, False), (1, False), (130, True), (143, True)):
        monkeypatch.setattr("vptsp.train.main", lambda arguments, code=code: (_ for _ in ()).throw(SystemExit(code)))
        if stops:
            with pytest.raises(SystemExit):
                choose_rates.launch_here([], tmp_path / "log.txt")
        else:
            assert choose_rates.launch_here([], tmp_path / "log.txt") == code
