"""Model cards: what they say with much and with little known, and what they never say."""

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import tiny_vit_config
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from vptsp import VPTSPConfig, VPTSPForMetricLearning, VPTSPModel, VPTSPTrainer, VPTSPTrainingArguments
from vptsp.data_scripts.preprocessing import build_image_processor
from vptsp.training.checkpoints import delete_checkpoints
from vptsp.training.model_card import retriever_card, without_tokens


RESULTS = {
    "command": "train.py configs/folder.yaml --data_dir photos --hub_token abc --push_to_hub true",
    "versions": {"torch": "2.13.0"},
    "dataset": {"name": "hub", "repo": "ann/photos", "revision": "v2", "train_classes": 5864, "test_images": 24},
    "frozen_recall_at_1": 0.25,
    "final_recall_at_1": 0.5,
    "final_recall_at_10": 0.875,
    "final_map_at_r": 0.125,
    "final_map_at_1000": 0.75,
    "final_num_queries": 1234,
    "final_num_unanswerable": 3,
    "final_runtime": 9.0,
    "picture": "pictures/neighbours.png",
}


@pytest.fixture
def model(backbone_folder):
    return VPTSPForMetricLearning.from_backbone(backbone_folder, num_classes=3, embedding_dim=10, num_prompts=5)


def arguments(folder, **options):
    return VPTSPTrainingArguments(str(folder), use_cpu=True, report_to="none", **options)


def table(card):
    """Rows of all tables: first cell -> the others."""
    rows = [line.strip("| ").split(" | ") for line in card.text.splitlines() if line.startswith("| ")]
    return {first: others for first, *others in rows}


def test_all_that_a_run_knows(model, tmp_path):
    training_args = arguments(tmp_path)
    card = retriever_card(model, "ann/birds", RESULTS, training_args, license="mit")
    rows = table(card)
    assert rows["R@1"][:2] == ["25.00", "50.00"]
    assert rows["R@10"][:2] == ["", "87.50"]
    assert rows["R@10"][2] == "share of queries with an item of their class among the 10 nearest"
    assert "divided by R, the number of other items" in rows["MAP@R"][2]
    assert rows["mAP@1000"][1] == "75.00"
    assert "runtime" not in card.text
    assert "over 1,234 queries. 3 queries whose class has no other item are left out." in card.text
    assert "flatters the tuned scores" in card.text  # load_best_model_at_end
    assert (rows["num_prompts"], rows["learning_rate"], rows["optim"]) == (
        ["5"],
        ["0.0005"],
        [training_args.optim.value],
    )
    assert rows["version of torch"] == ["2.13.0"]
    assert "Data: `ann/photos` (train classes 5,864, test images 24)." in card.text
    assert "--hub_token HIDDEN --push_to_hub true" in card.text
    assert "abc" not in card.text
    assert 'name, revision = "ann/birds", "main"' in card.text
    assert "](pictures/neighbours.png)" in card.text
    assert "arxiv.org/abs/2402.02340" in card.text

    again = ModelCard(str(card))  # as a reader parses it
    assert (again.data.license, again.data.library_name) == ("mit", "transformers")
    assert (again.data.pipeline_tag, again.data.datasets) == ("image-feature-extraction", ["ann/photos"])
    assert {result.metric_name: result.metric_value for result in again.data.eval_results} == {
        "R@1": 0.5,
        "R@10": 0.875,
        "MAP@R": 0.125,
        "mAP@1000": 0.75,
    }
    assert again.data.eval_results[0].dataset_revision == "v2"
    assert again.data.model_name == "birds"


def test_scores_are_those_of_the_repository_that_tests(model):
    parts = [{"name": "bob/asked", "repo": "bob/asked", "revision": None}]
    parts += [{"name": "bob/shelf", "repo": "bob/shelf", "revision": "v3"}]
    for tested_on, of, revision in (
        (parts, "bob/shelf", "v3"),
        ([{"name": "mine", "repo": None, "revision": None}], "mine", None),
    ):
        card = retriever_card(model, "ann/birds", RESULTS | {"dataset": RESULTS["dataset"] | {"tested_on": tested_on}})
        repos = [part["repo"] for part in tested_on if part["repo"]]
        assert card.data.datasets == ["ann/photos", *repos]
        found = {
            (result.dataset_name, result.dataset_type, result.dataset_revision) for result in card.data.eval_results
        }
        assert found == {(of, of, revision)}
        names = " and ".join(f"`{part['name']}`" for part in tested_on)
        assert f"Data: `ann/photos`, tested on {names} (train classes" in card.text


