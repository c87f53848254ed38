"""Class-balanced training from a stream: the same batches whatever the workers, ranks and interruptions."""

import pickle
import random
from collections import Counter
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from data_fixtures import write_classes
from torch.utils.data import DataLoader

from vptsp import DataError, ImageError, TrainTransform, collate_images, load_splits
from vptsp.data_scripts.sampler import augmentation_seeds
from vptsp.data_scripts.streaming import StreamBatchSampler, StreamedImages


COUNTS = {"a": 9, "b": 5, "c": 7, "d": 1, "e": 8, "f": 6, "z": 2}
SIZES = [9, 5, 7, 1, 8, 6]
NUM_ROWS = sum(SIZES)


def features(num_classes):
    return datasets.Features(
        {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(num_classes=num_classes)}
    )


def _rows(shards):
    for shard in shards:
        for path, label in shard:
            yield {"image": path and {"path": path, "bytes": None}, "label": label}


def stream_of(sizes, num_shards=4):
    """Rows of paths that don't exist, dealt out to shards at random."""
    rows = [(f"{label}/{i}", label) for label, size in enumerate(sizes) for i in range(size)]
    random.Random(0).shuffle(rows)
    shards = [rows[i::num_shards] for i in range(num_shards)]
    return datasets.IterableDataset.from_generator(_rows, gen_kwargs={"shards": shards}, features=features(len(sizes)))


def make_sampler(sizes=SIZES, batch_size=8, k=2, seed=3, num_rows="all", num_shards=4, **options):
    num_rows = sum(sizes) if num_rows == "all" else num_rows
    images = StreamedImages(stream_of(sizes, num_shards), TrainTransform(8), num_rows=num_rows)
    return images.batch_sampler(batch_size, k, seed, **{"buffer_size": 16, **options})


@pytest.fixture
def root(tmp_path):
    return write_classes(tmp_path / "root", COUNTS)


def load_stream(root, tmp_path, num_shards=3):
    table = load_splits("folder", root, cache_dir=tmp_path / "cache", test_classes=["z"])["train"]
    return table.shuffle(seed=0).flatten_indices().to_iterable_dataset(num_shards=num_shards)


# ---- batches


@pytest.mark.parametrize("num_rows", ["all", None])
@pytest.mark.parametrize("batch_size, k, buffer_size", [(8, 2, 16), (8, 2, 500), (6, 3, 20), (4, 1, 8), (12, 4, 24)])
def test_batches_are_class_balanced(batch_size, k, buffer_size, num_rows):
    sampler = make_sampler(batch_size=batch_size, k=k, num_rows=num_rows, buffer_size=buffer_size)
    batches = list(sampler)
    if num_rows == "all":
        assert len(batches) == len(sampler) == NUM_ROWS // batch_size
    for batch in batches:
        labels = np.array([key.row.label for key in batch]).reshape(-1, k)
        assert (labels == labels[:, :1]).all() and len(set(labels[:, 0])) == batch_size // k
        assert all(key.row.name.startswith(f"{key.row.label}/") and key.others == () for key in batch)
    used = Counter(key.row.name for batch in batches for key in batch)
    if num_rows is None:  # one pass: only where a class has fewer than k images are any used twice
        assert all(count == 1 or SIZES[int(name[0])] < k for name, count in used.items())


def test_augmentation_seeds_are_those_of_the_places():
    sampler = make_sampler()
    sampler.set_epoch(5)
    seeds = [key.augmentation_seed for batch in sampler for key in batch]
    assert seeds == augmentation_seeds(3, 5, len(seeds)).tolist()
    assert augmentation_seeds(3, 5, 4, start=7).tolist() == augmentation_seeds(3, 5, 11).tolist()[7:]


def test_an_epoch_begins_another_pass_where_one_is_too_short():
    """Of 12 classes with 3 images, a pass uses 2 each: 3 batches of 4 classes, where 36 // 8 are to be made."""
    alone = make_sampler([3] * 12, num_rows=None, buffer_size=36)
    assert len(list(alone)) == 3
    sampler = make_sampler([3] * 12, buffer_size=36)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 4
    assert batches[:3] == list(alone)
    # a class with fewer than k images repeats them in every pass
    keys = [key for batch in make_sampler([1, 1], batch_size=8, k=4, num_rows=40, buffer_size=8) for key in batch]
    assert Counter(key.row.name for key in keys) == {"0/0": 20, "1/0": 20}


def test_epochs_differ_and_each_can_be_had_alone():
    sampler, epochs = make_sampler(), []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
        assert list(sampler) == epochs[-1]
    other = make_sampler()
    other.set_epoch(3)
    random.seed(0)
    np.random.seed(0)  # global state has no part in it
    assert list(other) == epochs[3]
    orders = [tuple(key.row.name for batch in epoch for key in batch) for epoch in epochs]
    assert len(set(orders)) == 4
    assert list(make_sampler(seed=4)) != epochs[0]


