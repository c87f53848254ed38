"""The images of a place, whatever it is: a folder, a list, a table, tar files, on a disk or at an address."""

from __future__ import annotations

from ..data_scripts.data_errors import DataError
from ..data_scripts.image_files import has_images
from ..data_scripts.paths import usable_path
from ..data_scripts.storage import is_address
from ..data_scripts.table_files import is_table_file, is_table_folder
from .image_sources import folder_source, list_source
from .storage_sources import TAR, storage_source
from .table_sources import table_source


def place_source(place, **options):
    """The images of a place.

    A `.txt` list, a table, or a folder; see `list_source`, `table_source`, `folder_source`. Tar files, a folder of
    them, and all that an address (`s3://bucket/photos`) leads to; see `storage_source`.

    Args:
        place: File, folder or address.
        **options: As for `table_source`, and `data_cache_dir`; of tables only.

    Raises:
        DataError: as these functions; or options for what is no table.
    """
    if is_address(place):
        return storage_source(place, **options)
    path = usable_path(place)
    if is_table_file(path) or is_table_folder(path):
        return table_source(path, options.pop("data_cache_dir", None), **options)
    if _is_tars(path):
        return storage_source(path, **options)
    if options:
        raise DataError(f"{', '.join(options)}: {place} is no table; all of its images are taken, with their folders")
    return list_source(path) if path.suffix.lower() == ".txt" else folder_source(path)


def _is_tars(path):
    """Whether a path is that of a tar file, or of a folder with such and without images."""
    if not path.is_dir():
        return path.suffix.lower() == TAR and path.is_file()
    return any(file.suffix.lower() == TAR for file in path.iterdir()) and not has_images(path)


__all__ = ["place_source"]
