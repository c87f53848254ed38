"""Reading images out of zip and tar files, in one pass and without unpacking them.

A tar file is only ever read from front to back (jumping about in a compressed one would start over each time), so its
list of members is made in a pass of its own, once, and kept beside the prepared tables.

Nothing here imports torch or `datasets`, and nothing is ever written where a member's name says.
"""

import contextlib
import gzip
import hashlib
import os
import re
import shutil
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from filelock import FileLock
from tqdm import tqdm

from ..files.atomic import write_json
from ..files.json_files import read_json_object
from .data_errors import DataError, some
from .image_files import SLOW_SECONDS, ImageFile, is_hidden, is_image_name, relative_parts
from .paths import usable_path


__all__ = [
    "MAX_MEMBER_BYTES",
    "TarMember",
    "archive_kind",
    "free_bytes",
    "kind_of_head",
    "list_members",
    "read_members",
    "walk_tar",
]

MAX_MEMBER_BYTES = 1 << 28
"""What an image or a list in an archive may take at most, unpacked: as much as the pixels of the largest image that is
read."""
INDEX_FOLDER = "vptsp_archives"
_INDEX_VERSION = 1
_BUFFER = 1 << 20
_MOST_BYTES_PER_BYTE = 1032  # that gzip can pack into one
_MAX_HEADER_BYTES = 1 << 20  # of a tar file's extended headers: long names, and what systems add
_EXTENDED = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)
_LONG_NUMBER = re.compile(rb"\d{512}")
_PLAIN = re.compile(r"[\w-][\w .,()-]*(?:/[\w-][\w .,()-]*)*", re.ASCII)
"""Most names; they need no closer look."""
_ZIP_ERRORS = (ArithmeticError, NotImplementedError, OSError, RuntimeError, ValueError, struct.error)
"""Of `zipfile`, on contents made to deceive."""
_ZIP_HEADER = struct.Struct("<4s5H3L2H")


def archive_kind(path: Path) -> str:
    """What a file is, from its first bytes (whatever its name).

    Returns:
        `zip`, `tar.gz` or `tar`.

    Raises:
        DataError: it is none of these, or can't be read.
    """
    try:
        with path.open("rb") as stream:
            head = stream.read(512)
    except OSError as error:
        raise DataError(f"can't read {path}: {error.strerror or error}") from error
    return kind_of_head(head, path)


def kind_of_head(head: bytes, path: Path | str) -> str:
    """[`archive_kind`] of the first 512 bytes of a file, which errors call `path`."""
    if head.startswith((b"PK\3\4", b"PK\5\6")):
        return "zip"
    if head.startswith(b"\x1f\x8b"):
        return "tar.gz"
    if head[257:262] == b"ustar":
        return "tar"
    what = "it is empty" if not head else f"it starts with {head[:16]!r}"
    raise DataError(f"{path} is neither a zip nor a tar file ({what}); is the download complete, and not a web page?")


def list_members(path: Path, index_dir: str | Path) -> list[ImageFile]:
    """List the files in an archive, in its order.

    Folders, hidden files and the litter of macOS are passed over. The list of a tar file is kept in
    `index_dir/vptsp_archives`, found again by the archive's name, size and time of change.

    Args:
        path: Archive.
        index_dir: Folder for the list.

    Returns:
        Member names (with `/`, without a leading `./`) and sizes.

    Raises:
        DataError: the archive is truncated or damaged (the last whole member is named), encrypted, holds a name twice,
            a name that leads out of it, or an image that is a link or larger than `MAX_MEMBER_BYTES`.
    """
    path = Path(path)
    if archive_kind(path) == "zip":
        with _open_zip(path) as archive:
            return [ImageFile(name, info.file_size, 0) for name, info in _zip_members(path, archive).items()]
    status = path.stat()
    key = hashlib.sha256(f"{path.name}\0{status.st_size}\0{status.st_mtime_ns}".encode()).hexdigest()[:32]
    index = usable_path(index_dir) / INDEX_FOLDER / f"{key}.json"
    try:
        index.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"can't keep the list of {path.name} in {index.parent} ({error.strerror}); name a folder that can be "
            "written to (data_cache_dir)"
        ) from error
    with FileLock(f"{index}.lock"):  # of several processes, one reads the archive
        members = _read_index(index)
        if members is None:
            members = [[member.name, member.size] for member in _walk_tar(path, f"Listing {path.name}")]
            write_json(index, {"version": _INDEX_VERSION, "archive": path.name, "members": members}, indent=None)
    return [ImageFile(name, size, 0) for name, size in members]