def test_intervals_stand_beside_the_scores(model):
    low_high = {"final_recall_at_1_low": 0.41, "final_recall_at_1_high": 0.59}
    rows = table(retriever_card(model, "ann/birds", {**RESULTS, **low_high}))
    assert rows["R@1"][:3] == ["25.00", "50.00", "41.00 to 59.00"]
    assert rows["R@10"][:3] == ["", "87.50", ""]
    assert rows["metric"] == ["backbone alone", "tuned", "95 % interval", "what it is"]
    assert "interval" not in retriever_card(model, "ann/birds", RESULTS).text.lower()


def test_a_card_is_named_after_its_folder(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments_of = {"runs/photos": "photos", ".": tmp_path.name}
    for folder, name in arguments_of.items():
        VPTSPTrainer(model, arguments(folder, eval_strategy="no", save_strategy="no")).save_model()
        card = ModelCard.load(Path(folder) / "README.md")
        assert card.text.lstrip().startswith(f"# {name}\n")
        assert card.data.model_name == name
        assert f'name = "{folder}"  # the folder' in card.text
        assert "owner/name" not in card.text and str(tmp_path) not in card.text


def test_a_card_names_backbone_and_image_size(model, tmp_path):
    processor = build_image_processor(16, 18)
    text = retriever_card(model, folder=tmp_path / "photos", processor=processor).text
    config = model.config.backbone_config
    what = f"(vit, {config.num_hidden_layers} layers of width {config.hidden_size})"
    assert f"Backbone: `{Path(model.config.backbone).name}` {what}, not in this repository and not on the Hub." in text
    side = config.image_size
    assert f"Image size: {side} x {side} pixels, the middle of the image once its short side has 18." in text
    assert f"Image size: {side} x {side} pixels." in retriever_card(model).text
    model.config.backbone, model.config.backbone_revision = "ann/vit", "c0ffee"
    assert f"(https://huggingface.co/ann/vit), revision `c0ffee` {what}." in retriever_card(model).text
    model.config.backbone = None
    assert f"Backbone: {what}, saved along in this repository." in retriever_card(model).text


@pytest.mark.parametrize("saved_along", [False, True])
def test_the_snippets_of_a_folder_run_as_they_stand(model, tmp_path, saved_along):
    """In a process of their own, without this package, where the run was started; also once the backbone has moved."""
    model.config.save_backbone = saved_along
    backbone = shutil.copytree(model.config.backbone, tmp_path / "vit-tiny")
    model.config.backbone = str(backbone)
    trainer = VPTSPTrainer(
        model,
        arguments(tmp_path / "runs" / "photos", eval_strategy="no"),
        processing_class=build_image_processor(16, 18),
    )
    here = Path.cwd()
    try:
        os.chdir(tmp_path)
        trainer.save_model()
    finally:
        os.chdir(here)
    card = (tmp_path / "runs" / "photos" / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(blocks) == (3 if saved_along else 4)
    check = (
        "assert embeddings.shape == (2, 10) and len(embedding) == 10 and 'vptsp' not in __import__('sys').modules\n"
        "assert abs(embeddings.numpy() - encoded).max() < 1e-6\n"
    )
    run_python("".join(blocks[:3]) + check, tmp_path)
    if saved_along:
        return
    backbone.rename(tmp_path / "moved")
    moved = (blocks[0] + blocks[3].replace("path/to/vit-tiny", "moved")).replace(
        "model = AutoModel.from_pretrained(name, trust_remote_code=True)\n", ""
    )
    first, last = moved.split("# yours", 1)
    last, load = last.split("model = AutoModel", 1)
    run_python(f"{first}model = AutoModel{load}# yours{last}assert embeddings.shape == (2, 10)\n", tmp_path)


def run_python(code, folder):
    (folder / "snippet.py").write_text(code)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, "-P", "snippet.py"], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr


def test_auto_model_loads_a_checkpoint_as_its_retriever(model, tmp_path):
    """With the code beside it, without this package."""
    trainer = VPTSPTrainer(
        model, arguments(tmp_path, eval_strategy="no"), processing_class=build_image_processor(16, 18)
    )
    trainer.state.global_step = 1
    trainer.save_weights(tmp_path / "checkpoint-1")
    pixels = torch.rand(2, 3, *[model.config.backbone_config.image_size] * 2)
    torch.save({"pixels": pixels, "expected": model.retriever.eval()(pixels).embeddings}, tmp_path / "expected.pt")
    code = """
        import sys, torch
        from transformers import AutoImageProcessor, AutoModel
        AutoImageProcessor.from_pretrained("checkpoint-1")
        model = AutoModel.from_pretrained("checkpoint-1", trust_remote_code=True)
        assert type(model).__name__ == "VPTSPModel" and "vptsp" not in sys.modules
        saved = torch.load("expected.pt")
        torch.testing.assert_close(model(saved["pixels"]).embeddings, saved["expected"])
    """
    run_python(textwrap.dedent(code), tmp_path)


def test_best_checkpoint_is_only_mentioned_where_one_was_chosen(model, tmp_path):
    card = retriever_card(model, "ann/birds", RESULTS, arguments(tmp_path, load_best_model_at_end=False))
    assert "flatters" not in card.text


def test_sizes_are_those_of_the_file(model, tmp_path):
    text = retriever_card(model).text
    model.retriever.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    count = sum(tensor.numel() for tensor in saved.values())
    total = sum(parameter.numel() for parameter in model.retriever.parameters())
    assert f"Tuned are {count:,} of {total:,} parameters ({count / total:.2%}). Saved are only these" in text
    assert f"{4 * count / 1e6:.2f} MB" in text
    model.config.save_backbone = True
    assert f"backbone and all: {4 * total / 1e6:.2f} MB" in retriever_card(model).text


def test_a_backbone_without_a_name_is_counted_as_saved_before_it_is(tmp_path):
    model = VPTSPForMetricLearning(VPTSPConfig(backbone_config=tiny_vit_config(), num_classes=3))
    total = sum(parameter.numel() for parameter in model.retriever.parameters())
    expected = f"Saved are backbone and all: {4 * total / 1e6:.2f} MB"
    assert expected in retriever_card(model).text
    model.retriever.save_pretrained(tmp_path)
    assert sum(tensor.numel() for tensor in load_file(tmp_path / "model.safetensors").values()) == total
    assert expected in retriever_card(model).text


def test_paths_of_this_machine_stay_out(model, backbone_folder):
    card = retriever_card(model)
    assert str(backbone_folder) not in str(card)
    assert card.data.base_model is None
    assert "not in this repository and not on the Hub" in card.text
    model.config.backbone, model.config.backbone_revision = "google/vit-base-patch16-224-in21k", "c0ffee"
    card = retriever_card(model)
    assert card.data.base_model == "google/vit-base-patch16-224-in21k"
    assert "(https://huggingface.co/google/vit-base-patch16-224-in21k), revision `c0ffee`" in card.text


def test_saving_without_scores_gives_a_card_with_what_is_there(model, tmp_path):
    trainer = VPTSPTrainer(
        model, arguments(tmp_path, eval_strategy="no", hub_model_id="ann/birds", hub_token="hf_secret")
    )
    trainer.save_model()
    card = ModelCard.load(tmp_path / "README.md")
    assert 'name, revision = "ann/birds"' in card.text
    assert "## Scores" not in card.text
    assert "neighbours.png" not in card.text
    assert "## Size" in card.text
    assert card.data.eval_results is None
    trainer.create_model_card(results=RESULTS, license="mit")
    card = ModelCard.load(tmp_path / "README.md")
    assert "## Scores" in card.text
    assert card.data.license == "mit"
    assert all(b"hf_secret" not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_a_readme_of_something_else_is_left_alone(model, tmp_path, caplog):
    (tmp_path / "README.md").write_text("# My project\n")
    VPTSPTrainer(model, arguments(tmp_path, eval_strategy="no")).save_model()
    assert (tmp_path / "README.md").read_text() == "# My project\n"
    assert "is left as it is" in caplog.text


def test_what_is_saved_does_not_depend_on_what_a_folder_is_called(model, tmp_path):
    """Saving gives the retriever with its card, also into folders that are called like checkpoints."""
    folder = tmp_path / "checkpoint-5"
    trainer = VPTSPTrainer(model, arguments(folder, eval_strategy="no"))
    trainer.save_model()
    trainer.save_model(str(tmp_path / ".checkpoint-7.partial"))
    for name in ("checkpoint-5", ".checkpoint-7.partial"):
        saved = load_file(tmp_path / name / "model.safetensors")
        assert saved.keys() == model.retriever.tuned_names()
        assert "## Size" in ModelCard.load(tmp_path / name / "README.md").text
    trainer.state.global_step = 1
    trainer.save_weights(tmp_path / "last")  # as checkpoints have it
    assert "proxies.original_proxies" in load_file(tmp_path / "last" / "model.safetensors")
    assert not (tmp_path / "last" / "README.md").exists()
    delete_checkpoints([folder])  # as rotation does with what it finds under such a name
    assert (folder / "model.safetensors").is_file()


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_checkpoints_are_not_for_sharing(tmp_path, strategy):
    with pytest.raises(ValueError, match=f"hub_strategy must be end or every_save, got '{strategy}'"):
        arguments(tmp_path, hub_strategy=strategy)


def test_pushing_a_retriever_on_a_local_backbone_is_refused_at_once(model, tmp_path):
    with pytest.raises(ValueError, match="which others don't have"):
        VPTSPTrainer(model, arguments(tmp_path, push_to_hub=True, hub_model_id="ann/birds"))
    with pytest.raises(ValueError, match="which others don't have"):
        VPTSPTrainer(model, arguments(tmp_path, eval_strategy="no")).push_to_hub()
    with pytest.raises(ValueError, match="which others don't have"):
        model.push_to_hub("ann/birds")


@pytest.mark.parametrize(
    "words, secrets, expected",
    [
        (["train.py", "--hub_token", "abc", "--seed", "1"], (), "train.py --hub_token HIDDEN --seed 1"),
        (["train.py", "--hub_token=abc"], (), "train.py --hub_token=HIDDEN"),
        (["train.py", "--hub_tok", "abc"], ("abc",), "train.py --hub_tok HIDDEN"),
        (["train.py", "--data_dir", "my photos/abcd"], ("abcd",), "train.py --data_dir 'my photos/HIDDEN'"),
        (["train.py", "hf_" + "x" * 30], (None,), "train.py HIDDEN"),
        (["train.py", "--token", "--seed", "1"], (), "train.py --token --seed 1"),
        (["train.py", "--seed", "1"], (None,), "train.py --seed 1"),
    ],
)
def test_tokens_are_blotted_out(words, secrets, expected):
    assert without_tokens(words, *secrets) == expected


def test_examples_pin_the_code_that_they_run():
    text = (Path(__file__).resolve().parents[2] / "docs" / "sharing.md").read_text(encoding="utf-8")
    calls = [line for line in text.splitlines() if "trust_remote_code=True" in line]
    assert len(calls) >= 3
    assert all("revision=revision" in line for line in calls)


def test_queries_and_gallery_are_told_apart(model):
    results = {**RESULTS, "dataset": {"name": "inshop", "query_images": 3, "gallery_images": 2}}
    assert "queries against a gallery of other images" in retriever_card(model, results=results).text
    assert "a query never retrieves itself" in retriever_card(model, results=RESULTS).text
    told = " 7 queries are in the gallery too, where they are excluded."
    assert told in retriever_card(model, results={**results, "final_num_in_gallery": 7}).text
    assert told not in retriever_card(model, results=results).text


def test_card_of_a_retriever_alone(backbone_folder):
    retriever = VPTSPModel.from_backbone(backbone_folder, embedding_dim=10, dtype=torch.bfloat16)
    count = sum(retriever.state_dict()[name].numel() for name in retriever.tuned_names())
    assert f"{2 * count / 1e6:.2f} MB" in retriever_card(retriever, "ann/birds").text


@pytest.mark.parametrize("value", [float("nan"), None])
def test_scores_that_there_are_none_of_stay_out(model, value):
    card = retriever_card(model, results={**RESULTS, "final_recall_at_1": value})
    metrics = {result.metric_type for result in card.data.eval_results}
    assert "recall_at_1" not in metrics and "map_at_r" in metrics
    assert ": .nan" not in str(card) and "| nan |" not in str(card)
