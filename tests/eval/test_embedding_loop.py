"""The one loop from images to embeddings."""

import torch

from vptsp.eval import embedding_loop


def test_batches_come_back_with_their_embeddings(monkeypatch):
    bars = []

    class Bar(embedding_loop.tqdm):
        def close(self):
            bars.append((self.n, self.total))
            super().close()

    monkeypatch.setattr(embedding_loop, "tqdm", Bar)
    batches = [(3, torch.ones(2, 4)), (2, torch.zeros(2, 4))]  # of the first three, one could not be read
    found = list(embedding_loop.embed_batches(batches, lambda batch: 2 * batch.bfloat16(), total=5))
    assert bars[0] == (5, 5)
    for (_, given), (batch, embeddings) in zip(batches, found, strict=True):
        assert batch is given
        assert embeddings.dtype == torch.float32
        torch.testing.assert_close(embeddings, 2 * given)
