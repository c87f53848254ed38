"""Miniature data sets that the tests of the data code make for themselves."""

import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


SHARED_DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"
"""Larger real data, beside a checkout; tests that use it skip where it is absent."""


def write_image(path, size=(12, 10), seed=0):
    """Write one image of noise (any format that the name's extension says) and return its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def write_classes(root, counts, extension="png"):
    """Make `root/<class>/NNN.png`, as many per class as `counts` says; return root."""
    root = Path(root)
    for position, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            write_image(root / name / f"{i:03d}.{extension}", seed=100 * position + i)
    return root


def jpeg_bytes(seed=0, size=(6, 5)):
    """A small JPEG of noise; another seed, other bytes."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG")
    return stream.getvalue()


def write_files(root, files):
    """Write `{relative path: bytes or text}`; return root."""
    root = Path(root)
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def write_tar(path, files, mode="w:gz"):
    """Write `{member: bytes or text}` as a tar file; a `TarInfo` as the value goes in as it is."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, content in files.items() if isinstance(files, dict) else files:
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
                continue
            content = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def write_zip(path, files):
    """Write `{member: bytes or text}` as a zip file, images uncompressed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items() if isinstance(files, dict) else files:
            archive.writestr(zipfile.ZipInfo(name), content)
    return path


def write_archive(path, files):
    """A zip or tar file, as the name says."""
    path = Path(path)
    if path.suffix == ".zip":
        return write_zip(path, files)
    return write_tar(path, files, "w" if path.suffix == ".tar" else "w:gz")


def rows_of(split):
    """`(class name, end of the path, bytes)` per row of a split, prepared or streamed; files on disk are read."""
    names = split.features["label"].names
    rows = []
    for row in split:
        content = row["image"]["bytes"]
        if content is None:
            content = Path(row["image"]["path"]).read_bytes()
        rows.append((names[row["label"]], row["image"]["path"], content))
    return rows


def split_list(name):
    """`(path, label)` per line of one of the published split lists; skips the test where they are not."""
    path = SHARED_DATA / "splits" / name
    if not path.is_file():
        pytest.skip("needs the published split lists")
    lines = (line.rsplit(",", 1) for line in path.read_text().splitlines())
    return [(file, int(label)) for file, label in lines]


RETRIEVAL_CARD = """---
configs:
- config_name: qrels
  data_files:
  - split: {split}
    path: qrels-*
- config_name: corpus
  data_files:
  - split: corpus
    path: corpus-*
- config_name: {query}
  data_files:
  - split: {split}
    path: {query}-*
---
"""
"""The head of the card of an image retrieval set in the form of MTEB."""


def write_retrieval_set(root, query, corpus, qrels, query_name="query", split="test"):
    """A retrieval set as MTEB's repositories have it: parquet files, and a card that says what they are.

    Args:
        query, corpus: Per id the contents of an image (None: no image).
        qrels: Of (query id, corpus id, score).
    """
    import datasets

    root = Path(root)
    root.mkdir(parents=True)
    features = {"id": datasets.Value("string"), "modality": datasets.Value("string"), "image": datasets.Image()}
    for name, rows in ((query_name, query), ("corpus", corpus)):
        images = [None if image is None else {"bytes": image, "path": None} for image in rows.values()]
        table = {"id": list(rows), "modality": ["image"] * len(rows), "image": images}
        datasets.Dataset.from_dict(table, features=datasets.Features(features)).to_parquet(
            root / f"{name}-00000-of-00001.parquet"
        )
    columns = zip(*qrels, strict=True)
    kinds = {"query-id": "string", "corpus-id": "string", "score": "int8"}
    table = {name: list(values) for name, values in zip(kinds, columns, strict=True)}
    features = datasets.Features({name: datasets.Value(kind) for name, kind in kinds.items()})
    datasets.Dataset.from_dict(table, features=features).to_parquet(root / "qrels-00000-of-00001.parquet")
    (root / "README.md").write_text(RETRIEVAL_CARD.format(query=query_name, split=split))
    return root
