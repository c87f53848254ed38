"""Terms of the classes outside a batch, taken in blocks, against the whole table of similarities."""

import pytest
import torch
import torch.nn.functional as F

from vptsp.losses import other_classes
from vptsp.losses.other_classes import others_per_class, others_per_image
from vptsp.losses.proxy_losses import proxy_anchor_loss, proxy_nca_loss


NUM_CLASSES, WIDTH = 23, 6


def make_inputs(dtype=torch.float64):
    embeddings = F.normalize(torch.randn(8, WIDTH, dtype=dtype), dim=1).requires_grad_()
    original = torch.randn(NUM_CLASSES, WIDTH, dtype=dtype).mul(0.3).requires_grad_()
    state = F.normalize(torch.randn(NUM_CLASSES, WIDTH, dtype=dtype), dim=1)
    return embeddings, original, state, torch.tensor([20, 3, 7, 0])


def whole_table(embeddings, original, state, ratio):
    raw = original if state is None else (1 - ratio) * state + ratio * original
    return embeddings @ F.normalize(raw, dim=1).T


@pytest.mark.parametrize("block", [1, 5, 23, 8192])
@pytest.mark.parametrize("with_state, ratio", [(True, 0.3), (True, 0.0), (True, 1.0), (False, 0.3)])
@pytest.mark.parametrize("alpha", [2.0, 32.0, 500.0])
@pytest.mark.parametrize("per_class", [True, False])
def test_values_and_gradients(monkeypatch, block, with_state, ratio, alpha, per_class):
    monkeypatch.setattr(other_classes, "BLOCK", block)
    embeddings, original, state, classes = make_inputs()
    state = state if with_state else None
    rest = [c for c in range(NUM_CLASSES) if c not in classes.tolist()]
    exponents = alpha * (whole_table(embeddings, original, state, ratio)[:, rest] + 0.1)
    if per_class:
        expected = torch.logsumexp(F.pad(exponents, (0, 0, 1, 0)), dim=0).sum()  # the pad is the 1 in log(1 + ...)
    else:
        expected = exponents.logsumexp(dim=1)
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    gradients = embeddings.grad, original.grad
    embeddings.grad = original.grad = None

    function = others_per_class if per_class else others_per_image
    actual = function(embeddings, original, state, ratio, classes, alpha, 0.1)
    torch.testing.assert_close(actual, expected)
    (actual * weights).sum().backward()
    torch.testing.assert_close(embeddings.grad, gradients[0])
    torch.testing.assert_close(original.grad, gradients[1])


@pytest.mark.parametrize("reduction", ["all_classes", "batch_positives"])
def test_proxy_anchor_of_batch_and_others_is_that_of_all(reduction):
    embeddings, original, state, classes = make_inputs()
    rows = torch.arange(8) // 2
    table = whole_table(embeddings, original, state, 0.4)
    expected = proxy_anchor_loss(table, classes[rows], 4.0, 0.1, reduction)
    others = others_per_class(embeddings, original, state, 0.4, classes, 4.0, 0.1)
    actual = proxy_anchor_loss(table[:, classes], rows, 4.0, 0.1, reduction, others=(NUM_CLASSES - 4, others))
    torch.testing.assert_close(actual, expected)


def test_proxy_nca_of_batch_and_others_is_that_of_all():
    embeddings, original, state, classes = make_inputs()
    rows = torch.arange(8) // 2
    table = whole_table(embeddings, original, state, 0.4)
    others = others_per_image(embeddings, original, state, 0.4, classes, 4.0, 0.1)
    actual = proxy_nca_loss(table[:, classes], rows, 4.0, 0.1, others=others)
    torch.testing.assert_close(actual, proxy_nca_loss(table, classes[rows], 4.0, 0.1))


def test_no_table_of_images_and_classes_is_kept():
    """Neither the graph nor any tensor on the way is as large as the images times the classes."""
    embeddings = F.normalize(torch.randn(64, WIDTH), dim=1).requires_grad_()
    original = torch.randn(5 * 8192, WIDTH, requires_grad=True)
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            largest.append(result.numel() if isinstance(result, torch.Tensor) else 0)
            return result

    with Watch():
        others_per_class(embeddings, original, None, 1.0, torch.tensor([1]), 32.0, 0.1).backward()
    assert len(largest) > 50
    assert max(largest) <= 64 * 8192
