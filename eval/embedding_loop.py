"""The loop in which images become embeddings: of stores, of lists of images, and of the Trainer's evaluation."""

from __future__ import annotations

from tqdm.auto import tqdm


def embed_batches(batches, embed, total=None, description="Embedding", hidden=False):
    """Embed batch after batch, with a bar of the images.

    Args:
        batches: Iterable of pairs: how many images a batch is of, those that could not be read among them, and the
            batch.
        embed: Function of a batch; gives its embeddings `(b, E)`, on any device.
        total: Images in all; None where nobody knows.
        description: For the bar.
        hidden: No bar.

    Yields:
        Each batch, and its embeddings in float32 on the CPU.
    """
    with tqdm(total=total, desc=description, unit="image", disable=hidden, leave=False) as bar:
        for count, batch in batches:
            yield batch, embed(batch).float().cpu()
            bar.update(count)


__all__ = ["embed_batches"]
