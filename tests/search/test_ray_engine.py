"""Embedding on a local Ray of two workers: the store of one process, whoever dies."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from data_fixtures import write_classes, write_files
from ray_runs import count_noted, noted_embedder
from storage_fixtures import s3_service, write_shards

from vptsp import DataError, Embedder, EmbeddingStore, ImageError, RayEngine, embed_to_store, folder_source
from vptsp.search.commands import main
from vptsp.search.ray_engine import EngineError


HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(
            "PYTHONPATH", os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
        )  # of the workers too
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield ray
    ray.shutdown()


@pytest.fixture
def photos(tmp_path):
    return write_classes(tmp_path / "photos", {"b": 6, "a": 9, "c/d": 3})


class World:
    """Photos, one of which can't be read, and what embeds them."""

    def __init__(self, root, photos, backbone):
        self.root, self.photos, self.backbone = root, photos, str(backbone)
        self.notes = root / "notes"
        self.notes.mkdir()
        write_files(photos, {"a/002.png": b"no image"})

    def embed(self, name, **options):
        embedder = Embedder.from_pretrained(self.backbone, batch_size=3, device="cpu")
        source = folder_source(self.photos)
        return embed_to_store(embedder, source, self.root / name, shard_size=4, progress=False, **options)


@pytest.fixture
def world(tmp_path, photos, backbone_folder):
    return World(tmp_path, photos, backbone_folder)


def assert_same(store, expected):
    assert store.ids == expected.ids
    assert store.class_names == expected.class_names
    assert store.contents == expected.contents
    assert store.columns == expected.columns
    assert torch.equal(store.embeddings, expected.embeddings)
    info, other = vars(store.info), vars(expected.info)
    assert {name: info[name] for name in info} == {name: other[name] for name in other}


@pytest.mark.slow
def test_shards_in_a_bucket_by_the_command(cluster, backbone_folder, tmp_path, monkeypatch, capsys):
    pytest.importorskip("moto")
    write_shards(tmp_path / "shards")
    with s3_service(monkeypatch) as upload:
        address = f"{upload(tmp_path / 'shards')}?endpoint_override={os.environ['AWS_ENDPOINT_URL']}"
        words = ["--model", backbone_folder, "--images", address, "--batch_size", 3, "--shard_size", 4]
        words += ["--embeddings_cache", tmp_path / "cache"]
        ray = ["--engine", "ray", "--engine_workers", 2]
        assert main([*map(str, ["embed", *words, "--output", tmp_path / "one"])]) == 0
        assert main([*map(str, ["embed", *words, *ray, "--output", tmp_path / "store"])]) == 0
        assert main([*map(str, ["index", *words, "--index", tmp_path / "index"])]) == 0
        assert main([*map(str, ["index", *words, *ray, "--index", tmp_path / "index"])]) == 0
    out = capsys.readouterr().out
    assert out.count("9 embeddings of width 24 in 3 files") == 2
    assert "0 added, 0 changed, 0 removed, 9 unchanged; 9 items" in out
    assert_same(EmbeddingStore.open(tmp_path / "store"), EmbeddingStore.open(tmp_path / "one"))


@pytest.mark.distributed
def test_what_is_written_stays_and_a_worker_that_dies_costs_nothing(cluster, world, tmp_path):
    """Two of five shards are there, an image can't be read, and the first worker that embeds ends."""
    expected = world.embed("one", skip_corrupt=True)
    assert expected.info.skipped == ["a/002.png"]
    for name in ("store.json", "shard-00000-of-00005.parquet", "shard-00003-of-00005.parquet"):
        write_files(tmp_path / "store", {name: (tmp_path / "one" / name).read_bytes()})
    record = json.loads((tmp_path / "store" / "store.json").read_text())
    (tmp_path / "store" / "store.json").write_text(json.dumps(record | {"complete": False, "files": None}))
    load = partial(noted_embedder, world.backbone, world.notes, dies=tmp_path / "died")
    store = world.embed("store", skip_corrupt=True, engine=RayEngine(load, workers=2))
    assert (tmp_path / "died").exists()
    assert_same(store, expected)
    assert sum(count_noted(world.notes).values()) <= 10 + 4  # what the worker that ended had in hand was done again


