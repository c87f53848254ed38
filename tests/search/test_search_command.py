"""`vptsp index` and `vptsp search`: a catalogue from the command line."""

import json
import multiprocessing
import shutil

import pytest
from data_fixtures import write_classes, write_image

from vptsp import Embedder, RetrievalIndex, embed_to_store, folder_source, open_index
from vptsp.data_scripts import images
from vptsp.search.commands import main
from vptsp.search.embedder import Embedder as EmbedderClass
from vptsp.search.worker_counts import FEW_IMAGES, choose_workers


@pytest.fixture(scope="module")
def retriever(retriever_folder):
    return retriever_folder


@pytest.fixture
def photos(tmp_path):
    return write_classes(tmp_path / "photos", {"mug": 4, "Cup": 3, "glass": 2})


@pytest.fixture
def catalogue(retriever, photos, tmp_path):
    """An index with prices, 0, 10, 20, ... in the order of the ids."""
    embedder = Embedder.from_pretrained(retriever)
    files = sorted(photos.rglob("*.png"))
    metadata = {
        "class_name": [file.parent.name for file in files],
        "price": [10 * row for row in range(len(files))],
        "sku": [None if row == 2 else f"00{row}" for row in range(len(files))],
    }
    ids = [file.relative_to(photos).as_posix() for file in files]
    index = RetrievalIndex.build(
        ids, embedder.embed_images(files), metadata, model=embedder.description(), image_root=photos
    )
    index.save(tmp_path / "catalogue")
    return tmp_path / "catalogue"


