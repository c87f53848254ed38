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
from vptsp.search import ray_engine
from vptsp.search.commands import main


HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    python_path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        runtime_env={"env_vars": {"PYTHONPATH": python_path}},
    )
    yield ray
    ray.shutdown()


@pytest.fixture
def photos(tmp_path):
    return write_classes(tmp_path / "photos", {"b": 6, "a": 9, "c/d": 3})


@pytest.fixture
def notes(tmp_path):
    (tmp_path / "notes").mkdir()
    return tmp_path / "notes"


@pytest.fixture
def one_process(backbone_folder, photos, tmp_path):
    embedder = Embedder.from_pretrained(backbone_folder, batch_size=3, device="cpu")
    return embed_to_store(embedder, folder_source(photos), tmp_path / "one", shard_size=4, progress=False)


def assert_same(store, expected):
    assert store.ids == expected.ids
    assert store.class_names == expected.class_names
    assert store.contents == expected.contents
    assert store.columns == expected.columns
    assert torch.equal(store.embeddings, expected.embeddings)
    info, other = vars(store.info), vars(expected.info)
    assert {name: info[name] for name in info} == {name: other[name] for name in other}


def test_the_command_writes_the_store_of_one_process(cluster, backbone_folder, photos, one_process, tmp_path, capsys):
    words = [
        "embed",
        "--model",
        backbone_folder,
        "--images",
        photos,
        "--output",
        tmp_path / "store",
        "--shard_size",
        4,
    ]
    words += ["--batch_size", 3, "--engine", "ray", "--engine_workers", 2]
    assert main([*map(str, words)]) == 0
    assert "18 embeddings of width 24 in 5 files" in capsys.readouterr().out
    assert_same(EmbeddingStore.open(tmp_path / "store"), one_process)


def test_a_worker_that_dies_costs_nothing(cluster, backbone_folder, photos, notes, one_process, tmp_path):
    load = partial(noted_embedder, backbone_folder, notes, dies=tmp_path / "died")
    expected = Embedder.from_pretrained(backbone_folder, batch_size=3, device="cpu")
    engine = RayEngine(load, workers=2)
    store = embed_to_store(
        expected, folder_source(photos), tmp_path / "store", shard_size=4, progress=False, engine=engine
    )
    assert (tmp_path / "died").exists()
    assert_same(store, one_process)


def test_what_is_written_is_not_embedded_again(cluster, backbone_folder, photos, notes, one_process, tmp_path):
    for name in ("store.json", "shard-00000-of-00005.parquet", "shard-00003-of-00005.parquet"):
        write_files(tmp_path / "store", {name: (tmp_path / "one" / name).read_bytes()})
    record = json.loads((tmp_path / "store" / "store.json").read_text())
    record |= {"complete": False, "files": None}
    (tmp_path / "store" / "store.json").write_text(json.dumps(record))
    load = partial(noted_embedder, backbone_folder, notes)
    embedder = Embedder.from_pretrained(backbone_folder, batch_size=3, device="cpu")
    store = embed_to_store(
        embedder, folder_source(photos), tmp_path / "store", shard_size=4, progress=False, engine=RayEngine(load)
    )
    assert sum(count_noted(notes).values()) == 18 - 8
    assert_same(store, one_process)


def test_images_that_can_not_be_read_are_treated_as_by_one_process(cluster, backbone_folder, photos, tmp_path):
    write_files(photos, {"a/002.png": b"no image"})
    embedder = Embedder.from_pretrained(backbone_folder, batch_size=3, device="cpu")
    load = partial(Embedder.from_pretrained, str(backbone_folder), batch_size=3, device="cpu")

    def embed(name, **options):
        return embed_to_store(
            embedder, folder_source(photos), tmp_path / name, shard_size=4, progress=False, **options
        )

    with pytest.raises(ImageError) as expected:
        embed("one")
    with pytest.raises(ImageError) as found:
        embed("ray", engine=RayEngine(load))
    assert str(found.value) == str(expected.value)
    expected, found = embed("one", skip_corrupt=True), embed("ray", skip_corrupt=True, engine=RayEngine(load))
    assert found.info.skipped == ["a/002.png"]
    assert_same(found, expected)


