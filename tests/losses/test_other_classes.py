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
    actual, own = function(embeddings, original, state, ratio, classes, alpha, 0.1)
    assert torch.equal(own, original[classes])
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
    others, _ = others_per_class(embeddings, original, state, 0.4, classes, 4.0, 0.1)
    actual = proxy_anchor_loss(table[:, classes], rows, 4.0, 0.1, reduction, others=(NUM_CLASSES - 4, others))
    torch.testing.assert_close(actual, expected)


def test_proxy_nca_of_batch_and_others_is_that_of_all():
    embeddings, original, state, classes = make_inputs()
    rows = torch.arange(8) // 2
    table = whole_table(embeddings, original, state, 0.4)
    others, _ = others_per_image(embeddings, original, state, 0.4, classes, 4.0, 0.1)
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
        others_per_class(embeddings, original, None, 1.0, torch.tensor([1]), 32.0, 0.1)[0].backward()
    assert len(largest) > 50
    assert max(largest) <= 64 * 8192


@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("function", [others_per_class, others_per_image])
def test_gradients_are_those_of_finite_differences(monkeypatch, function, with_state):
    """Of both results: the proxies of the batch go on to the rest of the loss."""
    monkeypatch.setattr(other_classes, "BLOCK", 5)
    embeddings, original, state, classes = make_inputs()

    def compare(embeddings, original):
        terms, own = function(embeddings, original, state if with_state else None, 0.4, classes, 4.0, 0.1)
        return terms.sin().sum() + own.sin().sum()

    gradients = torch.autograd.grad(compare(embeddings, original), (embeddings, original))
    for values, gradient, place in ((embeddings, gradients[0], 0), (original, gradients[1], 1)):
        for entry in range(values.numel()):  # not by `gradcheck`, which goes backward several times
            step = torch.zeros(values.numel(), dtype=torch.float64).index_fill_(0, torch.tensor([entry]), 1e-6)
            moved = [[embeddings.detach(), original.detach()] for _ in range(2)]
            for inputs, sign in zip(moved, (1, -1), strict=True):
                inputs[place] = inputs[place] + sign * step.view_as(values)
            slope = (compare(*moved[0]) - compare(*moved[1])) / 2e-6
            torch.testing.assert_close(gradient.flatten()[entry], slope, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("function", [others_per_class, others_per_image])
def test_one_gradient_as_large_as_the_proxies(function):
    """Rows of the batch add theirs to it in place: no second table of zeros, and nothing of it without gradients."""
    embeddings = F.normalize(torch.randn(4, 3), dim=1).requires_grad_()
    original, classes = torch.randn(30_000, 3, requires_grad=True), torch.tensor([7, 29_999])
    held = set()

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.untyped_storage().nbytes() >= original.nbytes:
                held.add(result.untyped_storage().data_ptr())  # a reference would make autograd copy
            return result

    def tables(grad_enabled):
        held.clear()
        with torch.set_grad_enabled(grad_enabled), Watch():
            terms, rows = function(embeddings, original, None, 1.0, classes, 32.0, 0.1)
            if grad_enabled:
                (terms.sum() + rows.square().sum()).backward()
        return len(held - {original.data_ptr()})

    assert tables(grad_enabled=True) == 1
    assert tables(grad_enabled=False) == 0
    embeddings.grad = original.grad = None
    _, rows = function(embeddings, original, None, 1.0, classes, 32.0, 0.1)
    rows.square().sum().backward()  # terms that nobody asked for have no gradient
    expected = torch.zeros_like(original).index_copy(0, classes, 2 * original[classes])
    assert torch.equal(original.grad, expected)


def test_a_second_backward_pass_is_an_error_and_no_other_number():
    embeddings, original, state, classes = make_inputs()
    terms, _ = others_per_class(embeddings, original, state, 0.4, classes, 4.0, 0.1)
    terms.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        terms.backward()


@pytest.mark.parametrize("function", [others_per_class, others_per_image])
def test_half_precision_around_it_changes_nothing(function):
    """Autocast doesn't reach it; proxies in bfloat16 are compared in the precision of the embeddings."""
    embeddings, original, state, classes = make_inputs(torch.float32)
    expected, _ = function(embeddings, original, state, 0.4, classes, 32.0, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        actual, _ = function(embeddings, original, state, 0.4, classes, 32.0, 0.1)
    assert torch.equal(actual, expected)

    half, half_state = original.detach().bfloat16().requires_grad_(), state.bfloat16()
    actual, _ = function(embeddings, half, half_state, 0.4, classes, 32.0, 0.1)
    expected, _ = function(embeddings, half.float(), half_state.float(), 0.4, classes, 32.0, 0.1)
    assert torch.equal(actual, expected)
    (gradient,) = torch.autograd.grad(expected.sum(), half)
    actual.sum().backward()
    assert half.grad.dtype == torch.bfloat16
    torch.testing.assert_close(half.grad, gradient)
