"""Pushing retrievers to the Hub and loading them, with the real client code and a stand-in for the server.

`hub_push.py` pushes; `hub_read.py` loads, in processes that can't import vptsp, with the server and then without it.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hub_stand_in import HubStandIn, Repository
from huggingface_hub import ModelCard
from safetensors.torch import load, load_file

from vptsp.modeling_vptsp import SENTENCE_TRANSFORMERS_FILES


TESTS = Path(__file__).resolve().parent
TOKEN = "hf_" + "Zx9" * 12


def same(embeddings, expected):
    """But for rounding, which differs between processes: it depends on where tensors lie in memory."""
    return torch.allclose(embeddings, expected, rtol=0, atol=1e-6)


def run(script, *words, environment, cwd):
    """Run a script in a process of its own; returns what it printed."""
    names = ("HF_", "TRANSFORMERS_", "PYTHONPATH")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(names)}
    finished = subprocess.run(
        [sys.executable, str(TESTS / script), *map(str, words)],
        env={**inherited, "OMP_NUM_THREADS": "1", **environment},
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    printed = finished.stdout + finished.stderr
    assert finished.returncode == 0, printed
    return printed


def add_hostile(hub, folder):
    """Repositories whose configuration or weights lead elsewhere."""
    good = hub.files("ann/retriever")
    config = json.loads(good["config.json"])

    def add(name, files):
        hub.repositories[f"eve/{name}"] = repository = Repository(private=False)
        repository.add_commit("main", {path: hub.keep(content) for path, content in files.items()})

    def with_backbone(backbone):
        return {**good, "config.json": json.dumps({**config, "backbone": backbone}).encode()}

    add("absolute", with_backbone(str(folder / "backbone")))
    add("relative", with_backbone("../backbone"))
    add("shadowed", with_backbone("some/folder"))
    add("nameless", with_backbone(None))
    (folder / "reader" / "some" / "folder").mkdir(parents=True)
    files = {path: content for path, content in good.items() if path != "model.safetensors"}
    add("pickled", {**files, "pytorch_model.bin": b"not even a pickle"})


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """All that happens, once: pushes, reads with the server, reads without it."""
    folder = tmp_path_factory.mktemp("hub")
    for name in ("owner", "reader"):
        (folder / name).mkdir()
    package = {"PYTHONPATH": str(TESTS.parents[1]), "HF_DATASETS_OFFLINE": "1"}
    with HubStandIn({"ann": TOKEN, "eve": "hf_eve"}) as hub:
        owner = {**hub.environment(folder / "owner_home"), **package, "MPLBACKEND": "Agg"}
        printed = run("hub_push.py", folder, TOKEN, environment=owner, cwd=folder / "owner")
        pushed = json.loads((folder / "pushed.json").read_text())
        hub.repositories["ann/retriever"].tags["v1"] = pushed["with_processor"]
        add_hostile(hub, folder)
        (folder / "card.md").write_bytes(hub.files("ann/run")["README.md"])
        (folder / "card_commit").write_text(hub.repositories["ann/run"].branches["main"])
        reader = hub.environment(folder / "reader_home")
        printed += run("hub_read.py", "online", folder, TOKEN, environment=reader, cwd=folder / "reader")
        num_requests = len(hub.requests)
    runs = {"local_files_only": reader, "hub_offline": {**reader, "HF_HUB_OFFLINE": "1"}}
    with ThreadPoolExecutor() as pool:
        jobs = [
            pool.submit(run, "hub_read.py", "offline", folder, name, environment=environment, cwd=folder / "reader")
            for name, environment in runs.items()
        ]
        printed += "".join(job.result() for job in jobs)
    assert len(hub.requests) == num_requests
    names = ("online", *runs)
    return SimpleNamespace(
        folder=folder,
        hub=hub,
        printed=printed,
        pushed=pushed,
        expected=load_file(folder / "expected.safetensors"),
        found={name: json.loads((folder / f"{name}.json").read_text()) for name in names},
        embeddings={name: load_file(folder / f"{name}.safetensors") for name in names},
    )


def test_only_what_is_tuned_is_pushed(story):
    files = story.hub.files("ann/retriever", story.pushed["second"])
    names = "backbones configuration loading modeling"
    code = [f"{name}_vptsp.py" for name in names.split()]
    own = ["README.md", "config.json", "model.safetensors", "preprocessor_config.json", *SENTENCE_TRANSFORMERS_FILES]
    assert set(files) - {".gitattributes"} == {*code, *own}
    weights = load(files["model.safetensors"])
    assert sorted(weights) == story.pushed["tuned_names"]
    size = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    assert size < len(files["model.safetensors"]) < size + 6000  # names and shapes
    backbone = story.hub.files("ann/backbone")["model.safetensors"]
    assert len(files["model.safetensors"]) < len(backbone) / 5
    whole = load(story.hub.files("ann/whole")["model.safetensors"])
    assert set(weights) < set(whole)
    assert set(load(story.hub.files("ann/private")["model.safetensors"])) == set(weights)


def test_backbone_is_pinned_to_the_commit_that_was_loaded(story):
    for commit in ("first", "second"):
        config = json.loads(story.hub.files("ann/retriever", story.pushed[commit])["config.json"])
        assert (config["backbone"], config["backbone_revision"]) == ("ann/backbone", story.pushed["backbone"])
    assert story.pushed["backbone_revision"] == [story.pushed["backbone"]] * 2
    assert story.hub.repositories["ann/backbone"].branches["main"] != story.pushed["backbone"]
    assert story.pushed["loads_itself"]


def test_retriever_on_a_local_backbone_is_refused_or_pushed_whole(story):
    error = story.pushed["local_error"]
    assert error.startswith(f"ValueError: the backbone is the local folder '{story.folder / 'backbone'}'")
    assert "save_backbone=True" in error
    assert "ann/local" not in story.hub.repositories
    config = json.loads(story.hub.files("ann/whole")["config.json"])
    assert (config["backbone"], config["save_backbone"]) == (None, True)
    assert same(story.embeddings["online"]["whole"], story.expected["whole"])


def test_no_permission_is_an_error(story):
    assert "403" in story.pushed["other_user_error"]


def test_readers_never_import_the_package(story):
    found = story.found["online"]
    assert "is not to be imported here" in found["package_error"]
    assert found["module"].startswith("transformers_modules.ann.retriever.")
    assert [found["vptsp_modules"] for found in story.found.values()] == [[], [], []]


@pytest.mark.parametrize("revision", ["first", "second", "tag", "cpu", "auto"])
def test_revisions_and_placements_give_the_pushed_embeddings(story, revision):
    expected = story.expected["first" if revision in ("first", "tag") else "second"]
    assert same(story.embeddings["online"][revision], expected)
    assert not torch.allclose(story.expected["first"], story.expected["second"], atol=0.1)


def test_half_precision(story):
    half = story.embeddings["online"]["half"]
    assert set(story.found["online"]["half"]) == {"torch.bfloat16"}
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, story.expected["second"], atol=0.04, rtol=0)
    assert not torch.equal(half, story.expected["second"])


def test_configuration_and_missing_revision(story):
    config = story.found["online"]["config"]
    assert (config["num_prompts"], config["embedding_dim"], config["format_version"]) == (5, 10, 1)
    assert "nowhere is not a valid git identifier" in story.found["online"]["revision_error"]


def test_pipeline_gives_the_embeddings(story):
    embeddings = story.embeddings["online"]
    torch.testing.assert_close(embeddings["pipeline"], embeddings["by_hand"], atol=1e-6, rtol=0)
    torch.testing.assert_close(embeddings["pipeline_pooled"], embeddings["by_hand"][1:], atol=1e-6, rtol=0)


def test_private_needs_the_token(story):
    assert "If this is a private repository, make sure to pass a token" in story.found["online"]["private_error"]
    assert same(story.embeddings["online"]["private"], story.expected["private"])


def test_cache_dir(story):
    assert "models--ann--private" in story.found["online"]["elsewhere"]
    assert not (story.folder / "reader_home" / "hub" / "models--ann--private" / "snapshots").exists()


@pytest.mark.parametrize("mode", ["local_files_only", "hub_offline"])
def test_offline_from_the_cache(story, mode):
    assert same(story.embeddings[mode]["second"], story.expected["second"])
    assert story.found[mode]["absent_error"].startswith("OSError")


def test_pickles_are_refused(story):
    error = story.found["online"]["pickled_error"]
    assert error.startswith("OSError: 'eve/pickled' holds no model.safetensors")
    assert "never from pickled files" in error


@pytest.mark.parametrize("name", ["absolute", "relative", "shadowed"])
def test_downloaded_configuration_can_not_point_at_local_folders(story, name):
    error = story.found["online"][f"{name}_error"]
    assert error.startswith("ValueError: backbone must be a Hub name in a retriever from the Hub")
    assert f"'eve/{name}'" in error


def test_the_reader_may_point_at_a_local_folder(story):
    assert same(story.embeddings["online"]["own_choice"], story.expected["second"])
    assert "give its place with backbone=" in story.found["online"]["nameless_error"]


def test_run_pushes_retriever_card_scores_and_picture_only(story):
    repository = story.hub.repositories["ann/run"]
    assert len(repository.commits) >= 3  # made, during training, at the end
    files = story.hub.files("ann/run")
    retriever = set(story.hub.files("ann/retriever"))
    assert set(files) == retriever | {"all_results.json", "pictures/neighbours.png"}
    for commit in repository.commits:
        assert set(story.hub.files("ann/run", commit)) <= set(files)
    assert same(story.embeddings["online"]["run"], story.expected["run"])
    assert f"pushed            {story.hub.endpoint}/ann/run/commit/{repository.branches['main']}" in story.printed
    assert {path.name for path in (story.folder / "run").iterdir()} >= {"README.md", "pictures"}


def test_card_of_a_run(story):
    files = story.hub.files("ann/run")
    card = ModelCard(files["README.md"].decode())
    results = json.loads(files["all_results.json"])
    assert card.data.pipeline_tag == "image-feature-extraction"
    assert (card.data.library_name, card.data.base_model) == ("transformers", "ann/backbone")
    scores = {result.metric_type: result.metric_value for result in card.data.eval_results}
    for metric in ("recall_at_1", "recall_at_8", "map_at_r", "map_at_r_published"):
        assert scores[metric] == pytest.approx(results[f"final_{metric}"], abs=1e-6)
        assert f"| {100 * results[f'frozen_{metric}']:.2f} | {100 * scores[metric]:.2f} |" in card.text
    assert f"{results['tuned_parameters']:,} of {results['retriever_parameters']:,} parameters" in card.text
    assert "](pictures/neighbours.png)" in card.text
    assert "--hub_token HIDDEN" in card.text
    assert str(story.folder / "images") in card.text  # the command as it was typed
    assert "| learning_rate | 0.0005 |" in card.text


def test_licence_of_the_backbone_is_passed_on(story):
    """It was given to the backbone's second version."""
    with_licence = ModelCard(story.hub.files("ann/run")["README.md"].decode()).data
    commit = story.hub.repositories["ann/backbone"].branches["main"]
    assert (with_licence.license, with_licence.license_name) == ("other", "birds-only")
    assert with_licence.license_link == f"https://huggingface.co/ann/backbone/blob/{commit}/LICENSE"
    card = ModelCard(story.hub.files("ann/retriever")["README.md"].decode())
    assert "license" not in card.data.to_dict()
    assert "its model card does not say" in card.text  # one that transformers wrote


def test_snippets_of_the_card_run(story):
    snippet = story.embeddings["online"]["snippet"]
    assert snippet.shape == (2, 10)
    torch.testing.assert_close(snippet.norm(dim=-1), torch.ones(2))
    torch.testing.assert_close(story.embeddings["online"]["snippet_pipeline"], snippet[0], atol=1e-6, rtol=0)


def test_sentence_transformers_reads_what_was_pushed(story):
    assert same(story.embeddings["online"]["snippet_encoder"], story.embeddings["online"]["snippet"])
    assert story.found["online"]["encoder"] == {"dimension": 10, "similarity": "cosine"}


def test_remote_code_can_push_what_it_loaded(story):
    again, first = story.hub.files("ann/again"), story.hub.files("ann/retriever")
    assert set(again) == set(first) - {"README.md", "preprocessor_config.json"}
    assert all(again[name] == first[name] for name in again if name.endswith(".py"))
    assert same(story.embeddings["online"]["again"], story.expected["second"])


def test_tokens_are_nowhere(story):
    assert TOKEN not in story.printed
    assert all(TOKEN.encode() not in content for content in story.hub.contents.values())
    for path in story.folder.rglob("*"):
        if path.is_file():
            assert TOKEN.encode() not in path.read_bytes(), path
