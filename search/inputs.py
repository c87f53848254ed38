"""From the options of a command to models, sources of images and stores."""

from __future__ import annotations

import contextlib
import os
import sys
from functools import partial
from pathlib import Path

import torch

from ..data_scripts.data_arguments import DataArguments, check_data_arguments
from ..data_scripts.data_errors import DataError
from ..data_scripts.preprocessing import geometry_of, load_image_processor
from ..data_scripts.split_record import SPLITS_NAME
from ..eval.reranking import QueryExpansion, Reranking
from .embed import cached_store
from .embedder import Embedder, is_retriever
from .image_sources import joined_source
from .model_names import check_model_name, model_name_of
from .places import place_source
from .run_splits import recorded_sources, say_trained_on
from .store import STORE_FILE, EmbeddingStore
from .table_sources import split_source
from .views import views_of


ENGINE_OPTIONS = ("workers", "cpus", "gpus")


def load_embedder(name, options):
    """The model of a command, on its device; where an engine embeds, on the CPU, to say what the workers must have."""
    name = check_model_name(name)
    device = options.device if getattr(options, "engine", None) is None else "cpu"
    with no_progress_bars():
        embedder = Embedder.from_pretrained(name, **_embedder_options(name, options), device=device)
    if options.dtype == "auto":
        print(f"computes in {str(embedder.dtype).removeprefix('torch.')}", file=sys.stderr)
    if options.command == "compare":
        print(f"{name}: images of {embedder.preprocess.image_size} pixels", file=sys.stderr)
    return embedder


def engine_of(name, options):
    """Where a command embeds: None for this process, or a [`RayEngine`] whose workers load the model of that name.

    Raises:
        DataError: an option is for the other.
        ImportError: Ray is not installed.
    """
    given = {key: value for key in ENGINE_OPTIONS if (value := getattr(options, f"engine_{key}")) is not None}
    if options.engine is None:
        if given:
            raise DataError(f"--engine_{next(iter(given))} goes with --engine ray")
        return None
    if options.device is not None:
        raise DataError("--device is for this process; --engine_gpus says how many GPUs a worker has")
    if options.dtype == "auto":
        raise DataError("with --engine, --dtype can't be auto: which is fast is known where the workers are")
    from .ray_engine import RayEngine  # of an extra

    values = _embedder_options(name, options)
    values["backbone"] = _everywhere(values["backbone"])
    device = None if given.get("gpus") else "cpu"
    return RayEngine(partial(Embedder.from_pretrained, _everywhere(name), **values, device=device), **given)


def _everywhere(name):
    """A model's name as workers find it, which may be in another folder."""
    return name if name is None or not Path(name).is_dir() else str(Path(name).resolve())


def _embedder_options(name, options):
    """Options of `Embedder.from_pretrained` but for the device."""
    backbone, sizes = options.backbone, {"image_size": options.image_size, "resize_size": options.resize_size}
    if options.command == "compare":  # what is meant for the other one
        if is_retriever(name, options.revision):
            sizes = dict.fromkeys(sizes)
        else:
            backbone, sizes = None, _size_to_compare(options, sizes)
    return {
        "revision": options.revision,
        "backbone": backbone,
        **sizes,
        "batch_size": options.batch_size,
        "dtype": options.dtype if options.dtype == "auto" else getattr(torch, options.dtype),
        "max_image_pixels": options.max_image_pixels,
        "views": options.views or "one",
    }


def _size_to_compare(options, sizes):
    """The sizes of a bare backbone: those that were given, else the retriever's that it is compared with."""
    other = next((name for name in (options.first, options.second) if _is_saved_retriever(name, options)), None)
    if other is None or sizes["image_size"] is not None:
        return sizes
    processor = load_image_processor(other, options.revision)
    image_size, resize_size = geometry_of(processor, None)
    return {"image_size": image_size, "resize_size": sizes["resize_size"] or resize_size}


