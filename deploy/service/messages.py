"""What requests and answers of the service hold, and how it says what is wrong with a request."""

from __future__ import annotations

import unicodedata
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictFloat, StrictInt, StrictStr


MAX_ID_BYTES = 1024
_PROBLEMS = 3  # of one request that are told
Value = StrictStr | StrictInt | StrictFloat | None
Columns = dict[str, Value]


class Message(BaseModel):
    """A JSON object of known fields, without NaN."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Found(Message):
    """An item that a search found."""

    id: str
    similarity: float = Field(description="cosine similarity with the query")
    columns: Columns


class Results(Message):
    """Most similar first."""

    results: list[Found]


class StoredItem(Message):
    """An item of the index."""

    id: str
    columns: Columns


class Changed(Message):
    """What a change did."""

    added: int = 0
    replaced: int = 0
    updated: int = 0
    removed: int = 0


class Health(Message):
    """How the service is."""

    status: str
    items: int
    embedding_dim: int
    model: str | None
    version: str


class Problem(BaseModel):
    """What was wrong with a request, in one line."""

    detail: str


def check_id(name):
    """The id, if it can stand in an address.

    Raises:
        ValueError: it is too long, or has control characters, such as line breaks.
    """
    if len(name.encode("utf-8", "replace")) > MAX_ID_BYTES:
        raise ValueError(f"an id must take at most {MAX_ID_BYTES} bytes in UTF-8")
    if any(unicodedata.category(letter) == "Cc" for letter in name):
        raise ValueError("an id can't have control characters, such as line breaks")
    return name


Identifier = Annotated[str, Field(min_length=1, max_length=MAX_ID_BYTES), AfterValidator(check_id)]


class Filters(Message):
    """What a search is narrowed to."""

    k: int = Field(10, ge=1, description="how many results at most")
    where: list[str] = Field([], description="filters on columns, such as `class_name=mug` or `price<20`")
    containing: str | None = Field(None, description="only items with this text in their id or a column")
    min_similarity: float | None = Field(None, ge=-1, le=1)
    group_by: str | None = Field(None, description="a column: only the most similar item of each of its values")
    rerank: list[str] | None = Field(
        None, description="k-reciprocal re-ranking: nothing but `[]` for the defaults, or such as `depth=100`, `k1=20`"
    )
    expand: list[str] | None = Field(
        None, description="query expansion: `[]` for the defaults, or such as `neighbours=10`, `alpha=3`"
    )


class SearchById(Filters):
    """The items most similar to one of them, without itself."""

    id: Identifier


class SearchByVector(Filters):
    """The items most similar to an embedding, which is normalised first."""

    vector: list[float]


class VectorItem(Message):
    """An item whose embedding was computed elsewhere."""

    id: Identifier
    vector: list[float]
    columns: Columns = {}


class VectorItems(Message):
    """Items to add, or to replace."""

    items: list[VectorItem] = Field(min_length=1)


def problems(*statuses):
    """The errors that a route documents, beside those that all have."""
    texts = {
        400: "not to be understood",
        404: "there is no such item",
        409: "there is such an item already",
        422: "something in it is not what it should be",
        429: "too many images wait: try again later",
    }
    always = {401: "no key, or a wrong one", 413: "too large", 503: "not at the moment", 504: "it took too long"}
    chosen = {status: texts[status] for status in statuses} | always
    return {status: {"model": Problem, "description": text} for status, text in chosen.items()}


def problem_text(errors):
    """What FastAPI found wrong with a request, in one line: fields, what was expected, what was got.

    Args:
        errors: As `RequestValidationError.errors()` gives them.
    """
    texts = []
    for found in errors[:_PROBLEMS]:
        where = [
            str(part) if str(part).isidentifier() or isinstance(part, int) else repr(part) for part in found["loc"]
        ]
        name = ".".join(where[1:]) or where[0]  # the first is the part of the request: body, query, path
        text = f"{name}: {found['msg'].removeprefix('Value error, ')}"
        if isinstance(given := found.get("input"), (str, int, float, bool)) and found["type"] != "json_invalid":
            text += f", got {given!r:.50}"
        texts.append(text)
    more = f"; and {len(errors) - _PROBLEMS} more" if len(errors) > _PROBLEMS else ""
    return " ".join(("; ".join(texts) + more).split())


__all__ = [
    "MAX_ID_BYTES",
    "Changed",
    "Columns",
    "Filters",
    "Found",
    "Health",
    "Message",
    "Problem",
    "Results",
    "SearchById",
    "SearchByVector",
    "StoredItem",
    "VectorItem",
    "VectorItems",
    "check_id",
    "problem_text",
    "problems",
]