def run(capsys, *words):
    """Exit status, output and errors."""
    status = main([str(word) for word in words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def results(capsys, *words):
    status, out, err = run(capsys, "search", *words, "--json")
    assert status == 0, err
    return json.loads(out)


def test_one_photo_among_many_is_all_that_is_embedded(retriever, tmp_path, capsys, monkeypatch):
    photos, counts = write_classes(tmp_path / "photos", {"a": 8, "b": 7}), []
    embed = EmbedderClass.embed_pixels
    monkeypatch.setattr(EmbedderClass, "embed_pixels", lambda self, p: (counts.append(len(p)), embed(self, p))[1])
    words = [
        "index",
        "--images",
        photos,
        "--index",
        tmp_path / "index",
        "--embeddings_cache",
        tmp_path / "c",
        "--quiet",
    ]
    status, out, _ = run(capsys, *words, "--model", retriever)
    assert (status, sum(counts)) == (0, 15)
    assert out.startswith(f"{tmp_path / 'index'}: 15 items, Flat (")
    write_image(photos / "c" / "new.png", seed=77)
    status, out, _ = run(capsys, *words)  # it says itself which model it is of
    assert (status, sum(counts)) == (0, 16)
    assert out == f"{tmp_path / 'index'}: 1 added, 0 changed, 0 removed, 15 unchanged; 16 items\n"


def test_files_folders_and_lists_are_queries(catalogue, photos, tmp_path, capsys):
    (tmp_path / "queries.txt").write_text("photos/mug/001.png\nphotos/glass/000.png\n")
    expected = {str(photos / "Cup" / "000.png"), *(str(file) for file in (photos / "mug").iterdir())}
    expected.add(str(photos / "glass" / "000.png"))
    places = [photos / "Cup" / "000.png", photos / "mug", tmp_path / "queries.txt"]
    found = results(capsys, "--index", catalogue, "--image", *places, "--k", 1)
    assert set(found) == expected
    for query, (hit,) in found.items():
        assert hit["path"] == query
        assert hit["similarity"] == pytest.approx(1, abs=1e-5)
    status, _, err = run(capsys, "search", "--index", catalogue, "--image", tmp_path / "catalogue")
    assert (status, err.strip()) == (
        2,
        f"error: {tmp_path / 'catalogue'} is an index of embeddings (it holds index.json), whose pictures would be "
        "taken for data: give the images' own folder",
    )


def test_json_holds_all_columns_and_absolute_paths(catalogue, photos, capsys):
    (hit,) = results(capsys, "--index", catalogue, "--image", photos / "mug" / "003.png", "--k", 1).popitem()[1]
    similarity = hit.pop("similarity")
    assert similarity == pytest.approx(1, abs=1e-5)
    path = str(photos / "mug" / "003.png")
    assert hit == {"id": "mug/003.png", "path": path, "class_name": "mug", "price": 80, "sku": "008"}


def test_a_bad_file_is_named_and_the_others_go_on(catalogue, photos, tmp_path, capsys):
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    good = photos / "mug" / "000.png"
    status, out, err = run(
        capsys,
        "search",
        "--index",
        catalogue,
        "--image",
        tmp_path / "bad.jpg",
        good,
        tmp_path / "absent.png",
        "--k",
        1,
    )
    assert status == 1
    assert out.splitlines() == [str(good), "   1.0000  mug/000.png  mug 50 005"]
    lines = err.splitlines()
    assert lines[0].startswith(f"error: {tmp_path / 'bad.jpg'}: can't read this image")
    assert lines[1] == f"error: {tmp_path / 'absent.png'}: there is no such file"
    assert lines[2] == "error: 2 of 3 images can't be read, the others are above"
    status, out, _ = run(capsys, "search", "--index", catalogue, "--image", tmp_path / "bad.jpg")
    assert (status, out) == (1, "")


def test_filters_groups_and_thresholds(catalogue, photos, capsys):
    base = ["--index", catalogue, "--id", "mug/000.png", "--k", 20]
    found = results(capsys, *base, "--where", "CLASS_NAME=MUG", "--where", "price<70")["mug/000.png"]
    assert {hit["id"] for hit in found} == {"mug/001.png"}
    found = results(capsys, *base, "--where", "class_name=mug", "class_name=cup")["mug/000.png"]
    assert {hit["class_name"] for hit in found} == {"mug", "Cup"}
    found = results(capsys, *base, "--group_by", "class_name")["mug/000.png"]
    assert sorted(hit["class_name"] for hit in found) == ["Cup", "glass", "mug"]
    everything = results(capsys, *base)["mug/000.png"]
    for hit in found:
        assert hit == next(other for other in everything if other["class_name"] == hit["class_name"])
    middle = everything[3]["similarity"]
    found = results(capsys, *base, "--min_similarity", middle - 1e-9)["mug/000.png"]
    assert found == [hit for hit in everything if hit["similarity"] >= middle - 1e-9]
    status, out, _ = run(capsys, "search", *base, "--where", "price>1000")
    assert (status, out) == (0, "mug/000.png\n  nothing found\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--k", "0"], "--k must be >= 1, got 0"),
        (["--k", "-1"], "--k must be >= 1, got -1"),
        (["--min_similarity", "1.5"], "--min_similarity must be in [-1, 1], got 1.5"),
        (["--where", "class_name=mgu"], "where: no item has class_name 'mgu'; did you mean 'mug'?"),
        (["--where", "class_nam=mug"], "there is no column 'class_nam'; the columns are"),
        (["--where", "price<cheap"], "price holds numbers, got 'cheap'"),
        (["--where", "sku<4"], "sku holds texts, which only = and != compare"),
        (["--group_by", "classname"], "there is no column 'classname'; the columns are"),
        (["--id", "mug/9.png"], "1 ids are not in the index: 'mug/9.png'; did you mean 'mug/00"),
        (["--id", "Mug/000.PNG"], "1 ids are not in the index: 'Mug/000.PNG'; did you mean 'mug/000.png'"),
        (["--where", "price=33"], "where: no item has price 33; did you mean 30 or 40?"),
        (["--where", "price!=-3"], "where: no item has price -3; did you mean 0?"),
        (["--where", "sku=7"], "where: no item has sku '7'; did you mean '007'?"),
        (["--where", "class_name=zzz"], "where: no item has class_name 'zzz'; there are 'Cup', 'glass', 'mug'"),
    ],
)
def test_what_cannot_be_asked(catalogue, capsys, words, message):
    words = words if "--id" in words else ["--id", "mug/000.png", *words]
    status, out, err = run(capsys, "search", "--index", catalogue, *words)
    assert (status, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1


def test_options_of_models_that_are_not_loaded(retriever, backbone_folder, catalogue, tmp_path, capsys):
    """Nothing is passed over: each is refused where it could only be ignored."""
    out, item = ["--output", tmp_path / "out"], ["--index", catalogue, "--id", "mug/000.png"]
    for words, message in [
        (
            ["search", *item, "--model", retriever],
            "--model goes with --image; items of the index",
        ),
        (["search", *item, "--backbone", backbone_folder], "--backbone goes with --image"),
        (["index", "--index", catalogue, "--remove", "a", "--backbone", "b"], "--backbone goes with images"),
        (["evaluate", "--store", "s", "--backbone", "b", *out], "--backbone goes with --model; a store has its"),
        (["evaluate", "--store", "s", "--resize_size", 20, *out], "--resize_size goes with --model"),
        (["index", "--store", "s", "--revision", "main", "--index", tmp_path / "i"], "--revision goes with --model"),
        (["compare", backbone_folder, backbone_folder, "--backbone", "b", *out], "--backbone is for a retriever, and"),
        (["compare", retriever, retriever, "--resize_size", 20, *out], "--resize_size is for a bare backbone, and"),
        (["compare", retriever, f"{retriever}s", *out], f"model: there is no folder {retriever}s; did you mean"),
    ]:
        status, _, err = run(capsys, *words)
        assert status == 2
        assert message in err
    assert not (tmp_path / "out").exists()


def test_removing_by_id_class_and_filter(catalogue, capsys):
    for words, removed, left in [
        (["mug/000.png", "Cup/000.png"], 2, 7),
        (["--where", "class_name=glass"], 2, 5),
        (["--where", "price>=70", "class_name=MUG"], 2, 3),
    ]:
        status, out, _ = run(capsys, "index", "--index", catalogue, "--remove", *words)
        assert (status, out) == (0, f"{catalogue}: removed {removed}, {left} items\n")
    assert open_index(catalogue).ids == ["Cup/001.png", "Cup/002.png", "mug/001.png"]
    for words, message in [
        ([], "--remove takes either ids or --where (which items), got neither"),
        (["a", "--where", "class_name=mug"], "got both"),
        (["--where", "class_name=glass"], "no item has class_name 'glass'"),
        (["--where", "sku=00"], "no item has sku '00'"),
        (["a", "--images", "photos"], "--remove goes without --images"),
        (["a", "--replace"], "--remove goes without --model, --store and --add or --replace"),
    ]:
        status, _, err = run(capsys, "index", "--index", catalogue, "--remove", *words)
        assert status == 2
        assert message in err
    assert len(open_index(catalogue)) == 3


def test_replacing_and_options_of_new_indexes(retriever, photos, tmp_path, capsys):
    place, cache = tmp_path / "index", ["--embeddings_cache", tmp_path / "c", "--quiet"]
    words = ["index", "--index", place, "--model", retriever, *cache]
    assert run(capsys, *words, "--images", photos)[0] == 0
    other = write_classes(tmp_path / "other", {"x": 2})
    status, _, err = run(capsys, *words, "--images", other, "--factory", "HNSW8")
    assert (status, err.strip()) == (
        2,
        f"error: {place} holds an index, which stays of its kind: --factory goes with --replace",
    )
    status, out, _ = run(capsys, *words, "--images", other, "--factory", "HNSW8", "--replace")
    assert (status, open_index(place).ids) == (0, ["x/000.png", "x/001.png"])
    assert out.startswith(f"{place}: 2 items, HNSW8 (as asked for)")
    for extra, message in [
        (["--add", "--replace"], "give either --add or --replace, got both"),
        (["--where", "class_name=x"], "--where goes with --remove"),
    ]:
        status, _, err = run(capsys, *words, "--images", other, *extra)
        assert status == 2
        assert message in err


def test_every_command_takes_the_place_of_the_backbone(retriever, backbone_folder, photos, tmp_path, capsys):
    moved, backbone = tmp_path / "deep" / "er" / "retriever", tmp_path / "backbone"
    shutil.copytree(retriever, moved)
    shutil.copytree(backbone_folder, backbone)
    where = ["--model", moved, "--backbone", backbone]
    common = ["--images", photos, "--quiet"]
    cached = [*common, "--embeddings_cache", tmp_path / "c"]
    status, _, err = run(capsys, "embed", "--model", moved, *common, "--output", tmp_path / "store")
    assert status == 2
    assert "Give its place with backbone=" in err
    assert run(capsys, "embed", *where, *common, "--output", tmp_path / "store")[0] == 0
    evaluate = ["--output", tmp_path / "scores", "--no_clustering", "--no_geometry"]
    assert run(capsys, "evaluate", *where, *cached, *evaluate)[0] == 0
    assert run(capsys, "index", *where, *cached, "--index", tmp_path / "index")[0] == 0
    query = ["--index", tmp_path / "index", "--image", photos / "mug" / "000.png"]
    assert run(capsys, "search", *query, "--backbone", backbone)[0] == 0
    compare = [moved, backbone, "--backbone", backbone, "--output", tmp_path / "compared", *cached]
    assert run(capsys, "compare", *compare, "--resize_size", 18)[0] == 0


def test_workers_are_chosen_by_cpus_and_said(capsys, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(6)), raising=False)
    assert [choose_workers(n) for n in (1, FEW_IMAGES - 1, FEW_IMAGES, 10**6)] == [0, 0, 5, 5]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert choose_workers(1000) == 1
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(64)), raising=False)
    assert choose_workers(1000) == 8
    for command in ("embed", "index"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert "default: one less than the CPUs, at most 8" in " ".join(capsys.readouterr().out.split())


def test_stores_are_decoded_for_while_the_model_runs(retriever, tmp_path, monkeypatch):
    """The model, at its first batch, waits for another process to decode an image of the second."""
    files = write_classes(tmp_path / "photos", {"a": 6})
    embedder, decoded = Embedder.from_pretrained(retriever, batch_size=2), multiprocessing.get_context("fork").Event()
    embed, open_file = embedder.embed_pixels, images.open_header

    def noticing(stream, *options):
        if str(stream).endswith("003.png"):
            decoded.set()
        return open_file(stream, *options)

    def waiting(pixel_values):
        assert decoded.wait(60)
        return embed(pixel_values)

    monkeypatch.setattr(images, "open_header", noticing)
    monkeypatch.setattr(embedder, "embed_pixels", waiting)
    store = embed_to_store(embedder, folder_source(files), tmp_path / "store", num_workers=1, progress=False)
    assert len(store) == 6


def test_workers_write_the_same_store(retriever, tmp_path, capsys):
    photos = write_classes(tmp_path / "photos", {"a": FEW_IMAGES})
    words = ["embed", "--model", retriever, "--images", photos, "--quiet", "--batch_size", 16]
    assert run(capsys, *words, "--output", tmp_path / "chosen")[0] == 0
    assert run(capsys, *words, "--output", tmp_path / "one", "--num_workers", 0)[0] == 0
    shards = [(tmp_path / name / "shard-00000-of-00001.parquet").read_bytes() for name in ("chosen", "one")]
    assert shards[0] == shards[1]