def _is_saved_retriever(name, options):
    return not (Path(name) / STORE_FILE).is_file() and is_retriever(check_model_name(name), options.revision)


@contextlib.contextmanager
def no_progress_bars():
    """Loading weights takes a second and needs no bar."""
    from transformers.utils import logging  # slow to load, and stores need no model

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_sources(options):
    """The images that a command names: dict of split -> `ImageSource`; `images` for a folder, a list or a table.

    Scores of a run are of the images that it has kept apart, unless others are named.

    Raises:
        DataError: neither `--images` nor a data set was given, or both, or the split is not there.
    """
    model = _run_of(options)
    if model is not None and options.images is None:
        recorded = recorded_sources(model, options.data)
        if recorded is not None:
            return recorded
    sources = _named_sources(options)
    if model is not None:
        say_trained_on(model, {name: source for name, source in sources.items() if name != "train"})
    return sources


def _run_of(options):
    """The folder of the run that a command scores; None where there is none that recorded its images."""
    names = {"evaluate": ("model",), "compare": ("first", "second")}.get(options.command, ())
    models = [getattr(options, name) for name in names]
    return next((name for name in models if name is not None and (Path(name) / SPLITS_NAME).is_file()), None)


def _named_sources(options):
    names_data = bool({"dataset_name", "data_dir"} & set(options.data))  # a place alone is class folders
    if (options.images is None) == (not names_data):
        got = "neither" if options.images is None else "both"
        hint = ""
        if got == "neither" and options.command in ("evaluate", "compare"):
            hint = f" (no model has a {SPLITS_NAME}, by which a run says what it kept apart)"
        raise DataError(
            f"give either --images (a folder, a list or a table) or --dataset_name or --data_dir, got {got}{hint}"
        )
    if options.images is not None:
        return {"images": place_source(options.images, **options.data)}
    arguments = DataArguments(**options.data)
    check_data_arguments(arguments)
    splits = arguments.load_splits()
    place = f"{arguments.dataset_name}{'' if arguments.data_dir is None else f' in {arguments.data_dir}'}"
    return {name: split_source(split, f"{name} of {place}", arguments.data_dir) for name, split in splits.items()}


def choose_sets(sources, split=None, whole=False):
    """Queries and gallery (or None) among the splits of a data set.

    Args:
        sources: Dict of [`load_sources`].
        split: Name of one; None for `images`, `test`, or `query` against `gallery`.
        whole: None stands for all images instead.

    Raises:
        DataError: there is no such split.
    """
    if split is None and whole:
        return joined_source(sources, _all_description(sources)), None
    if split is None and "query" in sources:
        return sources["query"], sources["gallery"]
    split = next(iter(sources)) if list(sources) == ["images"] else split or "test"
    if split not in sources:
        raise DataError(f"split must be one of {', '.join(sources)}, got {split!r}")
    return sources[split], None


def _all_description(sources):
    """As the descriptions of the splits, of all of them."""
    if len(sources) == 1:
        return next(iter(sources.values())).description
    return f"{', '.join(sources)} of {next(iter(sources.values())).description.partition(' of ')[2]}"


def store_options(options):
    """Options of `embed_to_store`."""
    return {
        "num_workers": options.num_workers,
        "shard_size": options.shard_size,
        "embedding_dtype": options.embedding_dtype,
        "skip_corrupt": options.skip_corrupt,
        "progress": not options.quiet and sys.stderr.isatty(),
        "lock_timeout": options.lock_timeout,
    }


def model_of(index, options):
    """The model that searches an index by image: the one of `--model`, or that which the index names.

    Of the views that are averaged, `--views` becomes those of the index where it doesn't say others.

    Raises:
        DataError: neither says which.
    """
    options.views = options.views or views_of(index.model)
    return model_name_of(index, options.index, options.model)


