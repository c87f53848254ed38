"""Repositories in the form of retrieval benchmarks (MTEB, BEIR): a corpus, queries, and which image answers which.

Their configurations, as MTEB names them:

    corpus             id (or _id), image
    query, or queries  id (or _id), image
    qrels, or default  query-id, corpus-id, score      a score above 0: the image answers the query

or `<configuration>-corpus` and so on. Classes are read off the qrels, and must be all that these say: images of a
class all answer all its queries, but for an image that is the query itself.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from .data_errors import DataError, some
from .data_fingerprint import content_digest
from .given_splits import ColumnsConfig, image_column_of, named_columns


__all__ = ["read_retrieval_set", "retrieval_parts"]

logger = logging.getLogger(__name__)

CLASS_COLUMN = "class by qrels"
_QREL_COLUMNS = ("query-id", "corpus-id", "score")


def retrieval_parts(names: Sequence[str], config: str | None = None) -> dict[str, str] | None:
    """Which configuration holds `corpus`, `query` and `qrels`; None where a repository has no such form.

    Args:
        names: Of all its configurations.
        config: The one that is asked for, if any.

    Example:
        >>> retrieval_parts(["corpus", "qrels", "query"])
        {'corpus': 'corpus', 'query': 'query', 'qrels': 'qrels'}
    """
    start = "" if config is None else f"{config}-"
    wanted = {
        "corpus": [f"{start}corpus"],
        "query": [f"{start}query", f"{start}queries"],
        "qrels": [f"{start}qrels"] if start else ["default", "qrels"],
    }
    found = {part: next((name for name in options if name in names), None) for part, options in wanted.items()}
    return None if config in names or None in found.values() else found


def read_retrieval_set(
    load: Callable[[str], Mapping[str, datasets.Dataset]],
    parts: Mapping[str, str],
    split: str | None,
    config: ColumnsConfig,
    where: str,
) -> dict[str, datasets.Dataset]:
    """Queries and gallery, with the columns `image`, `label` (text) and further ones.

    Args:
        load: Gives the splits of a configuration.
        parts: As of `retrieval_parts`.
        split: Of the qrels; None for `test`, or the only one.
        config: Options; of the columns, `image_column` alone.
        where: What it is, for errors.

    Returns:
        `query`, those that an image answers, and `gallery`, the whole corpus. Classes are called by the first query
        that asks for them (`query <id>`), images that answer none by themselves (`corpus <id>`).

    Raises:
        DataError: a split, column, id or image is missing or there twice, or the qrels are no classes.
    """
    qrels = load(parts["qrels"])
    chosen = _choose(qrels, split, "test", f"{where}, {parts['qrels']}")
    sides = {}
    for side in ("query", "corpus"):
        found = load(parts[side])
        name = chosen if chosen in found else _choose(found, None, side, f"{where}, {parts[side]}")
        sides[side] = _Side(found[name], config, f"{where}, {parts[side]}, split {name}")
    query, corpus = sides.values()
    pairs = _pairs(qrels[chosen], query, corpus, f"{where}, {parts['qrels']}, split {chosen}")
    classes = _classes(pairs, query, corpus, where)
    asked = np.unique(pairs[:, 0])
    if len(asked) < len(query.ids):
        logger.warning("%s: no image answers %d queries, left out", where, len(query.ids) - len(asked))
    first = {classes[row]: query.ids[row] for row in asked[::-1].tolist()}
    labels = [first.get(classes[len(query.ids) + row]) for row in range(len(corpus.ids))]
    if alone := labels.count(None):
        logger.warning("%s: %d images of the corpus answer no query; each is a class of its own", where, alone)
    names = [f"corpus {corpus.ids[row]}" if label is None else f"query {label}" for row, label in enumerate(labels)]
    return {
        "query": query.labelled([f"query {first[classes[row]]}" for row in asked.tolist()], asked),
        "gallery": corpus.labelled(names),
    }


def _choose(found: Mapping[str, Any], given: str | None, usual: str, where: str) -> str:
    """The split that is given, the usual one, or the only one."""
    if given is None and usual not in found and len(found) == 1:
        return next(iter(found))
    name = usual if given is None else given
    if name not in found:
        raise DataError(f"{where} has the splits {', '.join(found)}, not {name!r}: give one as test_split")
    return name


class _Side:
    """Queries or corpus."""

    def __init__(self, rows: datasets.Dataset, config: ColumnsConfig, where: str):
        column = next((name for name in ("id", "_id") if name in rows.column_names), None)
        if column is None:
            raise DataError(f"{where}: expected a column id or _id, got {', '.join(rows.column_names)}")
        self.where, self.config = where, config
        self.image = image_column_of(rows.features, config, where)
        if not isinstance(rows.features[self.image], datasets.Image):
            raise DataError(f"{where}: {self.image!r} must hold images, got {rows.features[self.image]}")
        self.rows = rows.cast_column(self.image, datasets.Image(decode=False))
        self.ids = [str(value) for value in self.rows[column]]
        self.row_of = {name: row for row, name in enumerate(self.ids)}
        if len(self.row_of) < len(self.ids):
            twice = next(name for row, name in enumerate(self.ids) if self.row_of[name] != row)
            raise DataError(f"{where}: the id {twice!r} is there twice")
        stored = self.rows.with_format("arrow", columns=[self.image])[:].column(self.image)
        known = [pc.is_valid(pc.struct_field(stored, part)).to_numpy() for part in ("bytes", "path")]
        missing = np.flatnonzero(~(known[0] | known[1]))
        if len(missing):
            raise DataError(
                f"{where}: {len(missing)} of {len(self.ids)} rows have no image in the column {self.image!r}, the "
                f"first is {self.ids[missing[0]]!r}; only images can be embedded"
            )

    def digest(self, row: int) -> bytes:
        stored = self.rows[row][self.image]
        return content_digest(stored["path"] if stored["bytes"] is None else stored["bytes"])

    def labelled(self, labels: list[str], rows: np.ndarray | None = None) -> datasets.Dataset:
        part = self.rows if rows is None else self.rows.select(rows)
        part = part.add_column(CLASS_COLUMN, labels, feature=datasets.Value("string"))
        return named_columns(part, self.config, self.where, self.image, CLASS_COLUMN)


def _pairs(qrels: datasets.Dataset, query: _Side, corpus: _Side, where: str) -> np.ndarray:
    """`(n, 2)` rows of a query and an image that answers it, each pair once."""
    columns = {name.replace("_", "-"): name for name in qrels.column_names}
    if absent := [name for name in _QREL_COLUMNS if name not in columns]:
        raise DataError(f"{where}: expected the columns {', '.join(_QREL_COLUMNS)}, {', '.join(absent)} is missing")
    of_query, of_corpus, scores = (list(qrels[columns[name]]) for name in _QREL_COLUMNS)
    pairs = set()
    for row, (asking, answer, score) in enumerate(zip(of_query, of_corpus, scores, strict=True)):
        if not isinstance(score, (int, float)) or score != score:
            raise DataError(f"{where}: row {row} has the score {score!r}; expected a number")
        if score <= 0:
            continue
        for name, side in ((str(asking), query), (str(answer), corpus)):
            if name not in side.row_of:
                raise DataError(f"{where}: row {row} names {name!r}, which is not in {side.where}")
        pairs.add((query.row_of[str(asking)], corpus.row_of[str(answer)]))
    if not pairs:
        raise DataError(f"{where}: no image answers any query (no score is above 0)")
    return np.array(sorted(pairs), dtype=np.int64)


def _joined_by(pairs: np.ndarray, query: _Side, corpus: _Side) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A number per query, then per image of the corpus, the same where pairs join them; and how many have each."""
    total = len(query.ids) + len(corpus.ids)
    ends = pairs[:, 0], pairs[:, 1] + len(query.ids)
    graph = coo_array((np.ones(len(pairs), dtype=np.int8), ends), shape=(total, total))
    count, numbers = connected_components(graph, directed=False)
    return numbers, *(np.bincount(part, minlength=count) for part in np.split(numbers, [len(query.ids)]))


