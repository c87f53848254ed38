"""benchmarks/choose_rates.py: the search, what it writes, and that test classes take no part."""

import contextlib
import json
import math
from pathlib import Path

import choose_rates
import numpy as np
import pytest
import resumable_runs
import yaml
from PIL import Image

from vptsp.files.locks import locked


BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
CONFIG = BENCHMARKS.parent / "configs" / "table1" / "linear_probe.yaml"


@pytest.mark.parametrize(
    ("peak", "tried"),
    [
        (0, {-1, 0, 1}),
        (1, {-1, 0, 1, 2}),
        (-2, {-3, -2, -1, 0, 1}),
        (5, {-1, 0, 1, 2, 3}),  # out of reach: five runs and no more
    ],
)
def test_search_climbs_until_the_best_has_a_worse_one_on_either_side(peak, tried):
    scores = choose_rates.search(lambda step: -abs(step - peak))
    assert scores == {step: -abs(step - peak) for step in tried}


def test_rates_and_scores_are_written(tmp_path):
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
    assert set(table["low"]) == {(rate, None) for rate in ("0.0032", "0.001", "0.01", "0.00032")}
    lines = (tmp_path / "out" / "rates.md").read_text().splitlines()
    assert lines[0] == "| method | 0.00032 | 0.001 | 0.0032 | 0.01 | 0.032 |"
    assert lines[4] == "| low | 45.1 | **50.0** | 44.9 | 40.0 |  |"
    assert lines[3] == "| lost |  | failed | failed | failed |  |"
    arguments = json.loads((tmp_path / "out" / "high" / "rate-0.01" / "arguments.json").read_text())
    assert arguments[5:11] == ["--epochs", "2", "--num_prompts", "3", "--learning_rate", "0.01"]

    count = len(started)  # once more: only what failed is tried again
    assert choose_rates.choose(rows, tmp_path / "out", ["--epochs", "2"], options, 3.2e-3, 0, launch) == table
    assert [name for name, _ in started[count:]] == ["lost"] * 3
    with pytest.raises(ValueError, match=r"rate-0\.001 holds a run with other options"):
        choose_rates.choose(rows, tmp_path / "out", ["--epochs", "3"], options, 3.2e-3, 0, launch)


def scores_by_rates(peaks, started=None):
    """A `launch` as if MAP@R fell by 10 points per decade from a row's best pair of rates."""

    def launch(arguments, log):
        folder = Path(arguments[-1])
        rates = {name: float(arguments[i + 1]) for i, name in enumerate(arguments) if name.endswith("learning_rate")}
        last = [rates["--learning_rate"], rates.get("--proxy_learning_rate")]
        away = [abs(math.log10(r / p)) for r, p in zip(last, peaks[folder.parent.name], strict=True) if r and p]
        (folder / "all_results.json").write_text(json.dumps({"final_map_at_r": 0.5 - 0.1 * sum(away)}))
        if started is not None:
            started.append((folder.parent.name, *last))
        return 0

    return launch


def test_the_proxies_rate_is_searched_at_the_learning_rate_chosen(tmp_path):
    tables = BENCHMARKS.parent / "configs"
    rows = {name: tables / where / f"{name}.yaml" for name, where in {"vpt": "table1", "hyperbolic": "table2"}.items()}
    started, peaks = [], {"vpt": (1e-2, 0.16), "hyperbolic": (1e-2, None)}
    overrides = ["--proxy_learning_rate", "0.05", "--backbone", "none"]
    table = choose_rates.choose(
        rows, tmp_path, overrides, {}, 3.2e-3, 0, scores_by_rates(peaks, started), choose_rates.proxy_rate
    )
    vpt = [(rate, proxies) for name, rate, proxies in started if name == "vpt"]
    assert vpt == [(rate, 0.05) for rate in (0.0032, 0.001, 0.01, 0.032)] + [(0.01, p) for p in (0.016, 0.16, 0.5)]
    tried = {path.name for path in (tmp_path / "hyperbolic").glob("rate-*")}  # the loss has no proxies
    assert tried == {"rate-0.001", "rate-0.0032", "rate-0.01", "rate-0.032"}
    assert yaml.safe_load((tmp_path / "rates.yaml").read_text()) == {
        "vpt": {"learning_rate": 0.01, "proxy_learning_rate": 0.16},
        "hyperbolic": {"learning_rate": 0.01},
    }
    assert table["vpt"]["0.01", "0.16"] == pytest.approx(0.5)
    lines = (tmp_path / "rates.md").read_text().splitlines()
    assert lines[:3:2] == ["| method | 0.001 | 0.0032 | 0.01 | 0.032 |", "| vpt | 34.9 | 40.0 | **44.9** | 39.9 |"]
    assert lines[7:10:2] == ["| method | 0.016 | 0.05 | 0.16 | 0.5 |", "| vpt | 40.0 | 44.9 | **50.0** | 45.1 |"]


