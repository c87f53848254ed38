"""Exact neighbours against a sort in plain Python, with ties, copies, any block size and any precision."""

import doctest
import math
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import normalize

from vptsp.eval import neighbours
from vptsp.eval.neighbours import BlockedSimilarity, nearest_neighbours


def sign_vectors(generator, count, width=4):
    """Corners of a cube, scaled to norm 1: exact in every float type, with ties and copies everywhere."""
    signs = torch.randint(0, 2, (count, width), generator=generator) * 2 - 1
    return signs / math.sqrt(width)


def slow_neighbours(queries, k, gallery=None):
    """Every similarity in Python floats, every query's ranking by a sort on (-similarity, index)."""
    items = (queries if gallery is None else gallery).double().tolist()
    found = []
    for number, query in enumerate(queries.double().tolist()):
        ranked = sorted(
            (-math.fsum(a * b for a, b in zip(query, item, strict=True)), index)
            for index, item in enumerate(items)
            if gallery is not None or index != number
        )
        found.append(ranked[:k])
    similarity = torch.tensor([[-value for value, _ in row] for row in found], dtype=torch.float64)
    return similarity, torch.tensor([[index for _, index in row] for row in found])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("own_gallery", [False, True])
def test_equals_a_plain_sort_also_in_its_ties(dtype, own_gallery):
    generator = torch.Generator().manual_seed(1)
    for case in range(25):
        count = int(torch.randint(2, 24, (), generator=generator))
        queries = sign_vectors(generator, count).to(dtype)
        gallery = sign_vectors(generator, 17).to(dtype) if own_gallery else None
        k = 1 + case % (17 if own_gallery else count - 1)
        similarity, index = nearest_neighbours(queries, k, gallery, block_size=1 + case % 7)
        expected_similarity, expected_index = slow_neighbours(queries, k, gallery)
        assert index.tolist() == expected_index.tolist()
        assert similarity.double().equal(expected_similarity)
        assert similarity.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert index.dtype == torch.int64


def test_equals_a_plain_sort_without_ties():
    generator = torch.Generator().manual_seed(2)
    queries = normalize(torch.randn(30, 9, dtype=torch.float64, generator=generator), dim=1)
    gallery = normalize(torch.randn(45, 9, dtype=torch.float64, generator=generator), dim=1)
    for k, items in ((1, None), (29, None), (1, gallery), (45, gallery)):
        similarity, index = nearest_neighbours(queries, k, items)
        expected_similarity, expected_index = slow_neighbours(queries, k, items)
        assert index.equal(expected_index)
        torch.testing.assert_close(similarity, expected_similarity, rtol=0, atol=1e-14)
    assert (similarity < 0).any()


def test_a_copy_of_the_query_is_found_and_the_query_is_not():
    # Three identical rows: the most similar item of row 2 may well be row 0, so the first hit is not always the query.
    embeddings = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    most_similar = (embeddings @ embeddings.T).sort(dim=1, descending=True, stable=True).indices
    assert most_similar[2].tolist() == [0, 2, 3, 1]  # without its first item the query itself stays, and row 0 is lost
    similarity, index = nearest_neighbours(embeddings, 3)
    assert index.tolist() == [[2, 3, 1], [0, 2, 3], [0, 3, 1], [0, 2, 1]]
    assert similarity[0].tolist() == [1, 1, 0]


def test_nothing_is_excluded_from_a_gallery_of_its_own():
    embeddings = normalize(torch.randn(6, 5), dim=1)
    similarity, index = nearest_neighbours(embeddings, 1, embeddings.clone())
    assert index.squeeze(1).tolist() == list(range(6))
    torch.testing.assert_close(similarity, torch.ones(6, 1))


def test_copies_have_the_same_similarity_to_the_last_bit():
    generator = torch.Generator().manual_seed(3)
    for width, count, queries in (
        (513, 333, 1),
        (64, 1001, 3),
        (17, 101, 2),
    ):  # edges of tiles, products with a vector
        one = normalize(torch.randn(1, width, generator=generator), dim=1)
        others = normalize(torch.randn(5, width, generator=generator), dim=1)
        gallery = torch.cat([others, one.expand(count, width)])
        blocks = BlockedSimilarity(normalize(torch.randn(queries, width, generator=generator), dim=1), gallery)
        similarity = blocks.rows(torch.arange(queries))
        assert (similarity[:, 5:] == similarity[:, 5:6]).all()
        assert (similarity[:, 0] != similarity[:, 5]).all()


def test_blocks_don_t_change_the_neighbours():
    embeddings = normalize(torch.randn(53, 8), dim=1)
    _, whole = nearest_neighbours(embeddings, 5, block_size=53)
    for block_size in (1, 7, 52, 1000):
        assert nearest_neighbours(embeddings, 5, block_size=block_size)[1].equal(whole)


