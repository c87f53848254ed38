"""search/model_names.py: what can only be a folder is refused by name, and nothing is looked for on the Hub."""

import time

import pytest

from vptsp import DataError, Embedder
from vptsp.search.model_names import check_model_name


@pytest.fixture
def runs(tmp_path, monkeypatch):
    (tmp_path / "runs" / "photos").mkdir(parents=True)
    (tmp_path / "runs" / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


@pytest.mark.parametrize("name", ["facebook/dinov2-small", "https://x.y/z", "runs/photos", "./runs/photos", "runs/"])
def test_folders_and_names_on_the_hub_stay_as_they_are(runs, name):
    assert check_model_name(name) == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("runs/photo", "model: there is no folder runs/photo; did you mean 'runs/photos'?"),
        ("./runs/nope", "model: there is no folder ./runs/nope"),
        ("run", "model: there is no folder run; did you mean 'runs'?"),
        ("nope", "model: there is no folder nope (on the Hub, models are called OWNER/NAME)"),
        ("a/b/c", "model: there is no folder a/b/c"),
        ("/absent/model", "model: there is no folder /absent/model"),
        ("../nope", "model: there is no folder ../nope"),
        ("~/no such folder", "model: there is no folder ~/no such folder"),
        ("runs/file", "model: runs/file is a file, expected a folder or OWNER/NAME on the Hub"),
    ],
)
def test_what_can_only_be_a_folder(runs, name, message):
    began = time.monotonic()
    with pytest.raises(DataError) as error:
        Embedder.from_pretrained(name)
    assert str(error.value) == message
    assert time.monotonic() - began < 1