def embedder_of(index, name, backbone=None):
    """The model that searches an index by image, by the views whose embeddings the index holds.

    Args:
        index: [`VectorIndex`].
        name: Of the model; see [`model_name_of`].
        backbone: Of its backbone, where it isn't where the model says.
    """
    with no_progress_bars():
        return Embedder.from_pretrained(name, backbone=backbone, views=views_of(index.model))


def orders_of(options):
    """`rerank` and `expand` of a command line, as [`VectorIndex.search`] takes them."""
    kinds = {"rerank": Reranking, "expand": QueryExpansion}
    words = {name: getattr(options, name) for name in kinds}
    return {name: None if words[name] is None else kind.of_words(words[name]) for name, kind in kinds.items()}


def refuse_model_options(options, instead):
    """A DataError if an option says something of a model where none is loaded; `instead` is what it goes with."""
    engine = ("engine", *(f"engine_{name}" for name in ENGINE_OPTIONS))
    for name in ("model", "backbone", "revision", "image_size", "resize_size", "views", *engine):
        if getattr(options, name, None) is not None:  # not all commands have an engine
            raise DataError(f"--{name} goes with {instead}")


def check_compared(options):
    """A DataError if an option of `compare` is for neither of its two models."""
    names = [name for name in (options.first, options.second) if not (Path(name) / STORE_FILE).is_file()]
    kinds = {is_retriever(check_model_name(name), options.revision) for name in names}
    for option, for_retrievers in (("backbone", True), ("image_size", False), ("resize_size", False)):
        if getattr(options, option) is not None and for_retrievers not in kinds:
            what = "a retriever" if for_retrievers else "a bare backbone"
            raise DataError(f"--{option} is for {what}, and neither {options.first} nor {options.second} is one")
    if options.views is not None and not names:
        raise DataError(f"--views is for models, and both {options.first} and {options.second} are stores")


def model_or_store(options):
    """The model or the store that a command is to take embeddings from.

    Raises:
        DataError: neither or both were given, or images with a store, which holds what is made of its own.
    """
    if (options.model is None) == (options.store is None):
        got = "neither" if options.model is None else "both"
        raise DataError(f"give either --model (and images) or --store, got {got}")
    if options.store is not None and (options.images is not None or options.data):
        raise DataError("--images and the options of data sets go with --model; a store has its own images")
    if options.store is not None:
        refuse_model_options(options, "--model; a store has its embeddings")
    return options.model or options.store


def stores_of(name, options, gallery_store=None):
    """Stored embeddings of queries and gallery (or None), from a store or by embedding with a model.

    Args:
        name: Folder of a store, or a model.
        options: Of the command.
        gallery_store: Folder of the gallery's store, with a store only.
    """
    if (Path(name) / STORE_FILE).is_file():
        gallery = None if gallery_store is None else EmbeddingStore.open(gallery_store)
        return EmbeddingStore.open(name), gallery
    sets = sets_of(options)
    return embedded(load_embedder(name, options), sets, options)


def sets_of(options):
    """Queries and gallery (or None) that a command names. They are looked up once, and so are warnings of them."""
    if not hasattr(options, "sets"):
        options.sets = choose_sets(load_sources(options), options.split)
    return options.sets


def embedded(embedder, sets, options):
    """Stored embeddings of queries and gallery (or None)."""
    cache, how = options.embeddings_cache, store_options(options)
    return tuple(None if source is None else cached_store(embedder, source, cache, **how) for source in sets)


def is_main_rank():
    """Whether this process, of those that `torchrun` started, is the one that prints and writes reports."""
    return int(os.environ.get("RANK", "0")) == 0


__all__ = [
    "check_compared",
    "choose_sets",
    "embedded",
    "embedder_of",
    "engine_of",
    "is_main_rank",
    "load_embedder",
    "load_sources",
    "model_of",
    "model_or_store",
    "no_progress_bars",
    "orders_of",
    "refuse_model_options",
    "sets_of",
    "store_options",
    "stores_of",
]