def test_block_size_follows_the_memory_allowed():
    gallery = normalize(torch.randn(100, 4), dim=1)
    blocks = BlockedSimilarity(gallery)
    small, large = blocks.block_size(10, num_bytes=50_000), blocks.block_size(10, num_bytes=100_000)
    assert 1 < small < large < 100
    assert small * 100 * 4 < 50_000
    assert blocks.block_size(10, num_bytes=1) == 1
    assert blocks.block_size(10) == 100


@pytest.fixture
def precision_at_products(monkeypatch):
    """The float32 precision that was set when each similarity was computed; the settings are put back at the end."""
    seen, product = [], torch.mm
    monkeypatch.setattr(
        torch, "mm", lambda *a, **k: seen.append(torch.get_float32_matmul_precision()) or product(*a, **k)
    )
    yield seen
    torch.set_float32_matmul_precision("highest")


def test_training_s_precision_settings_are_left_aside_and_kept(precision_at_products):
    embeddings = normalize(torch.randn(40, 64), dim=1)
    expected, _ = nearest_neighbours(embeddings, 5)
    torch.set_float32_matmul_precision("medium")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        similarity, _ = nearest_neighbours(embeddings, 5)
        assert (embeddings @ embeddings.T).dtype == torch.bfloat16
    assert torch.get_float32_matmul_precision() == "medium"
    assert precision_at_products == ["highest", "highest"]
    assert similarity.equal(expected)


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch has only the older switch"
)
def test_the_newer_precision_switches_are_kept_too(precision_at_products):
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    nearest_neighbours(torch.eye(4), 2)
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    assert precision_at_products == ["highest"]


def test_takes_embeddings_that_carry_gradients():
    embeddings = normalize(torch.randn(5, 3, requires_grad=True), dim=1)
    similarity, _ = nearest_neighbours(embeddings, 2)
    assert not similarity.requires_grad


def test_bfloat16_may_be_as_far_from_norm_1_as_its_rounding():
    embeddings = normalize(torch.randn(200, 3), dim=1).bfloat16()
    assert (embeddings.float().norm(dim=1) - 1).abs().max() > neighbours.NORM_TOLERANCE
    assert nearest_neighbours(embeddings, 1)[1].shape == (200, 1)
    with pytest.raises(ValueError, match="must be L2-normalised"):
        nearest_neighbours(embeddings.float(), 1)


@pytest.mark.parametrize(
    ("embeddings", "error", "message"),
    [
        ([[1.0, 0.0]], TypeError, "query_embeddings must be a floating-point tensor, got list"),
        (torch.eye(3).long(), TypeError, "floating-point tensor, got torch.int64"),
        (torch.ones(3), ValueError, r"shape \(items, width\), neither of them 0, got \(3,\)"),
        (torch.ones(0, 3), ValueError, r"got \(0, 3\)"),
        (torch.ones(3, 0), ValueError, r"got \(3, 0\)"),
        (torch.tensor([[1.0, 0], [torch.nan, 0], [0, 1], [0, torch.inf]]), ValueError, r"2 of 4 rows .* at \[1, 3\]"),
        (torch.tensor([[1.0, 0], [3, 4]]), ValueError, r"L2-normalised: 1 of 2 .* \[1\] with norms \[5.0\]; torch.nn"),
        (torch.tensor([[1.0, 0], [0, 0]]), ValueError, r"with norms \[0.0\]"),
        (torch.tensor([[1.0, 0], [1.002, 0]]), ValueError, r"with norms \[1.002\]"),
    ],
)
def test_refuses_embeddings_that_have_no_cosine(embeddings, error, message):
    with pytest.raises(error, match=message):
        nearest_neighbours(embeddings, 1)
    if isinstance(embeddings, torch.Tensor):
        with pytest.raises(error, match="gallery_embeddings"):
            nearest_neighbours(torch.eye(2), 1, embeddings)


def test_refuses_numbers_out_of_range():
    with pytest.raises(
        ValueError, match=r"between 1 and the 2 items that a query can find, got 3.*no query finds itself"
    ):
        nearest_neighbours(torch.eye(3), 3)
    with pytest.raises(ValueError, match=r"between 1 and the 3 items that a query can find, got 4$"):
        nearest_neighbours(torch.eye(3), 4, torch.eye(3))
    with pytest.raises(ValueError, match="got 0"):
        nearest_neighbours(torch.eye(3), 0)
    with pytest.raises(ValueError, match="block_size must be >= 1 or None, got 0"):
        nearest_neighbours(torch.eye(3), 1, block_size=0)
    with pytest.raises(ValueError, match="same width, got 3 and 2"):
        nearest_neighbours(torch.eye(3), 1, torch.eye(2))


def test_examples_in_the_documentation():
    results = doctest.testmod(neighbours)
    assert results.attempted > 0
    assert results.failed == 0


def test_importing_the_package_loads_neither_torch_nor_matplotlib():
    code = "import sys, vptsp.eval; print({'torch', 'matplotlib', 'numpy'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"
