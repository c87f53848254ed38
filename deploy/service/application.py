"""The service: what it answers, and how.

Images are decoded by threads, wait in a bounded queue, and are embedded together; searches run side by side.
"""

from __future__ import annotations

import asyncio
import math
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Annotated

import torch
import torch.nn.functional as F
from fastapi import (
    APIRouter,
    Depends,
    FastAPI,
    File,
    Form,
    HTTPException,
    Path,
    Query,
    Response,
    Security,
    UploadFile,
)
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.security import APIKeyHeader
from pydantic import AfterValidator

from ..._version import __version__
from ...data_scripts.data_errors import ImageError
from ...data_scripts.data_fingerprint import content_digest
from ...eval.reranking import QueryExpansion, Reranking
from .batching import BatchingEmbedder, TooManyWaitingError
from .counters import Counters
from .limits import Guard, Limits
from .live_index import Item, ItemExistsError, NotSavedError, UnknownItemError
from .messages import (
    MAX_ID_BYTES,
    Changed,
    Columns,
    Filters,
    Found,
    Health,
    Problem,
    Results,
    SearchById,
    SearchByVector,
    StoredItem,
    VectorItems,
    check_id,
    problem_text,
    problems,
)
from .strict_requests import StrictRoute, columns_of, refuse_unknown


class Service:
    """What the routes of [`create_app`] do.

    Args:
        live: [`LiveIndex`].
        embedder: [`Embedder`] of its model; None: no image can be embedded.
        limits: [`Limits`].
        decoders: Threads that decode images, and as many that search.
    """

    def __init__(self, live, embedder, limits, decoders=4):
        self.live, self.limits = live, limits
        self.batching = None
        self.metrics = Counters(live, lambda: self.batching.waiting if self.batching else 0)
        if embedder is not None:
            embedder.preprocess.max_image_pixels = limits.max_pixels
            self.batching = BatchingEmbedder(
                embedder, limits.max_batch, limits.max_waiting, self.metrics.observe_batch
            )
        self._threads = ThreadPoolExecutor(2 * decoders, thread_name_prefix="service")
        self._changes = ThreadPoolExecutor(1, thread_name_prefix="changes")  # else those that wait would stop searches
        self._reading = 0

    def close(self):
        """Finish what has begun."""
        self._threads.shutdown()
        self._changes.shutdown()
        if self.batching is not None:
            self.batching.close()

    async def embed(self, content, name):
        """Bytes of an image's file -> `(1, E)`."""
        if self.batching is None:
            raise HTTPException(503, "the service has no model: search by id or by vector")
        if self._reading + self.batching.waiting >= self.limits.max_waiting:
            raise TooManyWaitingError(f"{self.limits.max_waiting} images wait already")
        self._reading += 1
        try:
            pixels = await self._do(self.batching.embedder.preprocess, content, name)
        finally:
            self._reading -= 1
        return await asyncio.wrap_future(self.batching.submit(pixels))

    async def search(self, embeddings, filters):
        """Hits of one embedding."""

        def find():
            with self.live.reading() as index:
                return index.search(embeddings, **self._arguments(index, filters))[0]

        return _results(await self._do(find))

    async def search_id(self, name, filters):
        """Hits of an item."""

        def find():
            with self.live.reading() as index:
                arguments = self._arguments(index, filters)
                if not index.present([name]):
                    raise UnknownItemError(f"there is no item {name!r}")
                return index.search_ids([name], **arguments)[0]

        return _results(await self._do(find))

    def _arguments(self, index, filters):
        if filters.k > self.limits.max_results:
            raise ValueError(f"k must be at most {self.limits.max_results}, got {filters.k}")
        index.require_values(filters.where or None)
        options = filters.model_dump(include={"k", "containing", "min_similarity", "group_by"})
        for name, kind in (("rerank", Reranking), ("expand", QueryExpansion)):
            words = getattr(filters, name)  # a form says `[]` by an empty text
            options[name] = None if words is None else kind.of_words([word for word in words if word])
        for name, field in (("rerank", "depth"), ("expand", "neighbours")):
            if (value := getattr(options[name], field, 0)) > self.limits.max_results:
                raise ValueError(f"{name}: {field} must be at most {self.limits.max_results}, got {value}")
        return options | {"where": filters.where or None}

    async def item(self, name):
        """What is known of an item."""

        def look():
            with self.live.reading() as index:
                if not index.present([name]):
                    raise UnknownItemError(f"there is no item {name!r}")
                known = index.items([name])[name]
                return StoredItem(id=name, columns={column: known[column] for column in index.columns})

        return await self._do(look)

    async def put(self, items, replace=True):
        """Add or replace items."""
        if len(items) > self.limits.max_items:
            raise ValueError(f"a request may have {self.limits.max_items} items, got {len(items)}")
        new = await self._finish(self.live.put, items, replace=replace)
        return Changed(added=sum(new), replaced=len(new) - sum(new))

    async def update(self, name, columns):
        """Change an item's columns."""
        await self._finish(self.live.update, name, columns)
        return Changed(updated=1)

    async def remove(self, name):
        """Remove an item."""
        await self._finish(self.live.remove, [name])
        return Changed(removed=1)

    async def _do(self, function, *arguments, threads=None):
        return await asyncio.get_running_loop().run_in_executor(threads or self._threads, function, *arguments)

    async def _finish(self, function, *arguments, **options):
        """A change, which can't be called off: after a timeout it is still done, or fails, as a whole."""
        return await asyncio.shield(self._do(lambda: function(*arguments, **options), threads=self._changes))


