"""benchmarks/peers.py and peer_training.py: what each peer tunes, how it is scored, and the table."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import peer_training
import peers
import pytest
from PIL import Image

from vptsp import build_image_processor


@pytest.fixture
def options(backbone_folder, tmp_path):
    rng = np.random.default_rng(0)
    for label in range(12):
        folder = tmp_path / "images" / f"class{label:02}"
        folder.mkdir(parents=True)
        for i in range(3):
            Image.fromarray(rng.integers(0, 256, (18, 18, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    backbone = tmp_path / "backbone"  # with the image processor that sentence-transformers asks for
    backbone.mkdir()
    for path in backbone_folder.iterdir():
        (backbone / path.name).write_bytes(path.read_bytes())
    build_image_processor(16, 18).save_pretrained(backbone)
    values = {
        "dataset_name": "folder",
        "data_dir": tmp_path / "images",
        "class_split": "alternate",
        "data_cache_dir": tmp_path / "cache",
        "backbone": backbone,
        "image_size": 16,
        "embedding_dim": 8,
        "per_device_train_batch_size": 4,
        "images_per_class": 2,
        "optim": "adamw_torch",
        "max_steps": 3,
        "recall_at": 1,
    }
    return [text for name, value in values.items() for text in (f"--{name}", str(value))] + ["--use_cpu"]


def launch(arguments, log):
    """A peer in this process."""
    try:
        peer_training.main(arguments)
    except SystemExit as error:
        log.write_text(str(error))
        return 1
    return 0


def test_every_peer_trains_what_it_says(options, tmp_path):
    rows = peers.compare({peer: peer for peer in peers.STARTS}, [0], tmp_path / "peers", options, launch)
    assert {name: row["failures"] for name, row in rows.items()} == {name: [] for name in peers.STARTS}
    width, layers, head = 24, 4, 24 * 8 + 8
    backbone = sum(
        tensor.numel() for tensor in peer_training.Trunk(option(options, "backbone"), None, False).parameters()
    )
    expected = {
        "st_lora_triplet": (layers * 2 * 2 * 8 * width, 0),  # query and value, A and B of rank 8
        "pml_proxy_anchor_linear": (head, 6 * 8),
        "pml_proxy_anchor_full": (backbone + head, 6 * 8),
        "pml_multi_similarity_linear": (head, 0),
        "pml_multi_similarity_full": (backbone + head, 0),
    }
    for name, counts in expected.items():
        found = rows[name]["mean"]
        assert (found["tuned_parameters"], found["training_only_parameters"]) == counts, name
        assert found["shipped_megabytes"] == pytest.approx(4e-6 * counts[0], rel=0.2, abs=0.01)
        results = json.loads((tmp_path / "peers" / name / "seed-0" / "all_results.json").read_text())
        assert results["steps"] == 3
        assert results["final_num_queries"] == 18


def option(options, name):
    return options[options.index(f"--{name}") + 1]


def test_scores_are_those_of_the_embeddings(options):
    *_, data_args = peer_training.check([*peers.FIXED, *options, "--output_dir", "runs"])
    images = peer_training.image_datasets(data_args)["test"]
    found = peer_training.score(lambda pixels: pixels.float().mean((2, 3)) - 100, images, [1])
    vectors = np.stack([images[row]["pixel_values"].numpy().mean((1, 2)) - 100 for row in range(len(images))])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    similarity = vectors @ vectors.T
    np.fill_diagonal(similarity, -np.inf)
    assert found["recall_at_1"] == pytest.approx((images.labels[similarity.argmax(1)] == images.labels).mean())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--num_prompts", "3"], "peers have no option --num_prompts; they take backbone, "),
        (["--optim", "sgd"], "peers train with AdamW: optim must be adamw_torch, got sgd"),
        (["--cosine_epochs", "2"], "cosine_epochs goes with num_train_epochs"),
        (["--max_steps", "1"], "a peer needs two steps at least"),
    ],
)
def test_options_that_a_peer_would_pass_over(options, given, message):
    with pytest.raises(ValueError, match=message):
        peer_training.check([*peers.FIXED, *options, *given, "--output_dir", "runs"])


def test_rates_are_searched_on_held_back_classes(options, tmp_path, monkeypatch):
    started = []

    def fake(arguments, log):
        folder = Path(arguments[-1])
        rates = [float(value) for name, value in pairwise(arguments) if name == "--learning_rate"]
        started.append((folder.parent.name, rates[-1], "proxies" in folder.name))
        (folder / "all_results.json").write_text(json.dumps({"final_map_at_r": -abs(np.log(rates[-1] / 1e-3))}))
        return 0

    names = ["pml_proxy_anchor_linear", "pml_multi_similarity_full"]
    own = {"pml_multi_similarity_full": ["--learning_rate", "0.001"]}
    table = peers.choose_peer_rates(names, tmp_path / "rates", options, own, 0, fake, ["proxy_learning_rate"])
    assert (tmp_path / "rates" / "test_classes.txt").read_text().split() == ["class04", "class10"]
    assert {rate for name, rate, _ in started if name.endswith("full")} == {1e-3, 3.2e-4, 3.2e-3}
    assert {proxies for name, _, proxies in started if name.endswith("full")} == {False}
    assert {proxies for name, _, proxies in started if name.endswith("linear")} == {True}
    assert len(table["pml_proxy_anchor_linear"]) == 4 + 2  # 0.0032, 0.001, 0.01, 0.00032, then two more of proxies


def test_the_best_in_each_column_are_named(tmp_path):
    def row(recall, step, tuned):
        mean = dict.fromkeys(peers.COLUMNS, 1.0) | {"recall_at_1": recall, "median_step_seconds": step}
        return {"seeds": 1, "mean": mean | {"tuned_parameters": tuned}, "failures": []}

    rows = {"ours": row(0.9, 0.2, 5), "theirs": row(0.8, 0.1, 5), "failed": {"seeds": 0, "failures": ["no"]}}
    best = peers.winners(rows)
    assert best["recall_at_1"] == ["ours"]
    assert best["median_step_seconds"] == ["theirs"]
    assert best["tuned_parameters"] == ["ours", "theirs"]


def test_rows_of_ours_must_have_had_the_same_options(tmp_path):
    folder = tmp_path / "vptsp_g_bitfit" / "seed-0"
    folder.mkdir(parents=True)
    (folder / "arguments.json").write_text(json.dumps(["x.yaml", *peers.FIXED, "--image_size", "16"]))
    with pytest.raises(ValueError, match=r"seed-0 holds a run with other options; .* --image_size 16"):
        peers.find_ours(tmp_path, ["vptsp_g_bitfit"], ["--image_size", "32"])
    with pytest.raises(ValueError, match="has no finished run of vptsp_g_bitfit"):
        peers.find_ours(tmp_path, ["vptsp_g_bitfit"], ["--image_size", "16"])
