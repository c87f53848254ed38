import gzip
import io
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
from data_fixtures import jpeg_bytes, write_archive, write_tar, write_zip

from vptsp import DataError
from vptsp.data_scripts.archives import archive_kind, list_members, read_members


FILES = {f"top/{name}": jpeg_bytes(seed) for seed, name in enumerate(("b/2.jpg", "a/1.jpg", "c/ü.JPG", "a/0.jpg"))}
LITTER = {"top/a/._1.jpg": b"x", "__MACOSX/top/a/1.jpg": b"x", "top/.DS_Store": b"x", "./": b""}
KINDS = {"set.zip": "zip", "set.tgz": "tar.gz", "set.tar": "tar"}


@pytest.fixture
def members(tmp_path):
    def names(path):
        return [file.path for file in list_members(path, tmp_path / "index")]

    return names


@pytest.mark.parametrize("name", KINDS)
def test_lists_and_reads(tmp_path, members, name):
    renamed = tmp_path / "download (1)"  # what it is, the first bytes say
    write_archive(tmp_path / name, {"./top/read me.txt": "hello", **LITTER, **FILES}).rename(renamed)
    assert archive_kind(renamed) == KINDS[name]
    assert members(renamed) == ["top/read me.txt", *FILES]
    sizes = {file.path: file.size for file in list_members(renamed, tmp_path / "index")}
    assert sizes == {"top/read me.txt": 5} | {name: len(content) for name, content in FILES.items()}
    wanted = sorted(FILES)
    found = list(read_members(renamed, wanted))
    assert dict(found) == FILES
    order = wanted if KINDS[name] == "zip" else list(FILES)
    assert [name for name, _ in found] == order
    assert list(read_members(renamed, ["top/read me.txt"])) == [("top/read me.txt", b"hello")]
    with pytest.raises(DataError, match=r"has no member 'top/a/absent.jpg'"):
        list(read_members(renamed, ["top/a/1.jpg", "top/a/absent.jpg"]))


def test_backslashes_are_separators(tmp_path, members):
    assert members(write_zip(tmp_path / "a.zip", {"top\\a\\1.jpg": b"x"})) == ["top/a/1.jpg"]


def test_a_tar_is_read_forwards_only_and_no_further_than_needed(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "set.tgz", {**FILES, "last.bin": bytes(3 << 20)})
    reads = []

    class Forward(gzip.GzipFile):
        def read(self, size=-1):
            content = self.read1(size)
            reads.append(len(content))
            return content

        def seek(self, *args):
            raise AssertionError("a compressed file must not be sought in")

    monkeypatch.setattr("vptsp.data_scripts.archives._Gzip", Forward)
    assert dict(read_members(path, FILES)) == FILES
    assert 0 < sum(reads) <= 2 << 20
    reads.clear()
    list_members(path, tmp_path / "index")
    assert sum(reads) > 3 << 20


def test_the_list_of_a_tar_is_kept(tmp_path, members, monkeypatch):
    path = write_tar(tmp_path / "set.tgz", FILES)
    first = members(path)
    with monkeypatch.context() as patch:
        patch.setattr("vptsp.data_scripts.archives._walk_tar", None)
        assert members(path) == first
        (tmp_path / "moved").mkdir()
        path = path.rename(tmp_path / "moved/set.tgz")
        assert members(path) == first
    (index,) = (tmp_path / "index").rglob("*.json")
    index.write_text("not what was written")
    assert members(path) == first
    write_tar(path, {"other.jpg": b"x"})
    assert members(path) == ["other.jpg"]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("bad", ["../out.jpg", "a/../../out.jpg", "/etc/out.jpg", "C:\\out.jpg", "..\\out.jpg"])
def test_paths_that_lead_out(tmp_path, members, name, bad):
    path = write_archive(tmp_path / name, {"a/1.jpg": b"x", bad: b"x"})
    with pytest.raises(DataError, match=rf"{name} holds the member .*out.jpg', whose path leads out"):
        members(path)
    assert not list(tmp_path.rglob("out.jpg"))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_twice(tmp_path, members, name):
    path = write_archive(tmp_path / name, [("a/1.jpg", b"x"), ("./a/1.jpg", b"y")])
    with pytest.raises(DataError, match=rf"{name} holds the member 'a/1.jpg' twice"):
        members(path)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_in_a_tar(tmp_path, members, kind):
    link = tarfile.TarInfo("a/link.jpg")
    link.type, link.linkname = kind, "/etc/passwd"
    path = write_tar(tmp_path / "set.tgz", {"a/1.jpg": b"x", "a/link.jpg": link})
    with pytest.raises(DataError, match=r"the member 'a/link.jpg' is a link to '/etc/passwd'; expected an image"):
        members(path)
    link.name = "a/notes"
    assert members(write_tar(tmp_path / "set2.tgz", {"a/notes": link, "a/1.jpg": b"x"})) == ["a/1.jpg"]