def _same_images(pairs: np.ndarray, query: _Side, corpus: _Side) -> np.ndarray:
    """Of two images that each ask for the other: which query is which image of the corpus.

    Where an image asks for two others or more, the pairs join them all; for one other, they don't.
    """
    digests = [(query.digest(row), corpus.digest(image)) for row, image in pairs.tolist()]
    place = {image: number for number, (_, image) in enumerate(digests)}
    same = []
    for number, (asking, image) in enumerate(digests):
        other = place.get(asking, number)
        if other != number and digests[other][0] == image:
            same.append((pairs[number, 0], pairs[other, 1]))
    return np.array(same, dtype=np.int64).reshape(-1, 2)


def _classes(pairs: np.ndarray, query: _Side, corpus: _Side, where: str) -> list[int]:
    """A number per query, then per image of the corpus: the same for those that the pairs join.

    Raises:
        DataError: one of them doesn't answer another.
    """
    first = pairs[:, 0]
    classes, queries, images = _joined_by(pairs, query, corpus)
    alone = pairs[(queries[classes[first]] == 1) & (images[classes[first]] == 1)]
    if len(same := _same_images(alone, query, corpus)):
        classes, queries, images = _joined_by(np.concatenate([pairs, same]), query, corpus)
    count = len(queries)
    lacking = np.flatnonzero(np.bincount(classes[first], minlength=count) < queries * images)
    members: dict[int, list[int]] = {int(number): [] for number in lacking}
    answers: dict[int, set[int]] = {row: set() for row in np.flatnonzero(np.isin(classes[: len(query.ids)], lacking))}
    for row in np.flatnonzero(np.isin(classes[len(query.ids) :], lacking)).tolist():
        members[int(classes[len(query.ids) + row])].append(row)
    for row, image in pairs[np.isin(classes[first], lacking)].tolist():
        answers[row].add(image)
    for row, found in answers.items():
        for image in members[int(classes[row])]:
            if image not in found and query.digest(row) != corpus.digest(image):
                raise DataError(
                    f"{where}: the qrels are no classes: {corpus.ids[image]!r} answers queries that are answered by "
                    f"the same images as {query.ids[row]!r} ({some([corpus.ids[x] for x in sorted(found)], 3)}), but "
                    f"not {query.ids[row]!r}. Such a set can be scored by MTEB alone (MTEBModel)"
                )
    return classes.tolist()
