"""Atomic writes, digests and locks of files."""

import hashlib
import subprocess
import sys

import pytest

from vptsp.files.atomic import atomic_path
from vptsp.files.digests import DamagedFileError, check_file, file_digest, folder_record
from vptsp.files.locks import InUseError, locked


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
