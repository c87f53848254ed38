"""The benchmark of the metrics: what it compares, on small sets."""

import importlib.util
import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch


PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "metric_speed.py"
MEGABYTES = {"vptsp": 1.0, "pass": 2.0, "accuracy_calculator": 3.0}


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark_metrics", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("case", ["own", "mixed", "gallery"])
@pytest.mark.parametrize("against", ["pass", "accuracy_calculator"])
def test_compares_on_the_same_sets(benchmark, case, against):
    if against == "accuracy_calculator":
        pytest.importorskip("pytorch_metric_learning")
    args = Namespace(width=32, device="cpu", rounds=2)
    row = benchmark.compare(case, 1500, against, MEGABYTES, args)
    assert row["ratio"] == pytest.approx(row["seconds"] / row["seconds_against"])
    assert row["extra_megabytes_against"] == MEGABYTES[against]
    if against == "accuracy_calculator":
        assert row["largest_difference"] < 1e-6
    json.dumps(row)


def test_other_values_end_the_run(benchmark, monkeypatch):
    wrong = {"precision_at_1": 0.5, "r_precision": 0.5, "mean_average_precision_at_r": 0.5}
    monkeypatch.setitem(benchmark.CONTENDERS, "accuracy_calculator", lambda *sets: wrong)
    with pytest.raises(SystemExit, match="expected equal values"):
        benchmark.compare("own", 600, "accuracy_calculator", MEGABYTES, Namespace(width=8, device="cpu", rounds=1))


def test_class_sizes_reach_from_2_to_1001(benchmark):
    _, labels = benchmark.make_sets("mixed", 20000, 2, "cpu")
    sizes = labels.bincount()[:-1]  # the last class is cut
    assert int(sizes.min()) == 2 and 900 < int(sizes.max()) <= 1001
    assert torch.equal(benchmark.make_sets("own", 20, 2, "cpu")[1].bincount(), torch.full((4,), 5))
