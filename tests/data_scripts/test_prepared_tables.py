"""Prepared tables that a full disk or a crash has damaged are made anew, and it is said."""

import pytest
from PIL import Image

from vptsp import DataError, load_splits


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def to_folder(path):
    path.unlink()
    path.mkdir()


DAMAGE = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut": cut,
    "noise": lambda path: path.write_bytes(bytes(range(256)) * 20),
    "a folder": to_folder,
    "a list": lambda path: path.write_text("[]"),
    "no fields": lambda path: path.write_text("{}"),
    "nested too deeply": lambda path: path.write_text("[" * 100_000),
}


@pytest.fixture
def prepared(tmp_path):
    for number, name in enumerate("abcd"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for image in range(2 + number):
            Image.new("RGB", (20, 20), (image, number, 0)).save(tmp_path / "photos" / name / f"{image}.png")
    return tmp_path, rows(tmp_path)


def rows(folder):
    splits = load_splits("folder", str(folder / "photos"), str(folder / "cache"))
    return {name: [(row["image"]["path"], row["label"]) for row in split] for name, split in splits.items()}


@pytest.mark.parametrize("file", ["dataset_info.json", "*.arrow"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_tables_are_made_anew(file, damage, prepared, caplog):
    folder, expected = prepared
    for path in (folder / "cache").rglob(file):
        DAMAGE[damage](path)
    assert rows(folder) == expected
    if (file, damage) != ("dataset_info.json", "missing"):  # by which `datasets` itself knows that it was interrupted
        assert "can't be read and are made anew" in caplog.text
    caplog.clear()
    assert rows(folder) == expected
    assert not caplog.text


def test_tables_of_other_rows_are_made_anew(prepared, caplog):
    folder, expected = prepared
    train, test = sorted((folder / "cache").rglob("*.arrow"), key=lambda path: "test" in path.name)
    size = test.stat().st_size
    test.write_bytes(train.read_bytes())
    assert test.stat().st_size != size
    assert rows(folder) == expected
    assert "are made anew" in caplog.text


def test_a_full_disk_is_named(prepared, monkeypatch):
    import datasets

    folder, _ = prepared

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(datasets.arrow_writer.ArrowWriter, "finalize", full)
    with pytest.raises(DataError, match=r"can't be written to .*other: No space left on device; name another folder"):
        load_splits("folder", str(folder / "photos"), str(folder / "other"))
