"""Columns of stores and indexes: what further is known of each item, as texts or numbers."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa

from ..data_scripts.data_errors import some


CLASS_COLUMN = "class_name"
# Of an item: the digest of its image's file, and the number of its source in `sources`
CONTENT_COLUMN, SOURCE_COLUMN = "vptsp_content", "vptsp_source"
HIDDEN_COLUMNS = (CONTENT_COLUMN, SOURCE_COLUMN)
# What the indexes call their own columns
INDEX_COLUMNS = ("key", "id", "embedding", *HIDDEN_COLUMNS)
_ARROW_TYPES = {"text": pa.string(), "integer": pa.int64(), "number": pa.float64()}
_LARGEST = 2**63


def own_columns(source):
    """Columns of a source that go along with its images.

    Args:
        source: `ImageSource`; its `columns` are dict of name -> n texts, numbers or None.

    Returns:
        Dict of name -> list.

    Raises:
        ValueError: a column has values of different kinds; the message names it.
    """
    return {name: check_values(values, name) for name, values in source.columns.items()}


def check_items(ids, embeddings, metadata, max_id_bytes=None, max_text_bytes=None):
    """Ids and metadata as lists, if there is one of each per embedding and a file can hold them all.

    Args:
        ids: n different texts.
        embeddings: n of them.
        metadata: Column -> n texts, or n numbers, or None among either (classes are texts); or None.
        max_id_bytes, max_text_bytes: What an id and another text may take in UTF-8; None: anything.

    Returns:
        List of ids, and dict of column -> list.

    Raises:
        ValueError: something else, which the message names.
    """
    ids = check_texts(ids, "ids", max_id_bytes)
    if len(set(ids)) < len(ids):
        raise ValueError(f"ids must differ, got {len(ids) - len(set(ids))} that occur more than once")
    columns = check_metadata(metadata, max_text_bytes)
    for name, values in (("ids", ids), *columns.items()):
        if len(values) != len(embeddings):
            raise ValueError(f"{name} must have one entry per embedding, {len(embeddings)}, got {len(values)}")
    return ids, columns


def check_metadata(metadata, max_bytes=None):
    """Metadata as dict of lists, if a file can hold them; see [`check_items`]."""
    names = check_texts(metadata or {}, "names of columns")
    if reserved := sorted(set(names) & set(INDEX_COLUMNS)):
        raise ValueError(f"a column of metadata can't be called {some(reserved)}: the index has its own")
    checks = {name: check_texts if name == CLASS_COLUMN else check_values for name in names}
    return {name: checks[name](values, name, max_bytes) for name, values in (metadata or {}).items()}


def check_texts(values, name, max_bytes=None):
    """Values as a list, if all of them are texts that UTF-8 can hold, in `max_bytes` at most; else a ValueError."""
    if isinstance(values, (str, bytes)):
        raise ValueError(f"{name} must be texts, got a single one: {values!r}")
    values = list(values)
    for value in values:
        if not isinstance(value, str):
            raise ValueError(f"{name} must be texts, got {value!r} among them")
        _check_text(value, name, max_bytes)
    return values


def _check_text(value, name, max_bytes):
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise ValueError(f"{name} must be texts that UTF-8 can hold, got {value!r} among them") from None
    if max_bytes is not None and size > max_bytes:
        raise ValueError(f"{name} must take at most {max_bytes} bytes in UTF-8, got {size}: {value[:50]!r}...")


def check_values(values, name, max_bytes=None):
    """Values as a list, if all but None are texts, or all but None finite numbers; else a ValueError."""
    if isinstance(values, (str, bytes)):
        raise ValueError(f"{name} must be a list of texts or numbers, got a single one: {values!r}")
    values = [value.item() if isinstance(value, np.generic) else value for value in values]
    texts, numbers = [], []
    for value in values:
        if isinstance(value, str):
            _check_text(value, name, max_bytes)
            texts.append(value)
        elif _is_number(value):
            numbers.append(value)
        elif value is not None:
            raise ValueError(f"{name} must be texts, finite numbers or None, got {value!r} among them")
    if texts and numbers:
        raise ValueError(f"{name} must be all texts or all numbers, got {texts[0]!r} and {numbers[0]!r} among them")
    return values


def _is_number(value):
    """Whether a file can hold it: finite, or whole in 64 bits."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool) and -_LARGEST <= value < _LARGEST


def kind_of(values):
    """`text`, `integer` or `number` (not all of them whole); None where all are None."""
    kinds = {type(value) for value in values} - {type(None)}
    if not kinds:
        return None
    return "text" if str in kinds else "integer" if kinds == {int} else "number"


def arrow_column(values, kind=None):
    """Checked values as an Arrow array, of their own kind or of that."""
    return pa.array(values, _ARROW_TYPES[kind or kind_of(values) or "text"])


def kind_of_arrow(arrow_type):
    """The kind of an Arrow column that [`arrow_column`] made; None of any other."""
    return next((kind for kind, made in _ARROW_TYPES.items() if made == arrow_type), None)


def common_kind(name, there, new):
    """The kind that holds both, `number` of integers and numbers.

    Raises:
        ValueError: texts and numbers.
    """
    kinds = {there, new} - {None}
    if kinds == {"integer", "number"}:
        return "number"
    if len(kinds) > 1:
        raise ValueError(f"the column {name!r} holds {_PLURALS[there]} in the index, got {_PLURALS[new]}")
    return kinds.pop() if kinds else None


_PLURALS = {"text": "texts", "integer": "whole numbers", "number": "numbers"}


__all__ = [
    "CLASS_COLUMN",
    "CONTENT_COLUMN",
    "HIDDEN_COLUMNS",
    "INDEX_COLUMNS",
    "SOURCE_COLUMN",
    "arrow_column",
    "check_items",
    "check_metadata",
    "check_texts",
    "check_values",
    "common_kind",
    "kind_of",
    "kind_of_arrow",
    "own_columns",
]
