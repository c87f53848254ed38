"""benchmarks/dependence.py: which photos a point has, that points share runs, and what is written of them."""

import json
from pathlib import Path

import dependence
import numpy as np
import pytest
from PIL import Image


CONFIG = Path(__file__).resolve().parents[2] / "configs" / "table1" / "vptsp_g_bitfit.yaml"
PHOTOS = {f"class{i}": [f"/photos/class{i}/{k}.png" for k in range(4 + i)] for i in range(12)}


def base(**values):
    given = {"steps": 100, "image_size": 112, "patch_size": 14, "num_prompts": 10, "proxy_bias_ratio": 0.5}
    photos = {"train": PHOTOS, "test": {"other": ["/photos/other/0.png"]}}
    return dependence.Base(**{**given, "proxy_update": "gru_relu", "photos": photos, **values})


def test_fewer_photos_and_classes_are_a_part_of_more():
    few, more = (dependence.subset(PHOTOS, classes, per_class, 3) for classes, per_class in ((5, 2), (8, 4)))
    assert [len(paths) for paths in few.values()] == [2] * 5
    assert set(few) < set(more)
    assert all(set(few[name]) < set(more[name]) < set(PHOTOS[name]) or len(PHOTOS[name]) == 4 for name in few)
    assert dependence.subset(PHOTOS, None, None, 3).keys() == PHOTOS.keys()
    assert dependence.subset(PHOTOS, 5, 2, 4) != few


def test_the_options_given_are_a_point_of_every_curve_but_shops():
    planned = dependence.curves(base())
    assert set(planned) == set(dependence.CURVES)
    for name, (_, changes) in planned.items():
        unchanged = [value for value, change in changes.items() if change is None]
        assert len(unchanged) == (0 if name == "shop" else 1)
        assert {dependence.point_name(name, value, None) for value in unchanged} <= {"default"}
    assert planned["steps"][1] == {
        "25": ["--max_steps", "25"],
        "50": ["--max_steps", "50"],
        "100": None,
        "200": ["--max_steps", "200"],
        "400": ["--max_steps", "400"],
    }
    assert planned["image_size"][1]["56"] == ["--image_size", "56", "--resize_size", "64"]
    assert list(planned["classes"][1]) == ["5", "10", "all 12"]
    assert planned["shop"][1] == {"5 x 5": (5, 5), "10 x 5": (10, 5), "10 x 10": (10, 10)}
    assert list(dependence.curves(base(num_prompts=3))["prompts"][1]) == ["1", "3", "5", "10", "20", "50"]


@pytest.fixture
def options(backbone_folder, tmp_path):
    rng = np.random.default_rng(0)
    for label in range(14):
        folder = tmp_path / "images" / f"class{label:02}"
        folder.mkdir(parents=True)
        for i in range(3):
            Image.fromarray(rng.integers(0, 256, (18, 18, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    values = {
        "dataset_name": "folder",
        "data_dir": tmp_path / "images",
        "class_split": "alternate",
        "data_cache_dir": tmp_path / "cache",
        "backbone": backbone_folder,
        "image_size": 16,
        "embedding_dim": 8,
        "num_prompts": 2,
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "save_strategy": "no",
        "final_metrics": "retrieval",
        "disable_tqdm": "true",
    }
    return [text for name, value in values.items() for text in (f"--{name}", str(value))] + ["--use_cpu"]


def test_curves_of_a_data_set(options, tmp_path):
    from resumable_runs import launch_here

    started, output = [], tmp_path / "curves"

    def launch(arguments, log):
        started.append(Path(arguments[-1]))
        return launch_here(arguments, log)

    table = dependence.run_curves(CONFIG, ["classes", "photos"], [0], output, options, launch=launch)
    assert sorted(path.parent.name for path in started) == [
        "classes-5",
        "default",
        "photos-10",
        "photos-2",
        "photos-5",
    ]
    seen = {
        path.parts[-3]: json.loads(path.read_text())["dataset"] for path in output.glob("*/seed-0/all_results.json")
    }
    counts = {name: (run["train_classes"], run["train_images"]) for name, run in seen.items()}
    assert counts == {
        "classes-5": (5, 15),
        "default": (7, 21),
        "photos-2": (7, 14),
        "photos-5": (7, 21),
        "photos-10": (7, 21),
    }
    assert {(run["test_classes"], run["test_images"]) for run in seen.values()} == {(7, 21)}
    default = json.loads((output / "default" / "seed-0" / "all_results.json").read_text())
    for curve, value in (("classes", "all 7"), ("photos", "all"), ("steps", "2"), ("image_size", "16")):
        assert table[curve]["points"][value]["mean"]["recall_at_1"] == default["final_recall_at_1"]
    five = json.loads((output / "classes-5" / "seed-0" / "all_results.json").read_text())
    assert five["frozen_map_at_r"] == default["frozen_map_at_r"]  # the same test photos
    text = (output / "dependence.md").read_text()
    assert f"- With 5 classes and all their photos, expect R@1 {100 * five['final_recall_at_1']:.1f} (frozen" in text
    assert Image.open(output / "dependence.png").size == (1800, 800)

    assert dependence.run_curves(CONFIG, ["classes"], [0], output, options, launch=launch) == table
    assert len(started) == 5  # nothing twice
    Image.new("RGB", (18, 18)).save(tmp_path / "images" / "class00" / "new.png")
    with pytest.raises(ValueError, match=r"photos\.csv was written for other data"):
        dependence.run_curves(CONFIG, ["classes"], [0], output, options, launch=launch)


def test_what_curves_need(options, tmp_path):
    place = options.index("--max_steps")
    epochs = [*options[:place], *options[place + 2 :], "--num_train_epochs", "1"]
    with pytest.raises(ValueError, match="--max_steps is needed: epochs would be shorter"):
        dependence.run_curves(CONFIG, ["steps"], [0], tmp_path / "curves", epochs)
