"""Many requests, one forward pass."""

import threading

import pytest
import torch

from vptsp.deploy.service.batching import BatchingEmbedder, TooManyWaitingError


class Model:
    """Doubles what it gets, as soon as it may."""

    def __init__(self):
        self.may_go, self.began, self.sizes = threading.Event(), threading.Event(), []

    def embed_pixels(self, pixels):
        self.began.set()
        self.sizes.append(len(pixels))
        assert self.may_go.wait(10)
        if (pixels == 13).any():
            raise ValueError("13")
        return 2 * pixels


def test_what_waits_is_embedded_together_in_batches():
    model, seen = Model(), []
    batching = BatchingEmbedder(model, max_batch=3, on_batch=seen.append)
    first = batching.submit(torch.tensor([0.0]))
    assert model.began.wait(10)
    others = [batching.submit(torch.tensor([float(number)])) for number in range(1, 6)]
    others[1].cancel()
    model.may_go.set()
    assert first.result(10).tolist() == [[0.0]]
    assert [future.result(10).item() for future in (*others[:1], *others[2:])] == [2, 6, 8, 10]
    batching.close()
    assert model.sizes == seen == [1, 2, 2]


def test_a_full_queue_refuses_and_an_error_reaches_who_asked():
    model = Model()
    batching = BatchingEmbedder(model, max_batch=1, max_waiting=2)
    running = batching.submit(torch.tensor([13.0]))
    assert model.began.wait(10)
    waiting = [batching.submit(torch.tensor([1.0])) for _ in range(2)]
    assert batching.waiting == 2
    with pytest.raises(TooManyWaitingError):
        batching.submit(torch.tensor([1.0]))
    model.may_go.set()
    with pytest.raises(ValueError, match="13"):
        running.result(10)
    assert [future.result(10).item() for future in waiting] == [2, 2]
    batching.close()


def test_closing_finishes_what_waits():
    model = Model()
    batching = BatchingEmbedder(model)
    futures = [batching.submit(torch.tensor([float(number)])) for number in range(5)]
    model.may_go.set()
    batching.close()
    assert all(future.done() for future in futures)
    with pytest.raises(RuntimeError, match="closed"):
        batching.submit(torch.tensor([1.0]))
    with pytest.raises(ValueError, match="max_batch"):
        BatchingEmbedder(model, max_batch=0)
