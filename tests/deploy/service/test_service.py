"""The service's answers."""

import io
import threading
import time

import pytest
from PIL import Image


pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
pytest.importorskip("schemathesis")

import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import (
    content_type_conformance,
    not_a_server_error,
    response_schema_conformance,
    status_code_conformance,
)

from vptsp import Embedder, QueryExpansion, Reranking, RetrievalIndex
from vptsp.deploy.service.application import create_app
from vptsp.deploy.service.limits import Limits
from vptsp.deploy.service.live_index import LiveIndex


COLOURS = {
    "red/1.png": (200, 0, 0),
    "green/1.png": (0, 200, 0),
    "green/2.png": (0, 150, 30),
    "blue/1.png": (0, 0, 220),
}


JSON = {"Content-Type": "application/json"}
ONE = {"items": [{"id": "a", "vector": [1] * 8}]}
PRICES = '{"price": 1, "price": 2}'


def png(colour, size=20):
    file = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def embedder(retriever_folder):
    return Embedder.from_pretrained(retriever_folder)


@pytest.fixture
def place(tmp_path, embedder):
    embeddings = embedder.embed_images([png(colour) for colour in COLOURS.values()])
    metadata = {"class_name": [name.partition("/")[0] for name in COLOURS], "price": [1, 2, 3, None]}
    index = RetrievalIndex.build(list(COLOURS), embeddings, metadata, model=embedder.description())
    index.save(tmp_path / "index")
    return tmp_path / "index"


@pytest.fixture
def live(place):
    with LiveIndex.open(place) as live:
        yield live


@pytest.fixture
def client(live, embedder):
    with TestClient(create_app(live, embedder)) as client:
        yield client


def ids(response):
    assert response.status_code == 200, response.text
    return [found["id"] for found in response.json()["results"]]


def image(colour, name="query.png", **size):
    return {"image": (name, png(colour, **size), "image/png")}


def test_searches_equal_those_of_the_index(client, live, embedder):
    query = png((190, 10, 0))
    expected = live.index.search(embedder.embed_images([query]), 3)[0]
    response = client.post("/search/image", files={"image": ("q.png", query)}, data={"k": 3})
    assert response.json() == {
        "results": [{"id": hit.id, "similarity": hit.similarity, "columns": hit.metadata} for hit in expected]
    }
    expected = [hit.id for hit in live.index.search_ids(["red/1.png"], 10)[0]]
    assert ids(client.post("/search/id", json={"id": "red/1.png"})) == expected
    vector = (3 * live.index.embeddings_of(["blue/1.png"])[0]).tolist()
    assert ids(client.post("/search/vector", json={"vector": vector, "k": 1})) == ["blue/1.png"]


def test_filters(client):
    form = {"where": ["class_name=GREEN", "price<3"]}
    assert ids(client.post("/search/image", files=image((0, 0, 0)), data=form)) == ["green/1.png"]
    body = {"id": "red/1.png", "group_by": "class_name", "containing": "een"}
    assert len(ids(client.post("/search/id", json=body))) == 1
    assert ids(client.post("/search/id", json={"id": "red/1.png", "min_similarity": 1})) == []
    response = client.post("/search/id", json={"id": "red/1.png", "where": ["class_name=gren"]})
    assert response.status_code == 422
    assert "green" in response.json()["detail"]


def test_results_in_another_order(client, live, embedder):
    query = png((190, 10, 0))
    embedding = embedder.embed_images([query])
    ways = {"rerank": (Reranking(), Reranking(depth=3, k1=2, k2=1)), "expand": (QueryExpansion(), QueryExpansion(2))}
    words = {"rerank": ["depth=3", "k1=2", "k2=1"], "expand": ["neighbours=2"]}
    for name, (default, other) in ways.items():
        for way, asked in ((default, []), (other, words[name])):
            hits = live.index.search(embedding, 4, **{name: way})[0]
            expected = [(hit.id, pytest.approx(hit.similarity)) for hit in hits]
            form = {"k": 4, name: asked or ""}
            by_image = client.post("/search/image", files={"image": ("q.png", query)}, data=form)
            body = {"vector": embedding[0].tolist(), "k": 4, name: asked}
            for response in (by_image, client.post("/search/vector", json=body)):
                assert response.status_code == 200, response.text
                assert [(found["id"], found["similarity"]) for found in response.json()["results"]] == expected


