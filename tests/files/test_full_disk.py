"""Disks that are full: the file is named, nothing is left half written, and no process is ended by a signal."""

import subprocess
import sys
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch

from vptsp import RetrievalIndex, VPTSPModel
from vptsp.files.atomic import write_json, write_text


# Runs `code` where no file may grow beyond so many bytes, which a program sees as a full disk.
LIMITED = """
import resource, sys
import torch
from vptsp import VPTSPModel
from vptsp.deploy.export import export_program
from vptsp.training.host_table import HostTable
folder, retriever = sys.argv[1:]
model = VPTSPModel.from_pretrained(retriever)
def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
"""


def run_limited(code, folder, retriever_folder):
    done = subprocess.run(
        [sys.executable, "-c", LIMITED + code, folder, retriever_folder], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="limits of POSIX")
def test_class_prompts_and_exports(tmp_path, retriever_folder):
    code = """
table = HostTable((1000, 2, 8), std=1.0)
limit(40_000)
try:
    table.place(folder)
    table.init_weights() if hasattr(table, "init_weights") else None
    table.tokens
except OSError as error:
    print("table:", error)
limit(3000)
for write in (lambda: model.save_pretrained(folder + "/saved"), lambda: export_program(model, folder + "/model.pt2")):
    try:
        write()
    except OSError as error:
        print("refused:", error)
"""
    lines = run_limited(code, str(tmp_path), str(retriever_folder)).splitlines()
    assert "class_prompt_folder" in lines[0]
    assert "has no room for class prompts: File too large" in lines[0]
    assert "saved" in lines[1]
    assert "File too large" in lines[1]
    assert lines[2].endswith("model.pt2'")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []


class Full:
    """A stream that takes so many bytes."""

    def __init__(self, stream, room):
        self.stream, self.room = stream, room

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stream.close()

    def write(self, content):
        self.room -= len(content)
        if self.room < 0:
            raise OSError(28, "No space left on device")
        return self.stream.write(content)


@pytest.mark.parametrize("room", [0, 100, 1000])
def test_an_index_is_not_half_written(room, tmp_path, monkeypatch):
    embeddings = torch.nn.functional.normalize(torch.randn(50, 16, generator=torch.Generator().manual_seed(0)))
    index = RetrievalIndex.build([str(row) for row in range(50)], embeddings)
    index.save(tmp_path / "index")
    before = {path.name: path.read_bytes() for path in (tmp_path / "index").iterdir()}
    index.remove(["0"])
    original = Path.open

    def full(self, mode="r", *args, **kwargs):
        stream = original(self, mode, *args, **kwargs)
        return Full(stream, room) if ".faiss" in self.name and mode == "wb" else stream

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*index-000001\.faiss'"):
        index.save(tmp_path / "index")
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in (tmp_path / "index").iterdir()} == before
    assert len(RetrievalIndex.open(tmp_path / "index")) == 50


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat", "HNSW8"])
def test_the_same_bytes_as_of_faiss(factory, tmp_path):
    from vptsp.search.index_files import _write_vectors

    index = faiss.index_factory(8, factory, faiss.METRIC_INNER_PRODUCT)
    values = np.random.default_rng(0).normal(size=(300, 8)).astype(np.float32)
    index.train(values)
    index.add(values)
    faiss.write_index(index, str(tmp_path / "theirs"))
    _write_vectors(index, tmp_path / "ours")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_small_file_is_named(monkeypatch, tmp_path):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    for write in (lambda path: write_json(path, {}), lambda path: write_text(path, "x")):
        with pytest.raises(OSError, match=r"No space left on device: '.*results\.json'"):
            write(tmp_path / "results.json")
    assert not list(tmp_path.iterdir())


def test_a_retriever_on_a_full_disk(monkeypatch, retriever_folder, tmp_path):
    from safetensors import SafetensorError

    model = VPTSPModel.from_pretrained(retriever_folder)

    def full(*args, **kwargs):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(OSError, match=r"saved can't be written to: .*No space left on device"):
        model.save_pretrained(tmp_path / "saved")
    assert not list((tmp_path / "saved").iterdir())