def test_links_and_encryption_in_a_zip(tmp_path, members):
    link = zipfile.ZipInfo("a/link.jpg")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(DataError, match=r"the member 'a/link.jpg' is a link; expected an image"):
        members(tmp_path / "set.zip")
    path = write_zip(tmp_path / "locked.zip", {"a/1.jpg": b"x"})
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"the member 'a/1.jpg' is encrypted; unpack"):
        members(path)


def noise(size, seed):
    return np.random.default_rng(seed).bytes(size)


@pytest.mark.parametrize("name", KINDS)
def test_truncated(tmp_path, members, name):
    """Cut anywhere, an archive is refused, and the member that is named is really whole."""
    contents = {f"m/{i}.jpg": noise(1500 + 700 * i, i) for i in range(4)}
    path = write_archive(tmp_path / name, contents)
    whole = path.read_bytes()
    used = len(whole) if name != "set.tar" else 512 * sum(1 + -(-len(content) // 512) for content in contents.values())
    last_named = set()
    for cut in [*range(100, used - 20, 397), used - 1, used]:
        if cut >= len(whole):
            continue
        path.write_bytes(whole[:cut])
        if cut < 600:  # not even one header: it may not be told from another file
            with pytest.raises(DataError, match=name):
                members(path)
            continue
        with pytest.raises(DataError, match=rf"{name} is truncated") as caught:
            members(path)
        assert str(path) in str(caught.value)
        last = next((i for i in range(4) if f"last whole member is 'm/{i}.jpg'" in str(caught.value)), None)
        if last is None:
            assert "m/" not in str(caught.value)
        else:
            last_named.add(last)
            assert whole[:cut].count(contents["m/0.jpg"]) == 1 or name == "set.tgz"
        if name != "set.tgz":  # stored as it is: what is whole can be searched for
            complete = [i for i in range(4) if contents[f"m/{i}.jpg"] in whole[:cut]]
            assert last is None or last in complete
            assert len(complete) - (0 if last is None else last + 1) in (0, 1)
    assert last_named >= {0, 1, 2}
    assert not list(tmp_path.rglob("index/*/*.json"))  # nothing half-read is kept


def test_damaged(tmp_path, members):
    path = write_zip(tmp_path / "set.zip", FILES)
    content = bytearray(path.read_bytes())
    content[content.index(FILES["top/a/1.jpg"]) + 100] ^= 255
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"set.zip: the member 'top/a/1.jpg' is damaged \(Bad CRC"):
        dict(read_members(path, FILES))
    path = write_tar(tmp_path / "set.tgz", FILES)
    content = bytearray(path.read_bytes())
    content[-6] ^= 255  # the checksum at the end
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"set.tgz is truncated or damaged \(CRC check failed"):
        members(path)
    path = write_tar(tmp_path / "set.tar", FILES, "w")
    content = bytearray(path.read_bytes())
    content[content.index(b"top/a/1.jpg") + 148] ^= 1  # the header's checksum
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"header is damaged\); the last whole member is 'top/b/2.jpg'"):
        members(path)


def test_an_index_folder_that_cannot_be_written(tmp_path):
    path = write_tar(tmp_path / "set.tgz", FILES)
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(DataError, match=r"can't keep the list of set.tgz in .*taken/vptsp_archives"):
        list_members(path, tmp_path / "taken")


def test_several_processes_list_an_archive_once(tmp_path):
    path = write_tar(tmp_path / "set.tgz", {f"{i}.jpg": b"x" for i in range(2000)})
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from vptsp.data_scripts import archives\n"
        "walk = archives._walk_tar\n"
        "def counted(*args):\n"
        "    print('walked')\n"
        "    return walk(*args)\n"
        "archives._walk_tar = counted\n"
        "print(len(archives.list_members(Path(sys.argv[1]), sys.argv[2])))\n"
    )
    command = [sys.executable, "-c", code, str(path), str(tmp_path / "index")]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    words = sorted(word for run in runs for word in run.communicate()[0].split())
    assert words == ["2000", "2000", "2000", "walked"]


def test_not_an_archive(tmp_path, members):
    page = tmp_path / "CUB_200_2011.tgz"
    page.write_text("<!DOCTYPE html><html>Sign in</html>")
    with pytest.raises(DataError, match=r"is neither a zip nor a tar file .*<!DOCTYPE html.*not a web page"):
        members(page)
    page.write_bytes(b"")
    with pytest.raises(DataError, match=r"it is empty"):
        members(page)
    with pytest.raises(DataError, match=r"can't read .*absent.tgz: No such file"):
        members(tmp_path / "absent.tgz")
    stream = io.BytesIO()
    with gzip.GzipFile(fileobj=stream, mode="w") as packed:
        packed.write(b"hello" * 1000)
    page.write_bytes(stream.getvalue())
    with pytest.raises(DataError, match=r"is truncated or damaged"):
        members(page)
