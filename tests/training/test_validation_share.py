"""Runs whose best epoch is chosen on classes that neither train nor test."""

import json

import pytest
import torch
from data_fixtures import write_classes

from vptsp import DataArguments, Embedder, retrieval_metrics, train
from vptsp.data_scripts.image_datasets import image_datasets
from vptsp.search.commands import main as search


@pytest.fixture
def run(backbone_folder, tmp_path, capsys):
    """Folder, results and output of a run with these options."""

    def start(*words):
        photos = write_classes(tmp_path / "photos", dict.fromkeys("abcdefghij", 4))
        options = {"data_dir": photos, "data_cache_dir": tmp_path / "cache", "backbone": backbone_folder}
        options |= {"image_size": 16, "embedding_dim": 8, "num_prompts": 2, "num_class_prompts": 1, "batch_size": 4}
        options |= {"num_train_epochs": 3, "picture_queries": 2, "use_cpu": "true", "output_dir": tmp_path / "run"}
        train.main([str(word) for name, value in options.items() for word in (f"--{name}", value)] + list(words))
        results = json.loads((tmp_path / "run" / "all_results.json").read_text())
        return tmp_path / "run", results, capsys.readouterr().out

    return start


def scores(embedder, part):
    embeddings = embedder.embed_images(list(part.stored_images()))
    return retrieval_metrics(embeddings, torch.from_numpy(part.labels), recall_at=(1,))


def test_the_best_epoch_is_that_of_the_validation_classes_and_scores_are_of_the_test(run, tmp_path, capsys):
    folder, results, printed = run("--validation_share", "0.4")
    given = DataArguments(data_dir=str(tmp_path / "photos"), validation_share=0.4, image_size=16)
    images = image_datasets(given)
    assert [images[name].class_names for name in ("train", "validation", "test")] == [
        list("abc"),
        ["d", "e"],
        list("fghij"),
    ]

    history = [json.loads(path.read_text())["log_history"] for path in folder.glob("checkpoint-*/trainer_state.json")]
    evaluations = [entry for entry in max(history, key=len) if "eval_map_at_r" in entry]
    assert len(evaluations) == 3
    best = max(evaluations, key=lambda entry: entry["eval_recall_at_1"])
    assert results["best_step"] == best["step"]
    tuned = Embedder.from_pretrained(folder)
    assert scores(tuned, images["validation"])["map_at_r"] == pytest.approx(best["eval_map_at_r"], abs=1e-6)
    assert scores(tuned, images["test"])["map_at_r"] == pytest.approx(results["final_map_at_r"], abs=1e-6)
    assert (results["final_num_queries"], results["frozen_validation_num_queries"]) == (20, 8)

    assert "2 of the training classes, which don't train" in printed
    assert "on images of the validation classes, not on these test images" in printed and "flatters" not in printed
    assert "on images of other training classes." in (folder / "README.md").read_text()
    record = json.loads((folder / "splits.json").read_text())
    assert {name: "".join(part["classes"]) for name, part in record["splits"].items()} == {
        "train": "abc", "validation": "de", "test": "fghij",
    }  # fmt: skip
    words = ["--output", str(tmp_path / "scores"), "--embeddings_cache", str(tmp_path / "store"), "--no_clustering"]
    assert search(["evaluate", "--model", str(folder), *words, "--quiet"]) == 0
    again = json.loads((tmp_path / "scores" / "metrics.json").read_text())["metrics"]
    assert again["map_at_r"] == pytest.approx(results["final_map_at_r"], abs=1e-6)


def test_it_chooses_where_nothing_is_tested(run):
    folder, results, printed = run("--validation_share", "0.3", "--test_share", "0")
    assert "choose the best; nothing is tested" in printed and "no pictures" in printed
    assert results["best_step"] > 0 and results["dataset"]["validation_classes"] == 3
    assert not [name for name in results if name.startswith(("final_", "frozen_recall"))]
    assert (folder / "model.safetensors").is_file()


def test_without_it_the_line_says_how_to(run):
    _, results, printed = run()
    assert "which flatters it (--validation_share 0.2 chooses on training classes" in printed
    assert "validation_classes" not in results["dataset"]
