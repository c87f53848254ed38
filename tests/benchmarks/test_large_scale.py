"""The plan for millions of images: quantities and prices, computed by hand; sizes of an index as they are on disk."""

import importlib
import json
import sys
from pathlib import Path
from unittest import mock

import pytest


BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
with mock.patch("sys.path", [str(BENCHMARKS), *sys.path]):  # it imports its neighbours
    large_scale, large_scale_plan = map(importlib.import_module, ("large_scale", "large_scale_plan"))

MEASURED = {
    "embedding_dim": 100,
    "bytes_per_photo": 1000.0,
    "read_seconds": 0.01,
    "embed_seconds": 0.35,
    "store_bytes": 500.0,
    "listing_bytes": 300.0,
    "indexes": [{"factory": name, "bytes": 200.0 + i} for i, name in enumerate(large_scale.FACTORIES)],
}


def planned(monkeypatch, capsys, tmp_path, *words):
    (tmp_path / "measured.json").write_text(json.dumps(MEASURED))
    command = ["large_scale_plan.py", "--measured", str(tmp_path / "measured.json"), "--workers", "10", *words]
    monkeypatch.setattr(sys, "argv", command)
    large_scale_plan.main()
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}


def test_quantities(monkeypatch, capsys, tmp_path):
    rows = planned(monkeypatch, capsys, tmp_path, "--num_images", "1000000", "25000000", "--price_worker_hour", "2")
    assert rows["runs, each with a store and an index"] == ["1", "3"]
    assert rows["images of a run"] == ["1,000,000", "8,333,334"]
    assert rows["worker hours"] == ["100", "2,500"]
    assert rows["hours"] == ["10", "250"]
    assert rows["bytes read"] == ["2,000,000,000", "50,000,000,000"]
    assert rows["bytes read a second"] == ["55,556", "55,556"]
    assert rows["requests"] == ["4,000,000", "100,000,000"]
    assert rows["stores (bytes)"] == ["500,000,000", "12,500,000,000"]
    assert rows["index of a run"] == ["IVF4096,Flat", "HNSW32"]
    assert rows["indexes (bytes)"] == ["200,000,000", "5,025,000,000"]
    assert rows["cost of workers"] == ["200", "5,000"]
    assert rows["cost of requests"] == ["", ""]


def test_a_worker_measured_elsewhere(monkeypatch, capsys, tmp_path):
    rows = planned(monkeypatch, capsys, tmp_path, "--num_images", "3600000", "--images_per_second", "100")
    assert rows["worker hours"] == ["20"]  # 10 to embed, 10 to read


def test_sizes_are_those_on_disk():
    sizes = large_scale.index_sizes("Flat", 200, 16)
    assert sizes["vector_bytes"] == pytest.approx(16 * 4 + 8, rel=0.1)
    assert sizes["bytes"] > sizes["vector_bytes"] + 32  # digests of 32 bytes, written as text