def test_shards_are_mixed():
    """A stream sorted by class, a shard per class: the first rows come from all, each time in another order."""
    rows = [[(f"{label}/{i}", label) for i in range(100)] for label in range(12)]
    stream = datasets.IterableDataset.from_generator(_rows, gen_kwargs={"shards": rows}, features=features(12))
    images = StreamedImages(stream, TrainTransform(8))
    passes = [[row.name for row in images.read_rows(random.Random(seed))] for seed in (0, 0, 1)]
    assert passes[0] == passes[1] != passes[2]
    assert sorted(passes[0]) == sorted(name for shard in rows for name, _ in shard)
    assert len({name.split("/")[0] for name in passes[0][:100]}) == 12


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_see_the_global_batch(world_size):
    whole = make_sampler()
    ranks = [make_sampler(rank=rank, world_size=world_size) for rank in range(world_size)]
    for sampler in (whole, *ranks):
        sampler.set_epoch(2)
    assert {sampler.batch_size for sampler in ranks} == {8 // world_size}
    for batch, *parts in zip(whole, *ranks, strict=True):
        assert [key for part in parts for key in part] == batch
        assert {len(part) for part in parts} == {8 // world_size}


def test_batches_do_not_depend_on_workers(root, tmp_path):
    stream = load_stream(root, tmp_path)
    images = StreamedImages(stream, TrainTransform(8), num_rows=NUM_ROWS)

    def batches(num_workers):
        sampler = images.batch_sampler(8, 2, seed=1, buffer_size=16)
        sampler.set_epoch(1)
        return list(DataLoader(images, batch_sampler=sampler, collate_fn=collate_images, num_workers=num_workers))

    alone, two = batches(0), batches(2)
    assert len(alone) == NUM_ROWS // 8 and images.class_names == list("abcdef") and images.num_classes == 6
    assert alone[0]["pixel_values"].shape == (8, 3, 8, 8) and alone[0]["pixel_values"].dtype == torch.uint8
    assert alone[0]["labels"].dtype == torch.int64
    for one, other in zip(alone, two, strict=True):
        assert torch.equal(one["pixel_values"], other["pixel_values"]) and torch.equal(one["labels"], other["labels"])
    # the pixels are those of the file, the crop that of the seed
    sampler = images.batch_sampler(8, 2, seed=1, buffer_size=16)
    sampler.set_epoch(1)
    from PIL import Image

    for batch, keys in zip(alone, sampler, strict=True):
        for pixels, label, key in zip(batch["pixel_values"], batch["labels"], keys, strict=True):
            path = Path(key.row.name)
            expected = TrainTransform(8)(Image.open(path).convert("RGB"), random.Random(key.augmentation_seed))
            assert torch.equal(pixels, expected) and "abcdef"[int(label)] == path.parent.name


def test_streams_of_the_builders(root, tmp_path):
    stream = load_splits("folder", root, streaming=True, test_classes=["z"])["train"]
    images = StreamedImages(stream, TrainTransform(8), num_rows=NUM_ROWS)
    assert images.class_names == list("abcdef")
    batches = list(images.batch_sampler(12, 2, seed=0))
    assert len(batches) == NUM_ROWS // 12
    for key in batches[0]:
        path = Path(key.row.name)
        assert path.is_relative_to(root) and "abcdef"[key.row.label] == path.parent.name
        assert images[key]["labels"] == key.row.label


# ---- resuming


@pytest.mark.parametrize("done", [0, 1, 3, 4])
def test_resume_within_an_epoch(done):
    whole = make_sampler()
    whole.set_epoch(2)
    expected = list(whole)
    interrupted = make_sampler()
    interrupted.set_epoch(2)
    batches = iter(interrupted)
    first = [next(batches) for _ in range(done)]
    state = pickle.loads(pickle.dumps(interrupted.state_dict()))
    assert state["batches"] == done and state["epoch"] == 2
    resumed = make_sampler()
    resumed.load_state_dict(state)
    resumed.set_epoch(2)  # as a trainer does
    rest = list(resumed)
    assert first + rest == expected
    assert resumed.state_dict() == whole.state_dict()
    assert list(resumed) == expected  # only the first iter goes on from the state
    resumed.load_state_dict(state)
    resumed.set_epoch(3)
    whole.set_epoch(3)
    assert list(resumed) == list(whole)


def test_resume_of_a_loader(root, tmp_path):
    """As transformers' Trainer does it, and by the state: no image that was used before is decoded again."""
    stream, decoded = load_stream(root, tmp_path), []

    class Counting(TrainTransform):
        def __call__(self, image, rng):
            decoded.append(image.name)
            return super().__call__(image, rng)

    images = StreamedImages(stream, Counting(8), num_rows=NUM_ROWS)

    def loader():
        sampler = images.batch_sampler(8, 2, seed=1, buffer_size=16)
        sampler.set_epoch(1)
        return DataLoader(images, batch_sampler=sampler, collate_fn=collate_images)

    expected = list(loader())[2:]
    decoded.clear()
    resumed = loader()
    resumed.batch_sampler.load_state_dict({**resumed.batch_sampler.state_dict(), "batches": 2})
    for rest in map(list, (skip_first_batches(loader(), 2), resumed)):
        assert len(decoded) == 8 * len(expected)
        decoded.clear()
        for one, other in zip(rest, expected, strict=True):
            assert torch.equal(one["pixel_values"], other["pixel_values"])


def test_resume_refuses_other_settings():
    state = make_sampler().state_dict()
    for name, other in (("seed", {"seed": 4}), ("buffer_size", {"buffer_size": 17}), ("num_rows", {"num_rows": None})):
        with pytest.raises(ValueError, match=rf"{name} is .*, but the state was saved with {state[name]}"):
            make_sampler(**other).load_state_dict(state)
    make_sampler(rank=1, world_size=2).load_state_dict(state)  # the global batches are the same


# ---- what a stream may hold


def test_bytes_decoded_images_and_plain_labels(root, tmp_path):
    paths = sorted(root.glob("[ab]/*.png"))
    kinds = datasets.Features({"photo": datasets.Image(), "kind": datasets.Value("int32")})
    columns = {
        "photo": [{"path": None, "bytes": path.read_bytes()} for path in paths],
        "kind": ["ab".index(path.parent.name) for path in paths],
    }
    stream = datasets.Dataset.from_dict(columns, features=kinds).to_iterable_dataset()
    options = {"image_column": "photo", "label_column": "kind"}
    images = StreamedImages(stream, TrainTransform(8), num_classes=2, **options)
    batches = list(images.batch_sampler(4, 2, seed=0))
    assert images.class_names == ["0", "1"] and len(batches) == 2
    assert images[batches[0][0]]["pixel_values"].shape == (3, 8, 8)
    with pytest.raises(DataError, match="column 'kind' has no class names: num_classes is needed"):
        StreamedImages(stream, TrainTransform(8), **options)
    with pytest.raises(DataError, match=r"row \d+ of the stream has the label 1; expected 0..0"):
        list(StreamedImages(stream, TrainTransform(8), num_classes=1, **options).batch_sampler(2, 2, seed=0))


def test_images_elsewhere(root):
    content = (root / "a/000.png").read_bytes()
    with fsspec.open("memory://stream/a.png", "wb") as file:
        file.write(content)
    shards = [[("memory://stream/a.png", 0), (str(root / "a/000.png"), 0), ("memory://stream/gone.png", 0)]]
    stream = datasets.IterableDataset.from_generator(_rows, gen_kwargs={"shards": shards}, features=features(1))
    images = StreamedImages(stream, TrainTransform(8))
    keys = {key.row.name: key._replace(augmentation_seed=1) for (key,) in images.batch_sampler(1, 1, seed=0)}
    remote, local = images[keys["memory://stream/a.png"]], images[keys[str(root / "a/000.png")]]
    assert torch.equal(remote["pixel_values"], local["pixel_values"])
    with pytest.raises(ImageError, match=r"memory://stream/gone.png: there is no such file"):
        images[keys["memory://stream/gone.png"]]


def test_workers_get_no_stream(root, tmp_path):
    images = StreamedImages(load_stream(root, tmp_path), TrainTransform(8))
    key = next(iter(images.batch_sampler(8, 2, seed=0)))[0]
    copy = pickle.loads(pickle.dumps(images))
    assert copy.stream is None and images.stream is not None
    assert torch.equal(copy[key]["pixel_values"], images[key]["pixel_values"])


# ---- images that can't be read


def test_corrupt_images(root, tmp_path):
    stream = load_stream(root, tmp_path)
    for name in ("a/001", "a/005", "c/003"):
        path = root / f"{name}.png"
        path.write_bytes(path.read_bytes()[:60])
    plain, skipping = (
        StreamedImages(stream, TrainTransform(8), NUM_ROWS, skip_corrupt=skip) for skip in (False, True)
    )
    batches = []
    for images in (plain, skipping):
        sampler = images.batch_sampler(8, 2, seed=1, buffer_size=24)
        batches.append([keys for epoch in range(4) for _ in [sampler.set_epoch(epoch)] for keys in sampler])
    met = set()
    for keys, same in zip(*batches, strict=True):
        assert [key[:2] for key in keys] == [key[:2] for key in same]  # the option changes no batch
        for key, with_others in zip(keys, same, strict=True):
            assert {row.label for row in with_others.others} <= {key.row.label} and key.row not in with_others.others
            try:
                expected = plain[key]["pixel_values"]
            except ImageError as error:
                assert f"{key.row.name}: can't read this image" in str(error)
                met.add(key.row.name)
                other = next(row for row in with_others.others if row.name not in broken(root))
                expected = plain[key._replace(row=other)]["pixel_values"]
            example = skipping[with_others]
            assert torch.equal(example["pixel_values"], expected) and example["labels"] == key.row.label
    assert met and met <= set(skipping.skipped) <= broken(root)
    assert plain.skipped == []


def broken(root):
    return {str(root / f"{name}.png") for name in ("a/001", "a/005", "c/003")}


def test_workers_report_what_they_skip(root, tmp_path):
    stream = load_stream(root, tmp_path)
    path = root / "a/001.png"
    path.write_bytes(b"")
    images = StreamedImages(stream, TrainTransform(8), NUM_ROWS, skip_corrupt=True)
    sampler = images.batch_sampler(8, 2, seed=1, buffer_size=40)
    loader = DataLoader(images, batch_sampler=sampler, collate_fn=collate_images, num_workers=2)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        assert all(len(batch["labels"]) == 8 for batch in loader)
    assert images.skipped == [str(path)]
    key = next(key for keys in sampler for key in keys if key.row.label == 0)
    for row in (key.row, *key.others):
        Path(row.name).write_bytes(b"")
    with pytest.raises(ImageError, match=r"class 'a': of the \d images drawn for a batch none can be read: '.*a/00"):
        images[key]


# ---- errors


def test_length_that_is_not_known():
    sampler = make_sampler(num_rows=None)
    for thing in (sampler, sampler.images):
        with pytest.raises(TypeError, match="the stream has no known length: give num_rows"):
            len(thing)
    assert len(make_sampler().images) == NUM_ROWS and len(make_sampler(batch_size=12, num_rows=3)) == 1


@pytest.mark.parametrize(
    "change, message",
    [
        ({"batch_size": 7}, "batch_size must be a multiple of images_per_class 2, got 7"),
        ({"batch_size": 14}, "asks for 7 different classes in a batch, but there are 6"),
        ({"world_size": 3}, "must divide evenly among world_size 3"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
        ({"buffer_size": 7}, "buffer_size must be >= batch_size 8, got 7"),
        ({"num_rows": 0}, "num_rows must be >= 1 or None, got 0"),
    ],
)
def test_arguments_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        make_sampler(**change)


def test_epoch_must_not_be_negative():
    with pytest.raises(ValueError, match="epoch must be >= 0, got -1"):
        make_sampler().set_epoch(-1)


def test_streams_are_checked():
    stream = stream_of([3, 3])
    for options, message in (
        ({"num_classes": 3}, "num_classes is 3, but column 'label' has 2 classes"),
        ({"image_column": "photo"}, "there is no column 'photo'; the columns are image, label"),
        ({"image_column": "label"}, r"column 'label' must hold images \(datasets.Image\)"),
    ):
        with pytest.raises(DataError, match=message):
            StreamedImages(stream, TrainTransform(8), **options)
    unknown = datasets.IterableDataset.from_generator(_rows, gen_kwargs={"shards": [[("x", 0)]]})
    with pytest.raises(DataError, match=r"features of the stream are not known: declare them with stream.cast"):
        StreamedImages(unknown, TrainTransform(8))
    nothing = datasets.IterableDataset.from_generator(_rows, gen_kwargs={"shards": [[]]}, features=features(2))
    with pytest.raises(DataError, match="the stream is empty"):
        next(iter(StreamBatchSampler(StreamedImages(nothing, TrainTransform(8), 10), 4, 2, seed=0)))
    no_image = datasets.IterableDataset.from_generator(
        _rows, gen_kwargs={"shards": [[(None, 0)]]}, features=features(1)
    )
    with pytest.raises(DataError, match="row 0 of the stream has no image in column 'image'"):
        next(iter(StreamedImages(no_image, TrainTransform(8)).batch_sampler(1, 1, seed=0)))
    with pytest.raises(DataError, match="images of 2 classes only, but a batch needs 3"):
        shards = [[("x", 0), ("y", 1)]]
        few = datasets.IterableDataset.from_generator(_rows, gen_kwargs={"shards": shards}, features=features(5))
        next(iter(StreamedImages(few, TrainTransform(8), 10).batch_sampler(3, 1, seed=0)))
    with pytest.raises(DataError, match="buffer of 8 rows is full and can't fill a batch"):
        list(make_sampler([2] * 200, buffer_size=8))
