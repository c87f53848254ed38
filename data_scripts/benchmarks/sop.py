"""Stanford Online Products (Oh Song et al., CVPR 2016): 22,634 products of an auction site, split by lists.

Layouts:

    Ebay_train.txt, Ebay_test.txt, bicycle_final/*.JPG, ...               under Stanford_Online_Products/, as the
                                                                          official archive unpacks to
    Info_Files/Ebay_train.txt, Info_Files/Ebay_test.txt, images/bicycle_final/*.JPG, ...  (or another folder of lists)
    Stanford_Online_Products.zip                                          the official archive itself
"""

from typing import NamedTuple

from ..archives import archive_kind, list_members, read_members
from ..builder import BenchmarkConfig, ImageDatasetBuilder
from ..class_folders import visible_folders
from ..data_errors import DataError
from ..listing import SplitCounts, SplitListing
from ..sources import (
    Entry,
    archive_images,
    find_file,
    find_list,
    folder_images,
    list_benchmark,
    list_path,
    locate,
    parse_list,
    refuse_repeats,
)


__all__ = ["SOP_COUNTS", "StanfordOnlineProducts"]

SOP_COUNTS = {"train": SplitCounts(59551, 11318), "test": SplitCounts(60502, 11316)}
LISTS = {"train": "Ebay_train.txt", "test": "Ebay_test.txt"}
_HEADER = ["image_id", "class_id", "super_class_id", "path"]
_TOP = "Stanford_Online_Products"
_OWN_ENDINGS = (".txt",)  # the lists lie among the images
_ARCHIVES = (f"{_TOP}.zip", f"{_TOP}.tar.gz", f"{_TOP}.tgz", f"{_TOP}.tar")


class _Place(NamedTuple):
    images: object
    lists: object
    """The folder of the lists; None: in the archive."""


class StanfordOnlineProducts(ImageDatasetBuilder):
    """Stanford Online Products.

    `data_dir` is the folder that holds the lists (or `Info_Files` with them) and the twelve `*_final` folders (or
    `images` with them), the one above, the one with the archive, or the archive. Labels follow the lists' `class_id`;
    products have no names, so a class is called by its kind and id, as in `bicycle 11319`.

    Raises:
        DataError: nothing found (the message says which folder was meant), a list's line that can't be read, an
            image named twice, a class in both lists, or, unless `verify_counts=False`, missing images or counts that
            are not the published ones.
    """

    BUILDER_CONFIG_CLASS = BenchmarkConfig
    DESCRIPTION = "Stanford Online Products: 120,053 images of 22,634 products; split by the official lists."

    @classmethod
    def _list(cls, config: BenchmarkConfig) -> SplitListing:
        place = locate(
            config.data_dir,
            _find,
            lambda archive: _Place(archive, None),
            f"Ebay_train.txt (there, in Info_Files/ or in {_TOP}/) or {_TOP}.zip",
        )
        if place.lists is None:
            members = list_members(place.images, config.index_dir)
            lists = _lists_of_archive(place.images, [file.path for file in members])
            source = archive_images(place.images, members, lists.pop("top"), _OWN_ENDINGS)
        else:
            lists = {}
            for split, name in LISTS.items():
                file = place.lists / name
                if not file.is_file():
                    raise DataError(f"{place.lists} holds only one of the lists; {name} is missing")
                lists[split] = (str(file), file.read_bytes())
            source = folder_images(place.images, _OWN_ENDINGS)
        entries = {split: list(_parse(content, where)) for split, (where, content) in lists.items()}
        refuse_repeats(entries)
        return list_benchmark(
            entries,
            [source],
            dataset="sop",
            title="Stanford Online Products",
            counts=SOP_COUNTS if config.verify_counts else None,
            version=str(cls.VERSION),
        )


def _find(root):
    without_images = None
    for folder in (root, root / _TOP):
        lists = find_list(folder, list(LISTS.values()), ["Info_Files", _TOP]) if folder.is_dir() else None
        if lists is None:
            continue
        for images in (folder, folder / "images", folder / _TOP):
            if images.is_dir() and any(name.endswith("_final") for name in visible_folders(images)):
                return _Place(images, lists.parent)
        without_images = lists
    archive = find_file([root], _ARCHIVES)
    if archive is not None:
        return _Place(archive, None)
    if without_images is not None:
        raise DataError(
            f"{without_images.parent} holds the lists, but there are no image folders (bicycle_final, ...)"
        )
    return None


def _lists_of_archive(archive, names: list[str]) -> dict:
    """The two lists, and the folder of the archive that they lie in."""
    found = {}
    for split, list_name in LISTS.items():
        matches = sorted((name for name in names if f"/{name}".endswith(f"/{list_name}")), key=len)
        if not matches:
            raise DataError(f"{archive} holds no {list_name}; it is not the official archive ({_TOP}.zip)")
        found[split] = matches[0]
    contents = dict(read_members(archive, list(found.values()), progress=archive_kind(archive) != "zip"))
    top = found["train"].rpartition("/")[0].removesuffix("/Info_Files")
    if not top:
        raise DataError(f"{archive} holds {LISTS['train']} at its top; expected it in a folder {_TOP}/")
    return {split: (f"{archive}/{name}", contents[name]) for split, name in found.items()} | {"top": top}


def _parse(content: bytes, where: str):
    """Lines of `image_id class_id super_class_id path`, under a header of these words."""
    for line_where, line in parse_list(content, where):
        fields = line.split(None, 3)
        if [field.lower() for field in fields] == _HEADER:
            continue
        if len(fields) != 4 or not all(field.isdecimal() for field in fields[:3]):
            raise DataError(
                f"{line_where}: expected image_id class_id super_class_id path (three numbers and a path), "
                f"got {line!r}"
            )
        path = list_path(fields[3], line_where)
        kind = path.split("/")[0].removesuffix("_final") if "/" in path else "product"
        yield Entry(int(fields[1]), f"{kind} {int(fields[1])}", path, line_where)