def test_another_model_on_a_worker_is_refused(cluster, backbone_folder, retriever_folder, photos, tmp_path):
    embedder = Embedder.from_pretrained(backbone_folder, device="cpu")
    engine = RayEngine(partial(Embedder.from_pretrained, str(retriever_folder), device="cpu"))
    with pytest.raises(DataError, match="a worker found another model under the name"):
        embed_to_store(embedder, folder_source(photos), tmp_path / "store", progress=False, engine=engine)


def test_a_worker_that_always_dies_ends_the_command(cluster, backbone_folder, photos, tmp_path):
    embedder = Embedder.from_pretrained(backbone_folder, device="cpu")
    with pytest.raises(ray_engine.EngineError, match="the same command goes on"):
        embed_to_store(
            embedder, folder_source(photos), tmp_path / "store", progress=False, engine=RayEngine(partial(os._exit, 1))
        )


def test_shards_in_a_bucket_to_an_index(cluster, backbone_folder, tmp_path, monkeypatch, capsys):
    pytest.importorskip("moto")
    write_shards(tmp_path / "shards")
    with s3_service(monkeypatch) as upload:
        address = f"{upload(tmp_path / 'shards')}?endpoint_override={os.environ['AWS_ENDPOINT_URL']}"
        for name in ("AWS_ENDPOINT_URL",):  # workers that run already have their own environment
            monkeypatch.delenv(name)
        words = ["--model", backbone_folder, "--images", address, "--batch_size", 3]
        ray = ["--engine", "ray", "--engine_workers", 2]
        assert main([*map(str, ["embed", *words, "--output", tmp_path / "one"])]) == 0
        assert main([*map(str, ["embed", *words, *ray, "--output", tmp_path / "store"])]) == 0
        assert_same(EmbeddingStore.open(tmp_path / "store"), EmbeddingStore.open(tmp_path / "one"))
        index = ["index", *words, *ray, "--index", tmp_path / "index", "--embeddings_cache", tmp_path / "cache"]
        assert main([*map(str, index)]) == 0
        assert main([*map(str, index)]) == 0
    assert "0 added, 0 changed, 0 removed, 9 unchanged; 9 items" in capsys.readouterr().out


def test_a_killed_driver_goes_on(cluster, backbone_folder, photos, notes, one_process, tmp_path):
    arguments = {"backbone": backbone_folder, "photos": photos, "output": tmp_path / "store", "notes": notes}
    arguments = json.dumps({**{name: str(path) for name, path in arguments.items()}, "delay": 0.3})
    environment = os.environ | {"PYTHONPATH": str(HERE)}
    command = [sys.executable, str(HERE / "ray_runs.py"), arguments]
    with subprocess.Popen(command, env=environment, start_new_session=True) as process:
        while not list((tmp_path / "store").glob("shard-*")):
            assert process.poll() is None
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
    written = len(list((tmp_path / "store").glob("shard-*")))
    assert written < 5
    before = sum(count_noted(notes).values())
    load = partial(noted_embedder, backbone_folder, notes)
    embedder = Embedder.from_pretrained(backbone_folder, batch_size=3, device="cpu")
    store = embed_to_store(
        embedder, folder_source(photos), tmp_path / "store", shard_size=4, progress=False, engine=RayEngine(load)
    )
    assert sum(count_noted(notes).values()) - before <= 18 - 4 * (written - 1)
    assert_same(store, one_process)


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


def test_the_engine_does_not_go_with_a_store_or_torchrun(one_process, tmp_path, monkeypatch, capsys):
    index = ["index", "--store", str(one_process.folder), "--index", str(tmp_path / "index"), "--engine", "ray"]
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
