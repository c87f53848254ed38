"""Paths that no file can have, links to themselves and names in other forms: one line, wherever they are given."""

import os
import re
import unicodedata

import pytest
from PIL import Image

from vptsp import DataError, cli, train
from vptsp.data_scripts.image_files import list_images
from vptsp.data_scripts.paths import usable_path
from vptsp.search.image_sources import list_source


PLACES = {
    "unknown user": ("~nobody9/photos", "there is no user 'nobody9'"),
    "long name": ("x" * 5000, "5,000 characters is longer"),
    "long path": ("/tmp/" + "a/" * 3000, "is longer than any file's"),
    "NUL": ("/tmp/a\0b", "holds a NUL"),
    "not UTF-8": (os.fsdecode(b"/tmp/\xff"), "is not valid UTF-8"),
    "empty": ("", "empty|is missing"),
}
OPTIONS = {
    "embed --images": ["embed", "--model", "m", "--output", "o", "--images"],
    "embed --data_dir": ["embed", "--model", "m", "--output", "o", "--data_dir"],
    "embed --output": ["embed", "--model", "m", "--images", "photos", "--output"],
    "embed --embeddings_cache": ["embed", "--model", "m", "--images", "photos", "--output", "o", "--embeddings_cache"],
    "embed --model": ["embed", "--images", "photos", "--output", "o", "--model"],
    "evaluate --store": ["evaluate", "--output", "o", "--store"],
    "index --index": ["index", "--store", "s", "--index"],
    "search --index": ["search", "--id", "a", "--index"],
    "app --index": ["app", "--index"],
    "check --data_dir": ["check", "folder", "--data_dir"],
    "check --data_cache_dir": ["check", "folder", "--data_dir", "photos", "--data_cache_dir"],
    "train --data_dir": ["train", "folder", "--data_dir"],
    "train --output_dir": ["train", "folder", "--data_dir", "photos", "--output_dir"],
    "train --data_cache_dir": ["train", "folder", "--data_dir", "photos", "--data_cache_dir"],
    "train CONFIG": ["train"],
}


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (20, 20), (number, 0, 0)).save(tmp_path / "photos" / name / f"{number}.png")
    return tmp_path / "photos"


def message_of(words, capsys):
    try:
        status = cli.main(words)
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    *_, message = capsys.readouterr().err.strip().splitlines()
    assert "error: " in message
    return message


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("option", OPTIONS)
def test_a_path_that_no_file_can_have(option, place, photos, capsys):
    given, expected = PLACES[place]
    if (option, place) == ("embed --model", "empty"):
        pytest.skip("a name, which is looked up")
    before = sorted(photos.parent.rglob("*"))
    message = message_of([*OPTIONS[option], given], capsys)
    assert re.search(expected, message), message
    assert len(message) < 400
    assert sorted(photos.parent.rglob("*")) == before


@pytest.mark.parametrize("option", ["check --data_dir", "train --data_dir", "embed --images", "train --output_dir"])
def test_a_link_to_itself_is_no_folder(option, photos, capsys):
    (photos.parent / "loop").symlink_to("loop")
    assert "loop" in message_of([*OPTIONS[option], "loop"], capsys)


def test_a_link_to_itself_among_images(photos, caplog):
    (photos / "loop").symlink_to("loop")
    assert len(list_images(photos)) == 4
    assert "no ending 1" in caplog.text
    (photos / "loop.png").symlink_to("loop.png")
    with pytest.raises(DataError, match=r"loop\.png is a broken link to loop\.png"):
        list_images(photos)


def test_an_image_whose_name_is_not_utf8(photos, capsys):
    with open(os.fsencode(photos / "a") + b"/\xff.png", "wb") as stream:  # noqa: PTH123
        stream.write((photos / "a" / "0.png").read_bytes())
    assert "is not valid UTF-8" in message_of([*OPTIONS["check --data_dir"], "photos"], capsys)
    with pytest.raises(DataError, match=r"udcff.png' is not valid UTF-8, and can't be stored in a table: rename it"):
        list_images(photos)


def test_a_list_with_a_byte_order_mark(photos):
    (photos.parent / "list.txt").write_bytes(b"\xef\xbb\xbfphotos/a/0.png\nphotos/b/1.png\n")
    assert list_source(photos.parent / "list.txt").ids == ["photos/a/0.png", "photos/b/1.png"]


def test_a_name_in_another_form_of_unicode_is_told(photos):
    decomposed = unicodedata.normalize("NFD", "é.png")
    (photos / "a" / "0.png").rename(photos / "a" / decomposed)
    (photos.parent / "list.txt").write_text("photos/a/é.png\n", encoding="utf-8")
    with pytest.raises(
        DataError, match=r"there is 'e\\u0301.png', of the same letters in another form .* than '\\xe9.png'"
    ):
        list_source(photos.parent / "list.txt")
    (photos.parent / "list.txt").write_text(f"photos/a/{decomposed}\n", encoding="utf-8")
    assert len(list_source(photos.parent / "list.txt")) == 1


def test_folders_that_can_not_be_written_to(photos, capsys):
    for option in ("check --data_cache_dir", "train --output_dir", "train --data_cache_dir"):
        for place in ("photos/a/0.png", "photos/a/0.png/x"):
            name = option.partition("--")[2]
            message = message_of([*OPTIONS[option], place], capsys)
            assert re.search(rf"{name} must be a folder or a new one, got .*0\.png is no folder", message), message


def test_home_folders(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert usable_path("~/photos") == tmp_path / "photos"
    assert usable_path("photos/~") == usable_path("photos") / "~"


def test_train_has_the_same_words_in_python(photos):
    with pytest.raises(SystemExit) as stopped:
        train.main(["folder", "--data_dir", "~nobody9/photos"])
    assert stopped.value.code == 2
