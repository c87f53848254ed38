"""The comparison of ways to do without labels: what it runs, keeps, refuses and writes."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from vptsp.training.run_arguments import parse_arguments


PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "no_labels.py"
sys.path.insert(0, str(PATH.parent))  # as for a script: it takes functions of its neighbours
specification = importlib.util.spec_from_file_location("no_labels", PATH)
no_labels = importlib.util.module_from_spec(specification)
specification.loader.exec_module(no_labels)


def launcher(done):
    """A `train.py` that gives scores at once, and fails where it is told to."""

    def launch(arguments, log):
        log.write_text("it broke\n")
        done.append(arguments)
        value = dict(zip(arguments[::2], arguments[1::2], strict=False))
        folder = log.parent
        if value.get("--seed") == "9":
            return 1
        scores = {"recall_at_1": 0.8, "recall_at_2": 0.9, "recall_at_4": 0.95, "map_at_r": 0.3 + 0.01 * len(done)}
        results = {f"final_{name}": score for name, score in scores.items()}
        results |= {f"frozen_{name}": score / 2 for name, score in scores.items()}
        results |= {"tuned_parameters": 1e5, "training_only_parameters": 1e6}
        (folder / "all_results.json").write_text(json.dumps(results))
        return 0

    return launch


@pytest.mark.parametrize("row", no_labels.METHODS)
def test_every_row_is_a_run_that_can_be_asked_for(row, tmp_path):
    _, data = no_labels.data_options(f"photos=folder:{tmp_path}")
    words = no_labels.run_command(data, no_labels.METHODS[row], 3, tmp_path / "run", ["--use_cpu"])
    _, training, arguments, _ = parse_arguments(words)
    assert (training.seed, training.output_dir) == (3, str(tmp_path / "run"))
    labels = "given" if row == "labelled" else "none"
    assert (arguments.labels, arguments.test_labels) == (labels, labels == "none")


def test_finished_runs_are_kept(tmp_path):
    data = dict([no_labels.data_options("a=folder:x"), no_labels.data_options("b=cub:y")])
    methods = {"clusters, 2 rounds": ("--labels", "none", "--rounds", "2"), "100 clusters": ("--labels", "none")}
    done = []
    tables = no_labels.compare(data, methods, [0, 1], tmp_path, [], launcher(done))
    assert len(done) == 8
    assert ("--test_labels" in done[0], "--test_labels" in done[2]) == (True, False)  # a benchmark has its test
    assert tables["b"]["clusters, 2 rounds"]["seeds"] == 2
    assert "| clusters, 2 rounds | 2 |" in (tmp_path / "a" / "comparison.md").read_text()
    assert (tmp_path / "curves.png").stat().st_size > 1000
    assert no_labels.compare(data, methods, [0, 1], tmp_path, [], launcher(done)) == tables
    assert len(done) == 8
    with pytest.raises(ValueError, match="holds a run with other options"):
        no_labels.compare(data, methods, [0, 1], tmp_path, ["--image_size", "64"], launcher(done))


def test_failures_are_in_the_table(tmp_path):
    data = dict([no_labels.data_options("a=folder:x")])
    no_labels.compare(data, {"labelled": ()}, [9], tmp_path, [], launcher([]))
    assert "labelled: it broke" in (tmp_path / "a" / "comparison.md").read_text()


def test_data_sets_have_a_name_and_a_place():
    with pytest.raises(ValueError, match=r"--data must be NAME=DATASET:PLACE, .* got 'cars'"):
        no_labels.data_options("cars")
