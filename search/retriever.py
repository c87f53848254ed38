"""Images to embeddings, a catalogue of them, and what is similar, from Python.

    retriever = Retriever.from_pretrained("runs/photos")
    retriever.index("photos", "catalogue")
    retriever.search("query.jpg", k=5)[0]  # Hit(id='mug/3.jpg', similarity=0.93, metadata={...}, path=...)

[`Embedder`] is what embeds, and is there as `retriever.embedder`; this adds an index that is kept in step with images.
"""

from __future__ import annotations

import os
from pathlib import Path

from .embedder import Embedder
from .image_sources import ImageSource, folder_source, list_source
from .open_index import is_milvus, open_index
from .sync import update_index
from .vector_index import VectorIndex


class Retriever:
    """A model, and the index that it searches; see [`Retriever.from_pretrained`].

    Any number of threads may `encode` and `search` at the same time, also while one calls `index` or `open_index`:
    they go on with the index that was there when they began.

    Args:
        embedder: [`Embedder`].
    """

    def __init__(self, embedder):
        if not isinstance(embedder, Embedder):
            kind = type(embedder).__name__
            raise TypeError(
                f"embedder must be an Embedder, got {kind}; Retriever.from_pretrained loads one by its name"
            )
        self.embedder = embedder
        self._index = None

    @classmethod
    def from_pretrained(cls, name, **options):
        """A retriever of this project, or a bare backbone, from a folder or the Hub.

        Args:
            name: Folder or Hub name.
            **options: As for [`Embedder.from_pretrained`]: `revision`, `backbone`, `resize_size`, `device`, `dtype`,
                `batch_size`, `max_image_pixels`, `views`.

        Raises:
            DataError, OSError, ValueError: as there.
        """
        return cls(Embedder.from_pretrained(name, **options))

    @property
    def embedding_dim(self):
        """E, the width of embeddings."""
        return self.embedder.embedding_dim

    def encode(
        self, images, *, batch_size=None, num_workers=0, progress=False, channel_order="rgb", convert_to_tensor=False
    ):
        """Embeddings of images.

        Args:
            images: An image or an iterable of images: paths, contents of files (bytes), binary file objects, PIL
                images, uint8 arrays of numpy `(H, W, 3)`, `(H, W, 4)` or `(H, W)`, uint8 tensors `(3, H, W)`, or
                floating-point tensors `(3, S, S)` that are preprocessed already; mixed as you like.
            batch_size: Images at a time; None for the embedder's.
            num_workers: Threads that decode the next images while the model runs.
            progress: Show a progress bar.
            channel_order: Of arrays: `rgb`, or `bgr` as OpenCV reads them.
            convert_to_tensor: Return a tensor (on the CPU) and no array.

        Returns:
            `(n, E)` float32 of numpy (or torch), L2-normalised; n is 1 for a single image.

        Raises:
            ImageError: an image can't be read; the message names it.
            TypeError, ValueError: not an image, there are none, or an option is out of range.
        """
        embeddings = self.embedder.embed_images(
            images, batch_size=batch_size, num_workers=num_workers, progress=progress, channel_order=channel_order
        )
        return embeddings if convert_to_tensor else embeddings.numpy()

    def index(self, images, place, **options):
        """Build an index of images, or bring the one that is there in step with them, and search it from now on.

        Args:
            images: Folder, `.txt` list, or [`ImageSource`].
            place: Folder of the index, or what [`MilvusIndex`] takes.
            **options: As for [`update_index`]: `replace`, `add_only`, `skip_corrupt`, `num_workers`, `progress`, ...

        Returns:
            [`IndexChanges`]: how many were added, changed, removed, unchanged.

        Raises:
            DataError, InUseError, ValueError: as for [`update_index`].
            TypeError: images or place are something else.
        """
        is_milvus(place)  # says what is wrong with it before images are listed
        if not isinstance(images, (ImageSource, str, os.PathLike)):
            raise TypeError(
                f"images must be a folder, a .txt list or an ImageSource, got {type(images).__name__}; encode takes "
                "images themselves"
            )
        if not isinstance(images, ImageSource):
            images = list_source(images) if Path(images).suffix == ".txt" else folder_source(images)
        changes = update_index(place, self.embedder, images, **options)
        self.open_index(place)
        return changes

    def open_index(self, place, **options):
        """Open an index of this model's embeddings, and search it from now on.

        Args:
            place, **options: As for [`open_index`].

        Returns:
            The [`VectorIndex`].

        Raises:
            DataError: there is no index, or it is damaged.
            IndexMismatchError: it holds another model's embeddings.
        """
        index = place if isinstance(place, VectorIndex) else open_index(place, **options)
        self._index = index.use_embedder(self.embedder)
        return index

    def search(self, images, k=10, where=None, containing=None, *, channel_order="rgb", **options):
        """The items of the index that are most similar to images.

        Args:
            images: As for `encode`.
            k, where, containing, **options: As for [`VectorIndex.search`]: also `min_similarity`, `group_by`,
                `rerank` and `expand`.
            channel_order: As for `encode`.

        Returns:
            For each image at most k [`Hit`], most similar first: `id`, `similarity`, `metadata` (column -> value),
            `path`.

        Raises:
            ImageError: an image can't be read; the message names it.
            ValueError: there is no index yet, or as for [`VectorIndex.search`]; a filter on a value that no item has.
        """
        index = self._index
        if index is None:
            raise ValueError("there is no index to search: call index(images, place) or open_index(place) first")
        index.require_values(where)
        embeddings = self.embedder.embed_images(images, channel_order=channel_order)
        return index.search(embeddings, k, where, containing, **options)


__all__ = ["Retriever"]