def _read_index(index: Path) -> list | None:
    try:
        content = read_json_object(index)
        members = [(str(name), int(size)) for name, size in content["members"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return members if content.get("version") == _INDEX_VERSION else None


def read_members(path: Path, names: Collection[str], progress: bool = False) -> Iterator[tuple[str, bytes]]:
    """Read files out of an archive.

    Args:
        path: Archive.
        names: Members, as `list_members` names them.
        progress: Show a bar, if it takes more than two seconds.

    Yields:
        Name and contents; of a zip file in the order of `names`, of a tar file in the archive's order (in a single
        pass, which ends when all are found).

    Raises:
        DataError: as `list_members`, or a name is not in the archive.
    """
    path = Path(path)
    if archive_kind(path) != "zip":
        wanted = set(names)
        for member in _walk_tar(path, f"Reading {path.name}", frozenset(wanted).__contains__, progress):
            if member.content is not None:
                wanted.remove(member.name)
                yield member.name, member.content
                if not wanted:
                    return
        if wanted:
            raise DataError(f"{path} has no member {some(sorted(wanted))}")
        return
    with _open_zip(path) as archive:
        members = _zip_members(path, archive)
        absent = [name for name in names if name not in members]
        if absent:
            raise DataError(f"{path} has no member {some(absent)}")
        for name in names:
            _check_size(path, name, members[name].file_size)
        bar = tqdm(names, f"Reading {path.name}", delay=SLOW_SECONDS, leave=False, disable=not progress)
        for name in bar:
            try:
                with archive.open(members[name]) as stream:
                    content = stream.read(members[name].file_size)  # `read()` would unpack whatever there is
            except (zipfile.BadZipFile, zlib.error, EOFError, *_ZIP_ERRORS) as error:
                raise DataError(f"{path}: the member {name!r} is damaged ({error}); download it again") from error
            yield name, content


def _check_size(path: Path | str, name: str, size: int) -> None:
    if size > MAX_MEMBER_BYTES:
        raise DataError(
            f"{path}: the member {name!r} has {size / 1e6:,.0f} MB unpacked, more than {MAX_MEMBER_BYTES / 1e6:,.0f} "
            "MB; if that is no mistake, unpack the archive and give the folder"
        )


def free_bytes(folder: str | Path) -> int:
    """Free room on the disk of a folder, which need not exist yet."""
    folder = Path(os.path.realpath(usable_path(folder)))
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def _safe_name(name: str, archive: Path | str) -> str | None:
    """A member's name, cleaned; None for litter."""
    if _PLAIN.fullmatch(name) and "__MACOSX" not in name:
        return name
    parts = relative_parts(name)
    if parts is None:
        raise DataError(
            f"{archive} holds the member {name!r}, whose path leads out of the archive; expected relative paths "
            "without '..': this is not the official archive"
        )
    if not parts or any(is_hidden(part) for part in parts):
        return None
    clean = "/".join(parts)
    try:
        clean.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{archive}: the name of the member {name!r} is not valid UTF-8") from error
    return clean


# ---- zip


@contextlib.contextmanager
def _open_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise DataError(
            f"{path} is truncated: its table of contents, which a zip file has at its end, is missing ({error})"
            f"{_last_whole_zip_member(path)}. Download it again"
        ) from error
    except _ZIP_ERRORS as error:
        raise DataError(
            f"{path} is damaged: its table of contents can't be read ({error}). Download it again"
        ) from error
    with archive:
        yield archive


def _zip_members(path: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    members: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        name = _safe_name(info.filename, path)
        if name is None or info.is_dir():
            continue
        if info.external_attr >> 28 == 0o12 and is_image_name(name):
            raise DataError(f"{path}: the member {name!r} is a link; expected an image")
        if info.flag_bits & 1:
            raise DataError(f"{path}: the member {name!r} is encrypted; unpack the archive and give the folder")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DataError(
                f"{path}: the member {name!r} is packed by method {info.compress_type}; expected deflate or none: "
                "unpack the archive and give the folder"
            )
        if name in members:
            raise DataError(f"{path} holds the member {name!r} twice")
        if is_image_name(name):
            _check_size(path, name, info.file_size)
        members[name] = info
    return members


def _last_whole_zip_member(path: Path) -> str:
    """Walk the headers that stand before each member, as far as they go."""
    last, size = None, path.stat().st_size
    with path.open("rb") as stream:
        while True:
            head = stream.read(_ZIP_HEADER.size)
            if len(head) < _ZIP_HEADER.size:
                break
            signature, _, flags, _, _, _, _, packed, _, name_length, extra_length = _ZIP_HEADER.unpack(head)
            if signature != b"PK\3\4" or flags & 8:  # with bit 3, sizes stand behind the data
                break
            name = stream.read(name_length).decode("utf-8" if flags & 0x800 else "cp437", "replace")
            end = stream.seek(extra_length + packed, os.SEEK_CUR)
            if end > size:
                break
            last = name
    return "" if last is None else f"; the last whole member is {last!r}"


# ---- tar


class _Member(tarfile.TarInfo):
    """Notes that the archive's end mark was seen: `tarfile` takes a file cut off between two members as complete.

    It also refuses headers that `tarfile` would read for hours.
    """

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        info = super().frombuf(buf, encoding, errors)
        if info.size < 0 or (info.type in _EXTENDED and info.size > _MAX_HEADER_BYTES):
            raise tarfile.ReadError(f"a header says that {info.size} bytes follow")
        return info

    def _proc_pax(self, tarfile_object):
        """As `tarfile` does, which searches some versions' way for a number, in quadratic time."""
        stream = tarfile_object.fileobj
        content = stream.read(-(-self.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE)
        if _LONG_NUMBER.search(content):
            raise tarfile.ReadError("a header holds a number of more than 511 digits")
        tarfile_object.fileobj = _PutBack(content, stream)
        try:
            return super()._proc_pax(tarfile_object)
        finally:
            tarfile_object.fileobj = stream

    @classmethod
    def fromtarfile(cls, tarfile_object):
        try:
            return super().fromtarfile(tarfile_object)
        except tarfile.EOFHeaderError:
            tarfile_object.end_seen = True
            raise


class _PutBack:
    """A stream of which something has been read that the next `read` is to give."""

    def __init__(self, content: bytes, stream):
        self._content = content
        self._stream = stream
        self.tell = stream.tell

    def read(self, size: int) -> bytes:
        content, self._content = self._content, b""
        return content or self._stream.read(size)


class _Gzip(gzip.GzipFile):
    """Gives what could be read before it raises, so that the last whole member is known."""

    def read(self, size: int = -1) -> bytes:
        return self.read1(size)


class TarMember(NamedTuple):
    """A file in a tar file.

    Attributes:
        name: Cleaned, with `/`.
        size: Bytes.
        offset: Where its bytes begin in the tar file (in a compressed one: in what is unpacked); None where they are
            not one piece.
        content: Its bytes, if they were asked for.
    """

    name: str
    size: int
    offset: int | None
    content: bytes | None


def _walk_tar(
    path: Path, title: str, wants: Callable[[str], bool] = lambda name: False, progress: bool = True
) -> Iterator[TarMember]:
    """[`walk_tar`] of a file on disk, with a bar of its bytes."""
    with (
        tqdm(
            total=path.stat().st_size,
            desc=title,
            unit="B",
            unit_scale=True,
            delay=SLOW_SECONDS,
            mininterval=0.5,
            leave=False,
            disable=not progress,
        ) as bar,
        path.open("rb") as raw,
    ):
        for member in walk_tar(raw, archive_kind(path), path.stat().st_size, path, wants):
            yield member
            bar.update(raw.tell() - bar.n)


def walk_tar(
    raw: BinaryIO, kind: str, total: int, path: Path | str, wants: Callable[[str], bool] = lambda name: False
) -> Iterator[TarMember]:
    """Go through a tar file once, from front to back.

    Args:
        raw: It, opened for reading.
        kind: `tar` or `tar.gz`.
        total: Its bytes.
        path: What it is called in errors.
        wants: Which members' contents are given.

    Raises:
        DataError: as [`list_members`].
    """
    last, seen = None, set()
    most = total if kind == "tar" else total * _MOST_BYTES_PER_BYTE  # `tarfile` would go on reading at the end
    try:
        stream = _Gzip(fileobj=raw) if kind == "tar.gz" else raw
        tar = tarfile.open(fileobj=stream, mode="r|", tarinfo=_Member, bufsize=_BUFFER)  # noqa: SIM115
        while (info := tar.next()) is not None:
            tar.members.clear()  # or every member of a huge archive stays in memory
            if info.size < 0 or not info.offset < tar.offset <= most:
                raise EOFError(f"the file ends within a member of {info.size} bytes")
            name = _check_member(info, path, seen)
            wanted = name is not None and wants(name)
            if wanted:
                _check_size(path, name, info.size)
            content = tar.extractfile(info).read() if wanted else None
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.tell() < tar.offset:
                raise EOFError("the file ends within a member")
            if name is not None:
                yield TarMember(name, info.size, None if info.issparse() else info.offset_data, content)
            last = info.name
        if not getattr(tar, "end_seen", False):
            raise EOFError("the mark at an archive's end is missing, or a member's header is damaged")
        while stream.read(_BUFFER):  # a compressed file has its checksum at the end
            pass
    except DataError:
        raise
    except (
        *(EOFError, zlib.error, tarfile.TarError, OSError),
        *(ValueError, LookupError, ArithmeticError, RecursionError),  # of `tarfile`, on headers made to deceive
    ) as error:
        raise DataError(
            f"{path} is truncated or damaged ({error}); the last whole member is {last!r}. Download it again"
        ) from error


def _check_member(info: tarfile.TarInfo, path: Path | str, seen: set[str]) -> str | None:
    name = _safe_name(info.name, path)
    if name is None:
        return None
    if (info.issym() or info.islnk()) and is_image_name(name):
        raise DataError(f"{path}: the member {name!r} is a link to {info.linkname!r}; expected an image")
    if not info.isreg():
        return None
    if name in seen:
        raise DataError(f"{path} holds the member {name!r} twice")
    if is_image_name(name):
        _check_size(path, name, info.size)
    seen.add(name)
    return name