@pytest.mark.slow
def test_an_image_that_can_not_be_read_is_the_error_of_one_process(cluster, world):
    with pytest.raises(ImageError) as expected:
        world.embed("one")
    with pytest.raises(ImageError) as found:
        world.embed("store", engine=RayEngine(partial(noted_embedder, world.backbone, world.notes)))
    assert str(found.value) == str(expected.value)


@pytest.mark.slow
def test_another_model_on_a_worker_is_refused(cluster, world, retriever_folder):
    engine = RayEngine(partial(Embedder.from_pretrained, str(retriever_folder), device="cpu"), workers=1)
    with pytest.raises(DataError, match="a worker found another model under the name"):
        world.embed("store", engine=engine)


@pytest.mark.slow
def test_a_worker_that_always_dies_ends_the_command(cluster, world):
    with pytest.raises(EngineError, match="the same command goes on"):
        world.embed("store", engine=RayEngine(partial(os._exit, 1), workers=1))


@pytest.mark.slow
def test_a_killed_driver_goes_on(cluster, world, tmp_path):
    (world.photos / "a" / "002.png").unlink()
    places = {"backbone": world.backbone, "photos": world.photos, "output": tmp_path / "store", "notes": world.notes}
    arguments = json.dumps({**{name: str(path) for name, path in places.items()}, "delay": 0.5})
    command = [sys.executable, str(HERE / "ray_runs.py"), arguments]
    environment = os.environ | {"PYTHONPATH": str(HERE)}
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        while not (there := list((tmp_path / "store").glob("shard-*"))):
            assert process.poll() is None
            time.sleep(0.05)
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # Ray's own processes are of its session
        process.wait()
    times = {path: path.stat().st_mtime_ns for path in there}
    written = len(list((tmp_path / "store").glob("shard-*")))
    assert written < 5
    notes = tmp_path / "others"
    notes.mkdir()
    store = world.embed("store", engine=RayEngine(partial(noted_embedder, world.backbone, notes)))
    assert sum(count_noted(notes).values()) <= 17 - 4 * (written - 1) - 1
    assert {path: path.stat().st_mtime_ns for path in there} == times
    assert_same(store, world.embed("one"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--engine_workers", "2"], "--engine_workers goes with --engine ray"),
        (["--engine", "ray", "--device", "cpu"], "--device is for this process"),
        (["--engine", "ray", "--dtype", "auto"], "--dtype can't be auto"),
        (["--engine", "ray", "--engine_workers", "0"], "engine_workers must be >= 1, got 0"),
        (["--engine", "ray", "--engine_cpus", "0"], "engine_cpus must be >= 1"),
        (["--engine", "ray", "--engine_gpus", "nan"], "engine_gpus >= 0, got engine_cpus=1 and engine_gpus=nan"),
    ],
)
def test_options_that_do_not_fit(backbone_folder, photos, tmp_path, capsys, words, message):
    embed = ["embed", "--model", str(backbone_folder), "--images", str(photos), "--output", str(tmp_path / "store")]
    assert main([*embed, *words]) == 2
    assert message in capsys.readouterr().err


def test_the_engine_does_not_go_with_a_store_or_torchrun(tmp_path, monkeypatch, capsys):
    index = ["index", "--store", str(tmp_path / "store"), "--index", str(tmp_path / "index"), "--engine", "ray"]
    assert main(index) == 2
    assert "--engine goes with --model" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="run the command without torchrun"):
        RayEngine(print)


def test_without_ray_one_line_names_the_extra(backbone_folder, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    words = [
        "embed",
        "--model",
        backbone_folder,
        "--images",
        photos,
        "--output",
        tmp_path / "store",
        "--engine",
        "ray",
    ]
    assert main([*map(str, words)]) == 2
    assert "error: the engine ray needs Ray Data: pip install 'vptsp[ray]'" in capsys.readouterr().err