def test_items_are_added_changed_and_removed_and_stay(client, live, place):
    response = client.put("/items/new/yellow.png", files=image((200, 200, 0)), data={"columns": '{"price": 9}'})
    assert (response.status_code, response.json()["added"]) == (200, 1)
    assert ids(client.post("/search/image", files=image((200, 200, 0)), data={"k": 1})) == ["new/yellow.png"]
    response = client.put("/items/new/yellow.png", files=image((0, 200, 200)), data={"columns": '{"class_name": "c"}'})
    assert response.json()["replaced"] == 1
    assert client.get("/items/new/yellow.png").json()["columns"] == {"class_name": "c", "price": 9}
    assert client.put("/items/new/yellow.png?only_new=true", files=image((0, 0, 0))).status_code == 409
    assert client.patch("/items/red/1.png", json={"price": 4.5}).json()["updated"] == 1
    assert client.delete("/items/blue/1.png").json()["removed"] == 1
    vector = live.index.embeddings_of(["red/1.png"])[0].tolist()
    body = {"items": [{"id": "v", "vector": vector, "columns": {"price": 1}}, {"id": "red/1.png", "vector": vector}]}
    assert client.post("/vectors", json=body).json() == {"added": 1, "replaced": 1, "updated": 0, "removed": 0}
    there = RetrievalIndex.open(place).items()
    assert {name: row["price"] for name, row in there.items()} == {
        "red/1.png": 4.5, "green/1.png": 2, "green/2.png": 3, "new/yellow.png": 9, "v": 1
    }  # fmt: skip


@pytest.mark.parametrize(
    "status, named, ask",
    [
        (422, "x.png: can't read", lambda c: c.post("/search/image", files={"image": ("x.png", b"no image")})),
        (422, "pixels", lambda c: c.post("/search/image", files=image((0, 0, 0), size=101))),
        (413, "10,000 bytes", lambda c: c.post("/search/image", files={"image": ("x.png", bytes(20_000))})),
        (413, "10,000 bytes", lambda c: c.post("/search/id", content=(bytes(5_000) for _ in range(3)))),
        (422, "k must be at most 7", lambda c: c.post("/search/id", json={"id": "red/1.png", "k": 8})),
        (422, "depth must be at most 7", lambda c: c.post("/search/id", json={"id": "a", "k": 7, "rerank": []})),
        (422, "did you mean 'depth'", lambda c: c.post("/search/id", json={"id": "a", "k": 7, "rerank": ["dept=3"]})),
        (422, "vector must have 8", lambda c: c.post("/search/vector", json={"vector": [1.0]})),
        (422, "direction", lambda c: c.post("/search/vector", json={"vector": [0.0] * 8})),
        (404, "'nothing'", lambda c: c.post("/search/id", json={"id": "nothing", "k": 7})),
        (404, "'nothing'", lambda c: c.get("/items/nothing")),
        (404, "'nothing'", lambda c: c.delete("/items/nothing")),
        (404, "'nothing'", lambda c: c.patch("/items/nothing", json={})),
        (422, "no column 'prize'", lambda c: c.patch("/items/red/1.png", json={"prize": 3})),
        (422, "price", lambda c: c.patch("/items/red/1.png", json={"price": "much"})),
        (422, "JSON object", lambda c: c.put("/items/a", files=image((0, 0, 0)), data={"columns": "[1]"})),
        (422, "NaN", lambda c: c.put("/items/a", files=image((0, 0, 0)), data={"columns": '{"price": NaN}'})),
        (422, "kk: Extra inputs are not permitted, got 3", lambda c: c.post("/search/id", json={"id": "x", "kk": 3})),
        (422, "k: Input should be greater than or equal to 1, got 0",
         lambda c: c.post("/search/id", json={"id": "x", "k": 0})),
        (422, "id: Field required", lambda c: c.post("/search/id", json={})),
        (422, "image: Field required", lambda c: c.post("/search/image")),
        (422, "k: Input should be greater than or equal to 1, got '-1'",
         lambda c: c.post("/search/image", files=image((0, 0, 0)), data={"k": -1})),
        (422, "items.0.id: an id can't have control",
         lambda c: c.post("/vectors", json={"items": [{"id": "\t", "vector": []}]})),
        (422, "vector.0: Input should be", lambda c: c.post("/search/vector", json={"vector": list("abcde")})),
        (422, "; and 2 more", lambda c: c.post("/search/vector", json={"vector": list("abcde")})),
        (422, "only_new: Input should be a valid boolean", lambda c: c.post("/vectors?only_new=perhaps", json=ONE)),
        (422, "JSON decode error", lambda c: c.post("/search/id", content=b"{", headers=JSON)),
        (422, r"\ud800", lambda c: c.post("/search/id", content=b'{"id": "x", "\\ud800\\n": 1}', headers=JSON)),
        (422, "3 items", lambda c: c.post("/vectors", json={"items": [{"id": n, "vector": [1] * 8} for n in "abcd"]})),
        (422, "64 bits", lambda c: c.post("/search/id", json={"id": "x", "k": 7, "where": ["price<" + "9" * 30]})),
        (422, "line breaks", lambda c: c.delete("/items/red/1.png%0A")),
        (422, "line breaks", lambda c: c.post("/vectors", json={"items": [{"id": "a\n", "vector": [1] * 8}]})),
        (422, "no parameter 'only_nwe'; did you mean", lambda c: c.post("/vectors?only_nwe=true", json=ONE)),
        (422, "no field 'kk'", lambda c: c.post("/search/image", files=image((0, 0, 0)), data={"kk": 3})),
        (422, "price", lambda c: c.patch("/items/red/1.png", json={"price": True})),
        (405, "", lambda c: c.get("/search/id")),
    ],
)  # fmt: skip
def test_bad_requests_are_named(live, embedder, status, named, ask):
    limits = Limits(max_body_bytes=10_000, max_pixels=10_000, max_results=7, max_items=3)
    with TestClient(create_app(live, embedder, limits), raise_server_exceptions=False) as client:
        response = ask(client)
    assert response.status_code == status
    (detail,) = response.json().values()
    assert isinstance(detail, str) and len(detail.splitlines()) == 1
    assert named in detail