def test_a_row_starts_at_its_own_rate(tmp_path):
    started, peaks = [], {"full": (3.2e-5, None), "vpt": (3.2e-3, None)}
    rows = {name: BENCHMARKS.parent / "configs" / "table1" / f"{name}.yaml" for name in peaks}
    own = {"full": ["--learning_rate", "3.2e-05"]}
    choose_rates.choose(rows, tmp_path, [], own, 3.2e-3, 0, scores_by_rates(peaks, started))
    assert [rate for name, rate, _ in started if name == "full"] == [3.2e-5, 1e-5, 1e-4]
    assert [rate for name, rate, _ in started if name == "vpt"] == [3.2e-3, 1e-3, 1e-2]
    with pytest.raises(ValueError, match="learning_rate must be above 0 to search from there, got 0"):
        choose_rates.choose(rows, tmp_path, [], {"vpt": ["--learning_rate", "0"]}, 1, 0)
    with pytest.raises(ValueError, match="--learning_rate is what is searched: --rate says where"):
        choose_rates.choose(rows, tmp_path, ["--learning_rate=0.1"], {}, 1, 0)


def test_two_commands_share_one_output(tmp_path):
    """What one writes has the other's rows, too, and a row that another is at comes last."""
    config = BENCHMARKS.parent / "configs" / "table1" / "vpt.yaml"
    started, peaks = [], {"a": (3.2e-3, None), "b": (1e-2, None), "busy": (1e-3, None)}
    launch = scores_by_rates(peaks, started)
    choose_rates.choose({"b": config}, tmp_path, ["--epochs", "2"], {}, 3.2e-3, 0, launch)
    with contextlib.ExitStack() as elsewhere:
        elsewhere.enter_context(locked(tmp_path / "busy" / ".row.lock", "the row"))

        def launch_and_let_go(arguments, log):
            elsewhere.close()  # as if the other process had ended
            return launch(arguments, log)

        rows = {"busy": config, "a": config}
        table = choose_rates.choose(rows, tmp_path, ["--epochs", "2"], {}, 3.2e-3, 0, launch_and_let_go)
    assert list(dict.fromkeys(name for name, *_ in started)) == ["b", "a", "busy"]
    rates = yaml.safe_load((tmp_path / "rates.yaml").read_text())
    assert rates == {name: {"learning_rate": rate} for name, (rate, _) in peaks.items()}
    assert list(table) == ["a", "b", "busy"]
    with pytest.raises(ValueError, match=r"a/rate-0\.001 holds a run with other options; .* --epochs 2"):
        choose_rates.choose({"c": config}, tmp_path, ["--epochs", "3"], {}, 3.2e-3, 0, launch)


def test_only_training_classes_are_seen(backbone_folder, tmp_path):
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


def test_a_fixed_split_is_refused_before_any_run(tmp_path, capsys):
    with pytest.raises(SystemExit):
        choose_rates.main(["--output", str(tmp_path), "--configs", str(CONFIG), "--data_dir", str(tmp_path)])
    assert "the data set 'cub' has no option 'train_classes', 'test_classes'" in capsys.readouterr().err
    assert not list(tmp_path.glob("*/*"))


def test_an_interruption_is_no_failed_run(monkeypatch, tmp_path):
    for code, stops in ((2, False), (1, False), (130, True), (143, True)):
        monkeypatch.setattr("vptsp.train.main", lambda arguments, code=code: (_ for _ in ()).throw(SystemExit(code)))
        if stops:
            with pytest.raises(SystemExit):
                resumable_runs.launch_here([], tmp_path / "log.txt")
        else:
            assert resumable_runs.launch_here([], tmp_path / "log.txt") == code