def _results(hits):
    return Results(
        results=[Found(id=hit.id, similarity=hit.similarity, columns=hit.metadata) for hit in hits],
    )


def vector_of(values, embedding_dim):
    """A vector of a request as an embedding, `(1, E)`.

    Raises:
        ValueError: it has another length, or no direction.
    """
    if len(values) != embedding_dim:
        raise ValueError(f"a vector must have {embedding_dim} numbers, got {len(values)}")
    vector = torch.tensor([values], dtype=torch.float64)
    norm = float(vector.norm())
    if not (math.isfinite(norm) and norm > 0):
        raise ValueError("a vector must have a direction: its length is 0, or not finite")
    return F.normalize(vector, dim=1).float()


def create_app(live, embedder=None, limits=None, api_key=None, decoders=4):
    """The service as an ASGI application.

    Args:
        live: [`LiveIndex`].
        embedder: [`Embedder`] of the index's model; None: images can't be searched by.
        limits: [`Limits`].
        api_key: What every request's `X-API-Key` must be, but for those of `Guard.OPEN`; None: anybody may ask.
        decoders: Threads that decode images.

    Returns:
        `fastapi.FastAPI`.
    """
    service = Service(live, embedder, limits or Limits(), decoders)

    @asynccontextmanager
    async def lifespan(_):
        yield
        await asyncio.get_running_loop().run_in_executor(None, service.close)

    app = FastAPI(
        dependencies=[Depends(refuse_unknown)],
        title="vptsp", version=__version__, description="Image retrieval: search an index, and change it.",
        lifespan=lifespan,
    )  # fmt: skip
    app.add_middleware(Guard, limits=service.limits, api_key=api_key, observe=service.metrics.observe)
    _add_errors(app)
    # the guard compares keys; this says it in the description, whose page then asks for the key
    asks_key = APIKeyHeader(name="X-API-Key", auto_error=False)
    locked = APIRouter(route_class=StrictRoute, dependencies=[] if api_key is None else [Security(asks_key)])
    _add_searches(locked, service)
    _add_changes(locked, service)

    @app.get("/health", responses={503: {"model": Problem, "description": "not at the moment"}})
    async def health() -> Health:
        """Whether the service works, and what it serves. Needs no key."""
        model = live.index.model
        return Health(
            status="ok", items=len(live.index), embedding_dim=live.index.embedding_dim,
            model=model and model["name"], version=__version__,
        )  # fmt: skip

    @locked.get("/metrics", response_class=PlainTextResponse, responses=problems())
    async def metrics():
        """Counters, for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    app.include_router(locked)
    return app


def _add_errors(app):
    statuses = {
        UnknownItemError: 404,
        ItemExistsError: 409,
        NotSavedError: 503,
        TooManyWaitingError: 429,
        ImageError: 422,
        ValueError: 422,
    }

    def answer(status):
        async def handle(_, error):
            headers = {"Retry-After": "1"} if status in (429, 503) else None
            return JSONResponse({"detail": str(error)}, status, headers)

        return handle

    for kind, status in statuses.items():
        app.add_exception_handler(kind, answer(status))

    async def refuse(_, error):
        return JSONResponse({"detail": problem_text(error.errors())}, 422)

    app.add_exception_handler(RequestValidationError, refuse)


Where = Annotated[list[str] | None, Form(description="filters on columns, such as `price<20`")]


def _add_searches(router, service):
    @router.post("/search/image", responses=problems(400, 422, 429))
    async def search_by_image(
        image: Annotated[UploadFile, File(description="a file that Pillow reads")],
        k: Annotated[int, Form(ge=1)] = 10,
        where: Where = None,
        containing: Annotated[str | None, Form()] = None,
        min_similarity: Annotated[float | None, Form(ge=-1, le=1)] = None,
        group_by: Annotated[str | None, Form()] = None,
        rerank: Annotated[list[str] | None, Form(description="empty for the defaults")] = None,
        expand: Annotated[list[str] | None, Form(description="empty for the defaults")] = None,
    ) -> Results:
        """The items most similar to an image."""
        narrowed = {"containing": containing, "min_similarity": min_similarity, "group_by": group_by}
        filters = Filters(k=k, where=where or [], rerank=rerank, expand=expand, **narrowed)
        embedding = await service.embed(await image.read(), image.filename or "image")
        return await service.search(embedding, filters)

    @router.post("/search/id", responses=problems(400, 404, 422))
    async def search_by_id(body: SearchById) -> Results:
        """The items most similar to an item, without itself."""
        return await service.search_id(body.id, body)

    @router.post("/search/vector", responses=problems(400, 422))
    async def search_by_vector(body: SearchByVector) -> Results:
        """The items most similar to an embedding."""
        return await service.search(vector_of(body.vector, service.live.index.embedding_dim), body)


ItemId = Annotated[
    str, Path(min_length=1, max_length=MAX_ID_BYTES, description="may have slashes in it"), AfterValidator(check_id)
]


def _add_changes(router, service):
    @router.get("/items/{id:path}", responses=problems(404, 422))
    async def get_item(id: ItemId) -> StoredItem:
        """What is known of an item."""
        return await service.item(id)

    @router.put("/items/{id:path}", responses=problems(400, 409, 422, 429))
    async def put_item(
        id: ItemId,
        image: Annotated[UploadFile, File(description="a file that Pillow reads; it is not kept")],
        columns: Annotated[str, Form(description='JSON, such as `{"price": 3.5}`')] = "{}",
        only_new: Annotated[bool, Query(description="refuse an item that is there")] = False,
    ) -> Changed:
        """Add an item by its image, or replace the one that is there; columns that are not given stay."""
        values = columns_of(columns)
        content = await image.read()
        embedding = await service.embed(content, image.filename or id)
        item = Item(id, values, embedding, content_digest(content).hex())
        return await service.put([item], replace=not only_new)

    @router.patch("/items/{id:path}", responses=problems(400, 404, 422))
    async def patch_item(id: ItemId, columns: Columns) -> Changed:
        """Give an item other values in some columns."""
        return await service.update(id, columns)

    @router.delete("/items/{id:path}", responses=problems(404, 422))
    async def delete_item(id: ItemId) -> Changed:
        """Remove an item."""
        return await service.remove(id)

    @router.post("/vectors", responses=problems(400, 409, 422))
    async def put_vectors(
        body: VectorItems, only_new: Annotated[bool, Query(description="refuse items that are there")] = False
    ) -> Changed:
        """Add items by embeddings of the index's model that were computed elsewhere, or replace those there."""
        width = service.live.index.embedding_dim
        items = [Item(item.id, item.columns, vector_of(item.vector, width)) for item in body.items]
        if len({item.id for item in items}) < len(items):
            raise ValueError("ids must differ")
        return await service.put(items, replace=not only_new)


__all__ = ["Service", "create_app", "vector_of"]