def as_json(text):
    return {"content": text.encode(), "headers": {"Content-Type": "application/json"}}


@pytest.mark.parametrize(
    "twice, method, address, request_of",
    [
        ("the body: 'k'", "post", "/search/id", lambda: as_json('{"id": "red/1.png", "k": 7, "k": 8}')),
        ("the body: 'price'", "patch", "/items/red/1.png", lambda: as_json(PRICES)),
        ("'price'", "post", "/vectors", lambda: as_json(f'{{"items": [{{"id": "a", "columns": {PRICES}}}]}}')),
        ("columns", "put", "/items/a", lambda: {"files": image((0, 0, 0)), "data": {"columns": PRICES}}),
        ("the field 'k'", "post", "/search/image", lambda: {"files": image((0, 0, 0)), "data": {"k": [3, 4]}}),
        ("the field 'image'", "post", "/search/image", lambda: {"files": 2 * list(image((0, 0, 0)).items())}),
        ("the parameter 'only_new'", "post", "/vectors?only_new=true&only_new=false", lambda: {"json": ONE}),
    ],
)
def test_what_is_given_twice_is_refused(client, place, twice, method, address, request_of):
    response = getattr(client, method)(address, **request_of())
    assert response.status_code == 422
    assert twice in response.json()["detail"] and "is there twice" in response.json()["detail"]
    assert {name: row["price"] for name, row in RetrievalIndex.open(place).items().items()}["red/1.png"] == 1


def test_what_is_no_json(client):
    response = client.post("/search/id", **as_json('{"id": "x"'))
    assert response.status_code == 422 and "JSON decode error" in response.text


