"""`vptsp`: what the commands write, print and refuse."""

import dataclasses
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_vit_config
from data_fixtures import write_classes
from safetensors.torch import load_file, save_file
from transformers import ViTModel

from vptsp import (
    EmbeddingStore,
    EvalTransform,
    ImageDataset,
    QueryExpansion,
    Reranking,
    RetrievalIndex,
    VPTSPModel,
    embedding_metrics,
    load_splits,
    retrieval_metrics,
)
from vptsp.search.commands import _parser, main
from vptsp.search.index_files import index_lock


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_classes(tmp_path_factory.mktemp("data") / "photos", {"a": 4, "b": 5, "c": 4, "d": 3})


@pytest.fixture(scope="module")
def retriever(retriever_folder):
    return retriever_folder


@pytest.fixture(scope="module")
def store(retriever, photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores") / "store"
    assert run("embed", model=retriever, images=photos, output=folder) == 0
    return folder


def words(command, *positional, **options):
    result = [command, *map(str, positional)]
    for name, value in options.items():
        result.append(f"--{name}")
        result += [] if value is True else map(str, value) if isinstance(value, list) else [str(value)]
    return [*result, "--quiet"] if command != "search" else result


def run(command, *positional, **options):
    return main(words(command, *positional, **options))


def refused(capsys, command, *positional, **options):
    """The line that a refused command prints."""
    assert run(command, *positional, **options) == 2
    return capsys.readouterr().err.strip()


def test_embed_goes_on_and_says_what_is_there(retriever, photos, store, capsys):
    assert run("embed", model=retriever, images=photos, output=store) == 0
    printed = capsys.readouterr().out
    assert printed == f"{store}: 16 embeddings of width 8 in 1 files, images in {photos}\n"


def test_evaluate_a_store(store, tmp_path, capsys):
    assert run("evaluate", store=store, output=tmp_path, recall_at=[1, 3], confidence=0.9) == 0
    report = json.loads((tmp_path / "metrics.json").read_text())
    opened = EmbeddingStore.open(store)
    expected = embedding_metrics(opened.embeddings, opened.labels, recall_at=(1, 3), confidence=0.9, seed=42)
    assert report["metrics"] == pytest.approx(expected)
    assert report["model"]["kind"] == "retriever"
    assert report["data"]["queries"]["images"] == 16
    table = (tmp_path / "metrics.md").read_text()
    low, value, high = (f"{100 * expected[f'recall_at_3{end}']:.2f}" for end in ("_low", "", "_high"))
    assert f"| recall_at_3 | {value} | {low} to {high} | share of queries with an item of their class" in table
    assert table == capsys.readouterr().out


def test_evaluate_a_split_equals_what_training_computes(retriever, photos, tmp_path):
    """The retriever on the split `test`, from pixels that training's transform made."""
    data = {"data_dir": photos, "class_split": "alternate", "data_cache_dir": tmp_path / "tables"}
    # as in train.py, a place alone is class folders
    options = {"embeddings_cache": tmp_path / "cache", "output": tmp_path / "scores", **data}
    assert run("evaluate", model=retriever, no_clustering=True, no_geometry=True, map_at=[], **options) == 0
    report = json.loads((tmp_path / "scores" / "metrics.json").read_text())

    test = ImageDataset(
        load_splits("folder", photos, tmp_path / "tables", class_split="alternate")["test"], EvalTransform(18, 16)
    )
    pixels = torch.stack([test[row]["pixel_values"] for row in range(len(test))])
    with torch.no_grad():
        embeddings = VPTSPModel.from_pretrained(retriever)((pixels / 255 - 0.5) / 0.5).embeddings
    assert report["metrics"] == pytest.approx(retrieval_metrics(embeddings, torch.tensor(test.labels)))
    assert report["data"]["queries"]["description"] == f"test of folder in {photos}"
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_queries_against_a_gallery(retriever, tmp_path):
    root = tmp_path / "photos"
    write_classes(root / "train", {"x": 2, "y": 2})
    write_classes(root / "query", {"a": 2, "c": 1})
    write_classes(root / "gallery", {"z": 1, "y": 1, "a": 2, "b": 3, "c": 2})  # classes decide the pixels
    shutil.rmtree(root / "gallery" / "y")
    shutil.rmtree(root / "gallery" / "z")
    data = {"dataset_name": "folder", "data_dir": root, "data_cache_dir": tmp_path / "tables"}
    options = {**data, "embeddings_cache": tmp_path / "cache", "no_clustering": True, "no_geometry": True}
    assert run("evaluate", model=retriever, output=tmp_path / "a", recall_at=[2], map_at=[], **options) == 0
    report = json.loads((tmp_path / "a" / "metrics.json").read_text())

    for split in ("query", "gallery"):
        assert run("embed", model=retriever, split=split, output=tmp_path / split, **data) == 0
    query, gallery = EmbeddingStore.open(tmp_path / "query"), EmbeddingStore.open(tmp_path / "gallery")
    hits = [
        query.class_names[q]
        in {gallery.class_names[g] for g in (query.embeddings[q] @ gallery.embeddings.T).topk(2)[1]}
        for q in range(3)
    ]
    assert report["metrics"]["recall_at_2"] == pytest.approx(sum(hits) / 3)
    assert {name: side["images"] for name, side in report["data"].items()} == {"queries": 3, "gallery": 7}
    stores = {"store": tmp_path / "query", "gallery_store": tmp_path / "gallery"}
    assert run("evaluate", output=tmp_path / "b", recall_at=[2], map_at=[], **stores, no_clustering=True,
               no_geometry=True) == 0  # fmt: skip
    assert json.loads((tmp_path / "b" / "metrics.json").read_text())["metrics"] == report["metrics"]


def test_a_backbone_is_compared_at_the_size_of_the_retriever(retriever, photos, tmp_path, capsys):
    """Unless another is asked for; either way the sizes are said."""
    backbone = tmp_path / "backbone"
    ViTModel(tiny_vit_config(image_size=32)).save_pretrained(backbone)
    how = {"images": photos, "embeddings_cache": tmp_path / "cache", "output": tmp_path / "out"}
    for option, size in (({}, 16), ({"image_size": 24}, 24)):
        assert run("compare", retriever, backbone, **how, **option) == 0
        err = capsys.readouterr().err
        assert f"{retriever}: images of 16 pixels" in err and f"{backbone}: images of {size} pixels" in err


def test_compare_a_store_with_a_backbone(store, photos, backbone_folder, tmp_path, capsys):
    cache = {"images": photos, "embeddings_cache": tmp_path / "cache"}
    assert run("compare", store, backbone_folder, output=tmp_path / "out", resize_size=18, recall_at=[1], **cache) == 0
    report = json.loads((tmp_path / "out" / "comparison.json").read_text())
    (folder,) = (tmp_path / "cache").iterdir()
    means = []
    for side in (store, folder):
        opened = EmbeddingStore.open(side)
        means.append(retrieval_metrics(opened.embeddings, opened.labels)["recall_at_1"])
    comparison = report["comparison"]["recall_at_1"]
    assert [comparison["first_mean"], comparison["second_mean"]] == pytest.approx(means)
    assert comparison["num_clusters"] == 4
    assert "| recall_at_1 |" in capsys.readouterr().out


def test_compare_reranked_results(store, photos, backbone_folder, tmp_path):
    options = {"images": photos, "embeddings_cache": tmp_path / "cache", "resize_size": 18, "recall_at": [1]}
    order = {"rerank": ["depth=8", "k1=4", "k2=2"], "expand": ["neighbours=2"]}
    assert run("compare", store, backbone_folder, output=tmp_path / "out", **options, **order) == 0
    report = json.loads((tmp_path / "out" / "comparison.json").read_text())
    (folder,) = (tmp_path / "cache").iterdir()
    ways = {"rerank": Reranking(depth=8, k1=4, k2=2), "expand": QueryExpansion(neighbours=2)}
    assert report["search"] == {name: dataclasses.asdict(way) for name, way in ways.items()}
    for side, mean in (("first", store), ("second", folder)):
        opened = EmbeddingStore.open(mean)
        expected = retrieval_metrics(opened.embeddings, opened.labels, **ways)["map_at_r"]
        assert report["comparison"]["map_at_r"][f"{side}_mean"] == pytest.approx(expected)


def test_index_add_remove_search(store, retriever, photos, tmp_path, capsys):
    place = tmp_path / "index"
    assert run("index", store=store, index=place) == 0
    assert "16 items, Flat (16 items, no more than 50,000: exact search is fast enough)" in capsys.readouterr().out
    assert run("index", store=store, index=place) == 0
    assert f"{place}: 0 added, 0 changed, 0 removed, 16 unchanged; 16 items" in capsys.readouterr().out

    assert run("index", index=place, remove=["a/000.png", "b/001.png"]) == 0
    assert "removed 2, 14 items" in capsys.readouterr().out
    assert run("index", index=place, model=retriever, images=photos, embeddings_cache=tmp_path / "c", add=True) == 0
    assert "2 added, 0 changed, 0 removed, 14 unchanged; 16 items" in capsys.readouterr().out

    assert run("search", index=place, image=[photos / "a" / "000.png"], id=["b/001.png"], k=3, json=True) == 0
    results = json.loads(capsys.readouterr().out)
    by_id, by_image = results["b/001.png"], results[str(photos / "a" / "000.png")]
    assert (by_image[0]["id"], by_image[0]["class_name"]) == ("a/000.png", "a")
    assert by_image[0]["similarity"] == pytest.approx(1, abs=1e-5)
    assert "b/001.png" not in [item["id"] for item in by_id]
    expected = RetrievalIndex.open(place).search_ids(["b/001.png"], 3)[0]
    assert [item["id"] for item in by_id] == [hit.id for hit in expected]

    options = {"index": place, "id": ["b/001.png"], "where": ["class_name=a", "class_name=c"], "containing": "/003"}
    assert run("search", **options, mmap=True) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "b/001.png"
    assert sorted(line.split()[1] for line in lines[1:]) == ["a/003.png", "c/003.png"]


def test_approximate_index_prints_its_recall(store, tmp_path, capsys):
    assert run("index", store=store, index=tmp_path / "index", factory="IVF2,Flat", target_recall=1) == 0
    assert "recall@10 against exact search 1.000 with nprobe 2" in capsys.readouterr().out


def test_removed_items_are_counted_once(store, tmp_path, capsys):
    assert run("index", store=store, index=tmp_path / "index") == 0
    assert run("index", index=tmp_path / "index", remove=["a/000.png", "a/000.png"]) == 0
    assert "removed 1, 15 items" in capsys.readouterr().out


def test_a_second_command_is_told_that_the_index_is_in_use(store, tmp_path, capsys):
    place = tmp_path / "index"
    assert run("index", store=store, index=place) == 0
    assert run("index", index=place, remove=["a/000.png"]) == 0
    with index_lock(place, 0):
        for change in ({"store": store, "add": True}, {"remove": ["a/001.png"]}):
            line = refused(capsys, "index", index=place, lock_timeout=0.1, **change)
            assert line == (
                f"error: the index {place} is in use by another process, also after 0.1 seconds "
                f"(lock file {place / '.lock'})"
            )
        assert run("search", index=place, id=["a/001.png"]) == 0
    assert len(RetrievalIndex.open(place)) == 15


def test_a_damaged_store_or_index_ends_the_command(store, tmp_path, capsys):
    copy, place = tmp_path / "store", tmp_path / "index"
    shutil.copytree(store, copy)
    assert run("index", store=copy, index=place) == 0
    shard = copy / "shard-00000-of-00001.parquet"
    content = bytearray(shard.read_bytes())
    content[500] ^= 1
    shard.write_bytes(content)
    assert "another content than was written" in refused(capsys, "evaluate", store=copy, output=tmp_path / "out")
    shard.unlink()
    for command in ({"command": "evaluate", "output": tmp_path / "out"}, {"command": "index", "index": place}):
        assert "lacks shard-00000-of-00001.parquet" in refused(capsys, store=copy, **command)
    vectors = place / "index-000000.faiss"
    content = bytearray(vectors.read_bytes())
    content[-1] ^= 1
    vectors.write_bytes(content)
    for options in ({}, {"mmap": True}):
        line = refused(capsys, "search", index=place, id=["a/000.png"], **options)
        assert "index-000000.faiss has another content than was written" in line
    assert run("search", index=place, id=["a/000.png"], mmap=True, no_verify=True) == 0


def test_another_models_index_is_refused(store, backbone_folder, photos, tmp_path, capsys):
    run("index", store=store, index=tmp_path / "index")
    search = {"index": tmp_path / "index", "image": [photos / "a" / "000.png"], "model": backbone_folder}
    assert "the index holds embeddings of another model" in refused(capsys, "search", **search)
    add = {"index": tmp_path / "index", "images": photos, "embeddings_cache": tmp_path / "c", "add": True}
    assert "the index holds embeddings of another model" in refused(capsys, "index", model=backbone_folder, **add)


def test_changed_retriever_is_embedded_anew(retriever, photos, tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in retriever.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    # the copy names its backbone relative to where the original lies
    config = json.loads((retriever / "config.json").read_text())
    config["backbone"] = str((retriever / config["backbone"]).resolve())
    (folder / "config.json").write_text(json.dumps(config))
    options = {"images": photos, "embeddings_cache": tmp_path / "cache", "index": tmp_path / "index"}
    assert run("index", model=folder, **options) == 0
    weights = load_file(folder / "model.safetensors")
    weights["prompts.tokens"][0, 0] += 0.5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert run("index", model=folder, **{**options, "index": tmp_path / "other"}) == 0
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_what_does_not_fit_is_refused(store, retriever, photos, tmp_path, capsys):
    embed, evaluate = ({"command": name, "output": tmp_path / "out"} for name in ("embed", "evaluate"))
    index, search = {"command": "index", "index": tmp_path}, {"command": "search", "index": tmp_path}
    for message, options in [
        (
            "give either --images (a folder, a list or a table) or --dataset_name or --data_dir, got neither",
            {**embed, "model": retriever},
        ),
        ("give either --model (and images) or --store, got neither", evaluate),
        ("give either --model (and images) or --store, got both", {**evaluate, "model": "m", "store": store}),
        ("model: there is no folder ./absent", {**embed, "model": "./absent", "images": photos}),
        ("there is no folder", {**embed, "model": retriever, "images": tmp_path / "absent"}),
        ("unknown dataset_name 'foldr'; did you mean", {**embed, "model": retriever, "dataset_name": "foldr"}),
        ("data_dir is missing", {**evaluate, "model": retriever, "dataset_name": "cub"}),
        ("give either --model (and images) or --store, got neither", index),
        ("--images and the options of data sets go with --model", {**index, "store": store, "images": photos}),
        ("--gallery_store goes with --store", {**evaluate, "model": retriever, "gallery_store": store}),
        ("--remove goes without --model, --store and --add", {**index, "remove": ["a"], "add": True}),
        ("--factory is for faiss", {**index, "index": "a.db", "store": store, "factory": "Flat"}),
        ("--mmap, --gpu and --no_verify are for faiss", {**search, "index": "a.db", "id": ["a"], "gpu": True}),
        ("is no index: it has no index.json", {**search, "id": ["a"]}),
        ("give --image or --id, got neither", search),
        ("where must be COLUMN=VALUE, got 'a'", {**search, "id": ["a"], "where": ["a"]}),
    ]:
        line = refused(capsys, **options)
        assert line.startswith("error: ")
        assert message in line
    assert not (tmp_path / "out").exists()


def test_images_without_classes_have_no_scores(retriever, photos, tmp_path, capsys):
    (tmp_path / "flat").mkdir()
    for i in range(3):
        (tmp_path / "flat" / f"{i}.png").write_bytes((photos / "a" / f"00{i}.png").read_bytes())
    options = {"images": tmp_path / "flat", "embeddings_cache": tmp_path / "cache", "output": tmp_path / "out"}
    assert "scores need the class of every image, 3 of 3 have none" in refused(
        capsys, "evaluate", model=retriever, **options
    )


def test_help_is_quick_and_imports_nothing_heavy():
    code = (
        "import sys; from vptsp.search.commands import _parser; _parser();"
        "sys.exit(str([m for m in ('torch', 'transformers', 'datasets', 'faiss') if m in sys.modules] or 0))"
    )
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert outcome.stderr.strip() == "0"


def test_documented_commands_exist():
    text = (Path(__file__).resolve().parents[2] / "docs" / "search.md").read_text(encoding="utf-8")
    commands = re.findall(
        r"^ +vptsp ((?:embed|evaluate|compare|index|search) .*)$", text.replace("\\\n", " "), re.MULTILINE
    )
    commands = [shlex.split(command) for command in commands if "--help" not in command]
    assert len(commands) >= 9
    for words in commands:
        _parser().parse_args(words)


def test_an_unknown_option_says_the_nearest(capsys):
    """Of the command that it was given to."""
    for words, message in (
        (["embed", "--model", "m", "--output", "o", "--imges=photos"], "--imges=photos; did you mean 'images'?"),
        (["search", "--index", "i", "--imges", "photo"], "--imges photo; did you mean 'image'?"),
        (["search", "--index", "i", "stray"], "unrecognized arguments: stray (--help"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(words)
        assert message in capsys.readouterr().err
