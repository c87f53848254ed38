"""The test images of a run, as the run has recorded them; and what is to be said of images that it trained on."""

from __future__ import annotations

import logging
from dataclasses import fields

import numpy as np

from ..data_scripts.data_arguments import DataArguments, check_data_arguments
from ..data_scripts.data_errors import DataError, some
from ..data_scripts.split_record import PLACES, SPLITS_NAME, read_split_record
from ..data_scripts.torch_dataset import ImageDataset
from .image_sources import joined_source
from .table_sources import split_source


logger = logging.getLogger(__name__)


def recorded_sources(model, data):
    """The images that a run has kept apart, by its record.

    They are looked up by name, so that photos that came later change nothing, and one that went is an error.

    Args:
        model: Folder of the run.
        data: Options of data that were given, of `PLACES`: where the images are now.

    Returns:
        Per split (and `train`) its `ImageSource`; None where there is no record, or it is of other data.

    Raises:
        DataError: the data can't be loaded, or images of the record are not there or have another class.
    """
    record = read_split_record(model)
    if record is None or not set(data) <= set(PLACES):
        return None
    known = {item.name for item in fields(DataArguments)}
    given = {name: value for name, value in record["data"].items() if name in known} | data
    if given["dataset_name"] != record["data"]["dataset_name"]:
        return None
    where = f"{model}/{SPLITS_NAME}"
    try:
        arguments = DataArguments(**given)
        check_data_arguments(arguments)
        splits = arguments.load_splits()
    except DataError as error:
        raise DataError(f"the images that {where} names: {error}; --data_dir says where they are now") from error
    place = f"{arguments.dataset_name}{'' if arguments.data_dir is None else f' in {arguments.data_dir}'}"
    seen = ", classes that training has seen" if record["seen_classes"] else ""
    sources = {name: split_source(split, f"{name} of {place}", arguments.data_dir) for name, split in splits.items()}
    if any(source.image_root is None for source in sources.values()):
        _check_unchanged(record, splits, where)
        return {name: _described(source, f"{name} of {place}{seen}, by {where}") for name, source in sources.items()}
    everything = joined_source(sources, f"all of {place}")
    parts = {name: part["classes"] for name, part in record["splits"].items()}
    if "data_dir" in data and not set(everything.ids) & {name for classes in parts.values() for name in _all(classes)}:
        return None
    return {
        name: _chosen(everything, classes, f"{name} of {place}{seen}, by {where}") for name, classes in parts.items()
    }


def _described(source, description):
    source.description = description
    return source


def _all(classes):
    return [name for names in classes.values() for name in names or ()]


def _check_unchanged(record, splits, where):
    """Images in tables have no names of their own: the data must be what they were."""
    for name, split in splits.items():
        part = record["splits"].get(name, {"classes": {}})
        if None in part["classes"].values():  # a stream, of which classes are known
            same = list(part["classes"]) == split.features["label"].names
        else:
            same = ImageDataset(split, None).fingerprint() == part.get("fingerprint")
        if not same:
            raise DataError(
                f"the images of the split {name} are no longer those that {where} names: give the data with the "
                "options that split them"
            )


def _chosen(everything, classes, description):
    """Rows of a source by a record: class -> names of images, or None for all of the class."""
    class_of = {name: class_name for class_name, names in classes.items() for name in names or ()}
    whole = {class_name for class_name, names in classes.items() if names is None}
    place_of = {name: row for row, name in enumerate(everything.ids)}
    if missing := [name for name in class_of if name not in place_of]:
        raise DataError(
            f"{description}: {len(missing):,} of the {len(class_of):,} images are no longer there: {some(missing)}"
        )
    if moved := [name for name in class_of if everything.class_name(place_of[name]) != class_of[name]]:
        raise DataError(f"{description}: {len(moved):,} images have another class now: {some(moved)}")
    rows = [place_of[name] for name in class_of]
    rows += [row for row in range(len(everything)) if everything.class_name(row) in whole]
    class_names = list(classes)
    labels = np.array([class_names.index(everything.class_name(row)) for row in rows], dtype=np.int64)
    return everything.select(rows, description, labels=np.ma.array(labels), class_names=class_names)


def say_trained_on(model, sources):
    """Say of images to score how many are of classes that the model was trained on, as far as a record tells."""
    record = read_split_record(model)
    if record is None:
        return
    trained = set(record["splits"]["train"]["classes"])
    for name, source in sources.items():
        classes = {source.class_names[label] for label in source.labels.compressed()}
        if shared := sorted(classes & trained):
            logger.warning(
                "%s: %d of the %d classes (%s) are called as classes that %s was trained on, so scores on them don't "
                "show what it does with new ones; without --images and options of data, the run's own test images are "
                "taken",
                name if source.description is None else source.description,
                len(shared),
                len(classes),
                some(shared),
                model,
            )


__all__ = ["recorded_sources", "say_trained_on"]