def test_key(live, embedder):
    with TestClient(create_app(live, embedder, api_key="secret")) as client:
        for headers in ({}, {"X-API-Key": "Secret"}, {"X-API-Key": ""}):
            assert client.get("/items/red/1.png", headers=headers).status_code == 401
            assert client.get("/metrics", headers=headers).status_code == 401
        assert client.get("/items/red/1.png", headers={"X-API-Key": "secret"}).status_code == 200
        assert client.get("/health").json()["items"] == 4
        assert client.get("/docs").status_code == 200  # which asks for the key, and tells nothing of the index
        described = client.get("/openapi.json").json()
    asking = {
        path: {bool(operation.get("security")) for operation in methods.values()}
        for path, methods in described["paths"].items()
    }
    assert asking.pop("/health") == {False}
    assert set(map(frozenset, asking.values())) == {frozenset({True})}
    (scheme,) = described["components"]["securitySchemes"].values()
    assert (scheme["in"], scheme["name"]) == ("header", "X-API-Key")


class Slow:
    """An embedder that waits until it is told to go on."""

    def __init__(self, embedder):
        self.preprocess, self._embedder, self.go_on = embedder.preprocess, embedder, threading.Event()

    def embed_pixels(self, pixels):
        assert self.go_on.wait(20)
        return self._embedder.embed_pixels(pixels)


def test_too_many_are_refused_and_none_is_lost(live, embedder):
    slow, statuses = Slow(embedder), []
    with TestClient(create_app(live, slow, Limits(max_waiting=2, max_batch=1))) as client:

        def ask():
            statuses.append(client.post("/search/image", files=image((9, 9, 9))).status_code)

        threads = [threading.Thread(target=ask) for _ in range(12)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 20
        while 429 not in statuses and time.monotonic() < deadline:
            time.sleep(0.01)
        slow.go_on.set()
        for thread in threads:
            thread.join()
        assert client.post("/search/image", files=image((9, 9, 9))).status_code == 200
    assert set(statuses) == {200, 429}
    assert len(statuses) == 12


def test_a_request_that_takes_too_long(live, embedder):
    slow = Slow(embedder)
    with TestClient(create_app(live, slow, Limits(timeout=0.2))) as client:
        response = client.post("/search/image", files=image((9, 9, 9)))
        assert response.status_code == 504
        assert client.get("/health").status_code == 200
        slow.go_on.set()


def test_without_a_model(live):
    with TestClient(create_app(live)) as client:
        assert client.post("/search/image", files=image((9, 9, 9))).status_code == 503
        assert len(ids(client.post("/search/id", json={"id": "red/1.png"}))) == 3


def test_metrics(client):
    client.post("/search/image", files=image((9, 9, 9)))
    client.get("/items/nothing")
    text = client.get("/metrics").text
    assert 'vptsp_requests_total{method="POST",route="/search/image",status="200"} 1.0' in text
    assert 'vptsp_requests_total{method="GET",route="/items/{id:path}",status="404"} 1.0' in text
    assert "vptsp_batch_images_sum 1.0" in text
    assert "vptsp_items 4.0" in text


def test_what_the_openapi_page_says_is_true(live, embedder):
    """Requests made up from the description get answers that it describes; nothing breaks the service."""
    app = create_app(live, embedder, Limits(max_results=50))
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    checks = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
    counts = {}
    for result in schema.get_all_operations():
        operation = result.ok()

        @settings(
            max_examples=25,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def check(case):
            response = case.call()
            counts[response.status_code] = counts.get(response.status_code, 0) + 1
            case.validate_response(response, checks=checks)

        check()
    assert counts[200] and counts[422]


def test_openapi_describes_all_routes(client):
    described = client.get("/openapi.json").json()
    paths = described["paths"]
    answers = [method["responses"] for methods in paths.values() for method in methods.values()]
    refusals = [answer["422"]["content"]["application/json"]["schema"] for answer in answers if "422" in answer]
    assert refusals and all(schema == {"$ref": "#/components/schemas/Problem"} for schema in refusals)
    assert described["components"]["schemas"]["Problem"]["properties"]["detail"]["type"] == "string"
    assert "securitySchemes" not in described["components"]  # without a key there is nothing to ask for
    assert {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods} == {
        "POST /search/image", "POST /search/id", "POST /search/vector", "GET /items/{id}", "PUT /items/{id}",
        "PATCH /items/{id}", "DELETE /items/{id}", "POST /vectors", "GET /health", "GET /metrics",
    }  # fmt: skip
