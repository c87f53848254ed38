"""In-Shop Clothes Retrieval (DeepFashion; Liu et al., CVPR 2016): 7,982 garments, split by one list.

Layouts (`list_eval_partition.txt` may also lie in `Eval/` or `Anno/`, as in the official folder, or another one):

    list_eval_partition.txt, img/WOMEN/...       or Img/img/WOMEN/...
    list_eval_partition.txt, img.zip             or Img/img.zip: the official archive itself
    list_eval_partition.txt, img_highres/...     or Img/img_highres/, img_highres.zip: the same images, larger
"""

import logging
from typing import NamedTuple

from ..archives import list_members
from ..builder import BenchmarkConfig, ImageDatasetBuilder
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
    tar_names,
)


__all__ = ["INSHOP_COUNTS", "InShop"]

logger = logging.getLogger(__name__)

INSHOP_COUNTS = {
    "train": SplitCounts(25882, 3997),
    "query": SplitCounts(14218, 3985),
    "gallery": SplitCounts(12612, 3985),
}
LIST = "list_eval_partition.txt"
_HEADER = ["image_name", "item_id", "evaluation_status"]
_LIST_FOLDERS = ("Eval", "Anno")
_IMAGES = ("img", "img_highres")
"""Folders of the images, or their archives; the published scores are those of the first."""


class _Place(NamedTuple):
    images: object
    list_file: object


class InShop(ImageDatasetBuilder):
    """In-Shop Clothes Retrieval: splits `train`, `query` and `gallery`.

    `data_dir` is the folder that holds the list (or `Eval/` with it) and the images or their archive, or the archive.
    Classes are the items, labels follow their ids (`id_00000002`); query and gallery share theirs.

    Raises:
        DataError: list or images not found (the message says which folder was meant), a line that can't be read, an
            image named twice, an item in training and test, or, unless `verify_counts=False`, missing images or
            counts that are not the published ones.
    """

    BUILDER_CONFIG_CLASS = BenchmarkConfig
    DESCRIPTION = "In-Shop Clothes Retrieval: 52,712 images of 7,982 garments; train, query and gallery."

    @classmethod
    def _list(cls, config: BenchmarkConfig) -> SplitListing:
        place = locate(config.data_dir, _find, _beside, f"{LIST} and img/ or img.zip")
        if place.images.is_dir():
            source = folder_images(place.images)
        else:
            members = list_members(place.images, config.index_dir)
            inside = (name for name in _IMAGES if any(f"/{name}/" in f"/{file.path}" for file in members))
            source = archive_images(place.images, members, next(inside, _IMAGES[0]))
        entries = _parse(place.list_file.read_bytes(), str(place.list_file), config.verify_counts)
        refuse_repeats(entries)
        return list_benchmark(
            entries,
            [source],
            dataset="inshop",
            title="In-Shop Clothes",
            counts=INSHOP_COUNTS if config.verify_counts else None,
            version=str(cls.VERSION),
        )


def _find(root):
    list_file = find_list(root, [LIST], _LIST_FOLDERS)
    if list_file is None:
        return None
    found = [images for name in _IMAGES if (images := _images(root, name)) is not None]
    if not found:
        raise DataError(
            f"{root} holds {LIST}, but no images: expected img/, Img/img/, img.zip, Img/img.zip or the same of "
            "img_highres"
        )
    if len(found) > 1:
        logger.warning("%s: the images are those of %s, not of %s", root, found[0], found[1])
    return _Place(found[0], list_file)


def _images(root, name: str):
    for folder in (root / name, root / "Img" / name):
        if folder.is_dir():
            return folder
    return find_file([root, root / "Img"], (f"{name}.zip", *tar_names(name)))


def _beside(archive):
    above = archive.parent.parent  # what else lies there may be other data sets
    list_file = find_list(archive.parent, [LIST], _LIST_FOLDERS) or find_file(
        [above, *(above / name for name in _LIST_FOLDERS)], [LIST]
    )
    if list_file is None:
        raise DataError(f"{LIST} is missing: expected it beside {archive}, or in Eval/")
    return _Place(archive, list_file)


def _parse(content: bytes, where: str, strict: bool) -> dict[str, list[Entry]]:
    """A line with the number of images, a header, then lines of `image_name item_id evaluation_status`."""
    entries: dict[str, list[Entry]] = {"train": [], "query": [], "gallery": []}
    announced = None
    for line_where, line in parse_list(content, where):
        fields = line.rsplit(None, 2)
        if announced is None and line.isdecimal():
            announced = int(line)
            continue
        if fields == _HEADER:
            continue
        item = fields[1].removeprefix("id_") if len(fields) == 3 else ""
        if not item.isdecimal() or fields[2] not in entries:
            raise DataError(
                f"{line_where}: expected an image, an item like id_00000002, and train, query or gallery; got {line!r}"
            )
        path = list_path(fields[0], line_where).removeprefix("img/")
        entries[fields[2]].append(Entry(int(item), fields[1], path, line_where))
    found = sum(map(len, entries.values()))
    if strict and announced is not None and announced != found:
        raise DataError(
            f"{where}: its first line announces {announced:,} images, but it names {found:,}; the download may be cut "
            "off. verify_counts=False takes it as it is"
        )
    return entries
