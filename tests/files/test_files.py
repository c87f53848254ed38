"""Atomic writes, digests and locks of files."""

import hashlib
import json
import math
import subprocess
import sys

import pytest

from vptsp.files.atomic import atomic_path, write_json
from vptsp.files.digests import DamagedFileError, check_file, file_digest, folder_record
from vptsp.files.json_files import JsonError, read_json_object, without_duplicates
from vptsp.files.locks import InUseError, locked
from vptsp.files.yaml_files import YamlError, read_yaml


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("new")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_digest_is_sha256_of_the_bytes(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"proxies")
    assert file_digest(path) == hashlib.sha256(b"proxies").hexdigest()


def test_a_flipped_bit_a_cut_a_loss_and_a_way_out_are_noticed(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("same", "flipped", "cut", "b/lost"):
        (tmp_path / name).write_bytes(bytes(range(64)))
    record = folder_record(tmp_path)
    flipped = bytearray(range(64))
    flipped[17] ^= 4
    (tmp_path / "flipped").write_bytes(flipped)
    (tmp_path / "cut").write_bytes(bytes(range(63)))
    (tmp_path / "b" / "lost").unlink()
    check_file(tmp_path, "same", record["same"])
    for name, words in {"flipped": "SHA-256", "cut": "63 bytes, expected 64", "b/lost": "lacks b/lost"}.items():
        with pytest.raises(DamagedFileError, match=words):
            check_file(tmp_path, name, record[name])
    for name in ("../same", "/etc/hostname"):
        with pytest.raises(DamagedFileError, match="outside"):
            check_file(tmp_path / "b", name, record["same"])


def test_a_record_without_a_digest_compares_sizes(tmp_path):
    (tmp_path / "old").write_bytes(b"123")
    check_file(tmp_path, "old", {"bytes": 3})
    with pytest.raises(DamagedFileError, match="3 bytes, expected 4"):
        check_file(tmp_path, "old", {"bytes": 4})


def test_a_second_process_is_refused_until_the_first_ends(tmp_path):
    lock = tmp_path / "folder" / ".lock"
    code = (
        "import sys; from vptsp.files.locks import locked\n"
        "with locked(sys.argv[1], 'the run'): print('held', flush=True); input()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(InUseError, match="the run is in use by another process"), locked(lock, "the run"):
            pass
    finally:
        process.kill()
        process.wait()
    with locked(lock, "the run"):
        pass


def test_no_lock_waits_for_ever(tmp_path):
    with pytest.raises(ValueError, match="timeout must be >= 0 seconds, got -1"), locked(tmp_path / "l", "x", -1):
        pass


def test_json_has_no_numbers_that_json_does_not_know(tmp_path):
    write_json(tmp_path / "a.json", {"a": [math.nan, (math.inf, 0.5)], "b": {"c": -math.inf}, "é": 1})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=pytest.fail) == {"a": [None, [None, 0.5]], "b": {"c": None}, "é": 1}
    assert "é" in text
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == text
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("a: 010", "quote it: '010' .YAML reads it otherwise: 010 is 8"),
        ("a: [1:30]", "quote it: '1:30'"),
        ("a: 0x1F", "quote it: '0x1F'"),
        ("a: 1_000", "quote it: '1_000'"),
        ("a: {b: no}", "quote it: 'no' .*no is false; write true or false"),
        ("a: On", "quote it: 'On'"),
        ("a: .nan", "quote it: '.nan'"),
        ("a: 2024-01-02", "quote it: '2024-01-02'"),
        ("010: a", "quote it: '010'"),
        ("a: 1\nb: 2\na: 3", "'a' is there twice .*line 3"),
        ("a: {b: 1, b: 1}", "'b' is there twice"),
        ("a: [1", "while parsing"),
        ("a: !!python/name:os.system", "could not determine a constructor"),
    ],
)
def test_yaml_that_would_not_be_read_as_it_is_written_is_refused(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(YamlError, match=message):
        read_yaml(tmp_path / "a.yaml")


def test_yaml_that_is_what_it_looks_like_is_read(tmp_path):
    text = (
        "a: '010'\nb: [1, -2, +3, 0, 1.5, 1.0e-3, 1e-3, 08]\nc: {d: true, e: False, f: null, g: ~, h: no one}\ni: 'no'"
    )
    (tmp_path / "a.yaml").write_text(text)
    assert read_yaml(tmp_path / "a.yaml") == {
        "a": "010",
        "b": [1, -2, 3, 0, 1.5, 1e-3, "1e-3", "08"],
        "c": {"d": True, "e": False, "f": None, "g": None, "h": "no one"},
        "i": "no",
    }


def test_json_with_a_key_twice_is_refused(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"one": {"two": 1, "three": 2, "two": 3}}')
    with pytest.raises(JsonError, match=r"a\.json is not JSON: 'two' is there twice"):
        read_json_object(path)


def test_many_keys_take_no_time():
    pairs = [(str(number), number) for number in range(200_000)]
    assert len(without_duplicates(pairs)) == 200_000
    with pytest.raises(ValueError, match="'7' is there twice"):
        without_duplicates([*pairs, ("7", 7)])
