"""Images where no path leads: buckets and whatever else pyarrow and fsspec read, by address.

    storage = Storage.open("s3://bucket/photos")
    storage.read("mug/1.jpg")

Credentials and the address of a service that speaks S3 come from the environment, as pyarrow has it: `AWS_*` (with
`AWS_ENDPOINT_URL`), or `?endpoint_override=...` behind the address.

Nothing here imports torch or `datasets`.
"""

import posixpath
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import fs

from .data_errors import DataError
from .image_files import ImageFile, is_hidden
from .paths import usable_path


__all__ = ["Storage", "is_address"]

_BUFFER = 1 << 20


def is_address(place: Any) -> bool:
    """Whether a place is an address (`s3://bucket/photos`) and no path."""
    return isinstance(place, str) and "://" in place


class Storage(NamedTuple):
    """A place on a file system of pyarrow; picklable, and so what workers read from.

    Attributes:
        address: As it was given, without what follows a question mark; for errors and descriptions.
        filesystem: Of pyarrow.
        root: The place's path there.
    """

    address: str
    filesystem: fs.FileSystem
    root: str

    @classmethod
    def open(cls, place: str | Path) -> "Storage":
        """Find what an address or a path leads to.

        Args:
            place: `s3://bucket/folder`, `gs://...`, `file:///folder`, `fsspec+PROTOCOL://...` (what fsspec reads),
                or a path.

        Raises:
            DataError: no such file system is known, its package is missing, or the address holds a password.
        """
        if not is_address(place):
            path = str(usable_path(place).absolute())
            return cls(path, fs.LocalFileSystem(), path)
        address = str(place).partition("?")[0].rstrip("/")
        if urlsplit(str(place)).password is not None or "@" in urlsplit(str(place)).netloc:
            raise DataError(
                f"an address must hold no user and password, as stores name it: give them in the environment "
                f"(AWS_ACCESS_KEY_ID, ...), got one for {address.rpartition('@')[2]}"
            )
        try:
            filesystem, root = fs.FileSystem.from_uri(str(place))
        except (pa.ArrowException, ImportError, ValueError, TypeError) as error:
            raise DataError(f"can't read from {address}: {error}") from error
        return cls(address, filesystem, root.rstrip("/"))

    def files(self) -> list[ImageFile]:
        """All files at the place, however deep, sorted by path from there; the place itself (`""`) if it is a file.

        What is hidden, or lies in hidden folders, is passed over.

        Raises:
            DataError: nothing is there, or it can't be listed.
        """
        with self._named(""):
            (here,) = self.filesystem.get_file_info([self.root])
            if here.type == fs.FileType.File:
                return [_listed(here, "")]
            found = self.filesystem.get_file_info(fs.FileSelector(self.root, recursive=True, allow_not_found=True))
        names = ((info, posixpath.relpath(info.path, self.root)) for info in found if info.type == fs.FileType.File)
        files = sorted(_listed(info, name) for info, name in names if not any(map(is_hidden, name.split("/"))))
        if not files:
            raise DataError(f"there is nothing at {self.address}")
        return files

    def place(self, name: str) -> str:
        """What a file is called in errors."""
        return f"{self.address}/{name}" if name else self.address

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        """Contents of a file, or `size` bytes of it.

        Raises:
            DataError: it can't be read, or ends before.
        """
        with self._named(name), self.filesystem.open_input_file(self._path(name)) as stream:
            size = stream.size() if size is None else size
            content = stream.read_at(size, offset)
        if len(content) < size:
            raise DataError(f"{self.place(name)} ends after {offset + len(content):,} bytes, expected more")
        return content

    @contextmanager
    def stream(self, name: str) -> Iterator[pa.NativeFile]:
        """A file to be read from front to back."""
        with self._named(name), self.filesystem.open_input_stream(self._path(name), buffer_size=_BUFFER) as stream:
            yield stream

    def input_file(self, name: str) -> pa.NativeFile:
        """A file to be read here and there."""
        with self._named(name):
            return self.filesystem.open_input_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root

    @contextmanager
    def _named(self, name: str) -> Iterator[None]:
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{self.place(name)} can't be read: {error}") from error


def _listed(info: fs.FileInfo, name: str) -> ImageFile:
    return ImageFile(name, info.size, info.mtime_ns or 0)
