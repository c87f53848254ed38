"""Archives that are made to take time or memory."""

import gzip
import io
import struct
import tarfile
import time
import zipfile

import pytest
from data_fixtures import jpeg_bytes

from vptsp import DataError
from vptsp.data_scripts import archives
from vptsp.data_scripts.archives import list_members, read_members


@pytest.fixture
def small(monkeypatch):
    """The limit of a member's size, so that the tests need no gigabytes."""
    monkeypatch.setattr(archives, "MAX_MEMBER_BYTES", 1 << 20)


def header(name="a/1.jpg", size=0, kind=tarfile.REGTYPE):
    """A tar header; sizes that octal digits can't hold are binary, as GNU tar writes them."""
    info = tarfile.TarInfo(name)
    info.type = kind
    data = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    data[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data)
    return bytes(data)


def pax(*records):
    content = b"".join(records)
    return header("pax", len(content), tarfile.XHDTYPE) + content + bytes(-len(content) % 512)


def record(text):
    length = len(text) + 3
    while length != len(f"{length} {text}\n"):
        length = len(f"{length} {text}\n")
    return f"{length} {text}\n".encode()


IMAGE = jpeg_bytes()
WHOLE = header("a/0.jpg", len(IMAGE)) + IMAGE + bytes(-len(IMAGE) % 512)
END = bytes(1024)

BAD = {
    "a size of many years": (WHOLE + header(size=2**70) + IMAGE, "ends within a member"),
    "a size beyond the end": (WHOLE + header("a/notes.txt", 2**40) + END, "ends within a member"),
    "a negative size": (WHOLE + header(size=-512) + END, "a header says that -512 bytes follow"),
    "a negative size, pax": (WHOLE + pax(record("size=-1024")) + header() + END, "truncated or damaged"),
    "a long number, pax": (WHOLE + pax(b"1" * 60_000) + header() + END, "more than 511 digits"),
    "a long name": (WHOLE + header("x", 2**33, tarfile.GNUTYPE_LONGNAME) + b"a" * 2048, "8589934592 bytes follow"),
    "a large pax header": (WHOLE + header("x", 2**31, tarfile.XHDTYPE) + END, "2147483648 bytes follow"),
    "headers of headers": (WHOLE + pax(record("comment=x")) * 3000 + header() + END, "truncated or damaged"),
    "a sparse file, cut": (WHOLE + header("a/1.jpg", 0, tarfile.GNUTYPE_SPARSE)[:400], "truncated or damaged"),
    "a sparse file without its map": (
        WHOLE + pax(record("GNU.sparse.major=1"), record("GNU.sparse.minor=0")) + header("a/1.jpg", 512),
        "truncated or damaged",
    ),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", BAD)
def test_headers_that_would_be_read_for_hours(tmp_path, name, packed):
    content, reason = BAD[name]
    path = tmp_path / "set.tar"
    path.write_bytes(gzip.compress(content) if packed else content)
    start = time.perf_counter()
    with pytest.raises(DataError, match=rf"set.tar is .*{reason}.*the last whole member is 'a/0.jpg'"):
        list_members(path, tmp_path / "index")
    assert time.perf_counter() - start < 2


def test_usual_headers_are_read(tmp_path):
    """Long names, and numbers of the size that file names have, in both forms."""
    names = ["a/" + "1" * 200 + ".jpg", "b/" + "é" * 90 + ".jpg", "c/" + "/".join(["d" * 50] * 20) + ".jpg"]
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        with tarfile.open(tmp_path / "set.tar", "w", format=form) as archive:
            for name in names:
                info = tarfile.TarInfo(name)
                info.size = len(IMAGE)
                archive.addfile(info, io.BytesIO(IMAGE))
        assert [file.path for file in list_members(tmp_path / "set.tar", tmp_path / f"index{form}")] == names
        assert dict(read_members(tmp_path / "set.tar", names)) == dict.fromkeys(names, IMAGE)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kind", ["set.tgz", "set.zip"])
def test_large_members(tmp_path, kind):
    """Refused by what the header says, before a byte is unpacked; other files than images may be large."""
    path = tmp_path / kind

    def write(name, size):
        if kind == "set.zip":
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr("a/0.jpg", IMAGE)
                archive.writestr(name, bytes(size))
        else:
            with tarfile.open(path, "w:gz") as archive:
                for member, content in (("a/0.jpg", IMAGE), (name, bytes(size))):
                    info = tarfile.TarInfo(member)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))

    write("a/1.jpg", (1 << 20) + 1)
    with pytest.raises(DataError, match=rf"{kind}: the member 'a/1.jpg' has 1 MB unpacked, more than 1 MB; .* unpack"):
        list_members(path, tmp_path / "index")
    with pytest.raises(DataError, match=r"the member 'a/1.jpg' has 1 MB unpacked"):
        list(read_members(path, ["a/1.jpg"]))
    write("a/features.bin", 3 << 20)
    assert [file.path for file in list_members(path, tmp_path / "index")] == ["a/0.jpg", "a/features.bin"]
    assert dict(read_members(path, ["a/0.jpg"])) == {"a/0.jpg": IMAGE}
    with pytest.raises(DataError, match=r"the member 'a/features.bin' has 3 MB unpacked"):
        list(read_members(path, ["a/features.bin"]))


def test_a_zip_member_that_is_larger_than_it_says(tmp_path):
    """It is unpacked as far as its header says, and no further."""
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/1.jpg", bytes(50 << 20))
    content = bytearray(path.read_bytes())
    place = content.index(b"PK\1\2")
    content[place + 24 : place + 28] = struct.pack("<I", 1000)
    path.write_bytes(content)
    assert len(content) < 100_000
    taken = []
    original = zipfile.ZipExtFile._read1

    def read(self, size):
        taken.append(size)
        return original(self, size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zipfile.ZipExtFile, "_read1", read)
        with pytest.raises(DataError, match=r"set.zip: the member 'a/1.jpg' is damaged"):
            list(read_members(path, ["a/1.jpg"]))
    assert max(taken) <= 1000


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_packings_than_deflate(tmp_path, method):
    with zipfile.ZipFile(tmp_path / "set.zip", "w", method) as archive:
        archive.writestr("a/1.jpg", IMAGE)
    with pytest.raises(DataError, match=rf"'a/1.jpg' is packed by method {method}; expected deflate or none"):
        list_members(tmp_path / "set.zip", tmp_path / "index")
