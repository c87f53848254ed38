"""Labels of several data sets, each of which numbers its classes in its own way."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import datasets

from .given_splits import labels_of
from .labels import check_label


__all__ = ["labels_by_name"]


def labels_by_name(splits: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Splits of several origins, whose `ClassLabel`s number their classes each in its own way: with texts for labels.

    Where no two differ, and where some are numbers without names, they stay as they are.

    Args:
        splits: As for `split_given`.
        where: What they are, for errors.

    Raises:
        DataError: a label is missing or none of the `ClassLabel`'s.
    """
    features = [split.features["label"] for split in splits.values()]
    named = [isinstance(feature, datasets.ClassLabel) for feature in features]
    is_text = [isinstance(feature, datasets.Value) and "string" in feature.dtype for feature in features]
    if all(feature == features[0] for feature in features) or not all(map(max, named, is_text)):
        return dict(splits)
    return {
        name: _with_texts(split, f"{where}, split {name}") if has else split
        for (name, split), has in zip(splits.items(), named, strict=True)
    }


def _with_texts(split, where: str):
    names, text = split.features["label"].names, datasets.Value("string")
    if isinstance(split, datasets.IterableDataset):
        features = datasets.Features({**split.features, "label": text})
        return split.map(partial(_named, names, where), input_columns=["label"], features=features)
    texts = [names[label] for label in labels_of(split, where)]
    return split.remove_columns("label").add_column("label", texts, feature=text)


def _named(names: list[str], where: str, label: Any) -> dict[str, str]:
    return {"label": names[check_label(label, len(names), f"{where}: a row")]}
