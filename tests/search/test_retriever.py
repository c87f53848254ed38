"""search/retriever.py and the forms of images that `Embedder` takes: the same embedding whatever the form."""

import io
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from data_fixtures import write_classes, write_image
from PIL import Image

from vptsp import DataError, Embedder, ImageError, Retriever, open_index


@pytest.fixture(scope="module")
def retriever(retriever_folder):
    return Retriever.from_pretrained(retriever_folder, batch_size=4)


@pytest.fixture
def photos(tmp_path):
    return write_classes(tmp_path / "photos", {"a": 4, "b": 3})


@pytest.fixture
def picture(tmp_path):
    return write_image(tmp_path / "picture.png", size=(30, 22))


def test_four_lines(retriever_folder, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    retriever = Retriever.from_pretrained(retriever_folder)
    retriever.index(photos, tmp_path / "catalogue", progress=False, cache_dir=tmp_path / "cache")
    hit = retriever.search(photos / "a" / "001.png", k=3)[0][0]
    assert (hit.id, hit.path, hit.metadata) == ("a/001.png", str(photos / "a" / "001.png"), {"class_name": "a"})
    assert hit.similarity == pytest.approx(1, abs=1e-5)


def test_every_form_gives_the_same(retriever, picture):
    image = Image.open(picture)
    rgb = np.asarray(image)
    with picture.open("rb") as stream:
        forms = [
            str(picture),
            picture,
            picture.read_bytes(),
            bytearray(picture.read_bytes()),
            stream,
            io.BytesIO(picture.read_bytes()),
            image,
            rgb,
            np.dstack([rgb, np.full(rgb.shape[:2], 7, dtype=np.uint8)]),  # with an alpha channel
            np.asfortranarray(rgb),
            torch.tensor(rgb).permute(2, 0, 1),
        ]
        expected = retriever.embedder.embed_images([picture]).numpy()
        for form in forms:
            np.testing.assert_allclose(retriever.encode(form), expected, atol=1e-6)
        stream.seek(0)
        forms[5].seek(0)
        mixed = retriever.encode(forms)
    assert (mixed.dtype, mixed.shape) == (np.float32, (len(forms), 8))
    np.testing.assert_allclose(mixed, expected.repeat(len(forms), 0), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(mixed, axis=1), 1, atol=1e-6)
    assert torch.equal(retriever.encode(picture, convert_to_tensor=True), torch.from_numpy(expected))


def test_order_of_channels(retriever, picture):
    """As OpenCV reads a file: blue first. That is said, and never guessed."""
    rgb = np.asarray(Image.open(picture))
    bgr = np.ascontiguousarray(rgb[:, :, ::-1])
    bgra = np.dstack([bgr, np.zeros(rgb.shape[:2], dtype=np.uint8)])
    expected = retriever.encode(picture)
    for array in (bgr, bgra):
        np.testing.assert_allclose(retriever.encode(array, channel_order="bgr"), expected, atol=1e-6)
        assert np.abs(retriever.encode(array) - expected).max() > 1e-2
    np.testing.assert_allclose(retriever.encode(picture, channel_order="bgr"), expected, atol=1e-6)  # files say theirs
    with pytest.raises(ValueError, match="channel_order must be 'rgb' or 'bgr', got 'gbr'"):
        retriever.encode(bgr, channel_order="gbr")


def test_grey_arrays(retriever):
    grey = np.random.default_rng(0).integers(0, 256, (20, 24), dtype=np.uint8)
    expected = retriever.encode(np.dstack([grey] * 3))
    for array in (grey, grey[:, :, None]):
        np.testing.assert_allclose(retriever.encode(array), expected, atol=1e-6)


def test_batches_of_arrays_and_tensors_are_lists(retriever):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 20, 24, 3), dtype=np.uint8)
    expected = np.concatenate([retriever.encode(image) for image in pixels])
    np.testing.assert_allclose(retriever.encode(pixels), expected, atol=1e-6)
    np.testing.assert_allclose(retriever.encode(torch.from_numpy(pixels).permute(0, 3, 1, 2)), expected, atol=1e-6)


@pytest.mark.parametrize(("num_workers", "batch_size"), [(0, 3), (1, 2), (3, 5), (2, 100)])
def test_workers_and_batches_change_nothing(retriever, photos, num_workers, batch_size):
    files = sorted(photos.rglob("*.png"))
    found = retriever.encode(iter(files), num_workers=num_workers, batch_size=batch_size, progress=False)
    np.testing.assert_allclose(found, np.concatenate([retriever.encode(file) for file in files]), atol=1e-6)


def test_images_are_decoded_while_the_model_runs(retriever, photos, monkeypatch):
    """The model, at its first batch, waits for an image of the second to be decoded."""
    files, decoded = sorted(photos.rglob("*.png")), threading.Event()
    preprocess, embed = retriever.embedder.preprocess, retriever.embedder.embed_pixels

    def noticing(image, **options):
        if image == files[3]:
            decoded.set()
        return preprocess(image, **options)

    def waiting(pixel_values):
        assert decoded.wait(30)
        return embed(pixel_values)

    monkeypatch.setattr(retriever.embedder, "preprocess", noticing)
    monkeypatch.setattr(retriever.embedder, "embed_pixels", waiting)
    assert retriever.encode(files, batch_size=2, num_workers=1).shape == (7, 8)


def test_progress_has_a_total(retriever, photos, capsys):
    retriever.encode(sorted(photos.rglob("*.png")), progress=True)
    assert "0/7" in capsys.readouterr().err


def test_what_is_no_image(retriever, picture, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    for workers in (0, 2):
        with pytest.raises(ImageError, match=r"broken\.jpg"):
            retriever.encode([picture, broken], num_workers=workers)
    with broken.open("rb") as stream, pytest.raises(ImageError, match=r"broken\.jpg"):
        retriever.encode(stream)
    with broken.open() as stream, pytest.raises(TypeError, match=r"broken\.jpg must be opened in binary mode"):
        retriever.encode(stream)
    for array, message in [
        (np.zeros((4, 4, 2), dtype=np.uint8), r"shape \(height, width, 1, 3 or 4\) or 2-D, got \(4, 4, 2\)"),
        (np.zeros((0, 4, 3), dtype=np.uint8), r"got \(0, 4, 3\)"),
        (np.zeros(4, dtype=np.uint8), r"got \(4,\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            retriever.encode(array)
    for array in (np.zeros((4, 4, 3), dtype=np.uint16), np.zeros((4, 4, 3))):
        with pytest.raises(TypeError, match=f"got one of {array.dtype}"):
            retriever.encode(array)
    for name, value, least in (
        ("batch_size", 0, 1), ("batch_size", 2.5, 1), ("batch_size", "x", 1), ("num_workers", -1, 0),
        ("num_workers", "x", 0),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name} must be an integer >= {least}, got {value!r}"):
            retriever.encode(picture, **{name: value})
    for images in (3, None, True, {"a.jpg": 1}):
        kind = type(images).__name__
        with pytest.raises(TypeError, match=f"images must be a path, .* or an iterable of such, got {kind}"):
            retriever.encode(images)
        with pytest.raises(TypeError, match=f"images must be a folder, a .txt list or an ImageSource, got {kind}"):
            retriever.index(images, "nowhere")
    for place in (3, None):
        for call in (lambda: retriever.index("nowhere", place), lambda: retriever.open_index(place)):  # noqa: B023
            with pytest.raises(TypeError, match=f"an index must be a folder, or .*, got {type(place).__name__}"):
                call()
        with pytest.raises(TypeError, match="model must be a folder or OWNER/NAME on the Hub, got"):
            Retriever.from_pretrained(place)
    with pytest.raises(TypeError, match=r"embedder must be an Embedder, got str; Retriever\.from_pretrained"):
        Retriever("runs/photos")
    with pytest.raises(ValueError, match="at least one image"):
        retriever.encode([])


def test_arrays_have_a_limit_of_pixels(retriever_folder):
    small = Retriever.from_pretrained(retriever_folder, max_image_pixels=100)
    for image in (np.zeros((20, 20, 3), dtype=np.uint8), torch.zeros(3, 20, 20, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="400 pixels, more than max_image_pixels 100"):
            small.encode(image)


def test_errors_by_image(retriever, photos, tmp_path):
    files = [
        *sorted(photos.rglob("*.png"))[:2],
        tmp_path / "absent.png",
        photos / "b" / "000.png",
        tmp_path / "no.png",
    ]
    failed = {}
    found = retriever.embedder.embed_images(files, failed=failed, batch_size=2, num_workers=2)
    np.testing.assert_allclose(found.numpy(), retriever.encode([files[i] for i in (0, 1, 3)]), atol=1e-6)
    assert sorted(failed) == [2, 4]
    assert "absent.png: there is no such file" in str(failed[2])
    failed = {}
    assert retriever.embedder.embed_images(files[2:3], failed=failed).shape == (0, 8)


def test_a_bare_backbone(backbone_folder, photos, tmp_path):
    retriever = Retriever.from_pretrained(backbone_folder, resize_size=18)
    changes = retriever.index(str(photos), tmp_path / "catalogue", progress=False, cache_dir=tmp_path / "cache")
    assert (changes.added, retriever.embedding_dim) == (7, 24)
    assert retriever.search([photos / "b" / "001.png"])[0][0].id == "b/001.png"


def test_searching_needs_an_index_of_this_model(retriever_folder, backbone_folder, photos, tmp_path):
    retriever = Retriever.from_pretrained(retriever_folder)
    with pytest.raises(ValueError, match=r"there is no index to search: call index\(images, place\) or open_index"):
        retriever.search(photos / "a" / "000.png")
    with pytest.raises(DataError, match="is no index"):
        retriever.open_index(tmp_path)
    retriever.index(photos, tmp_path / "catalogue", progress=False, cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match="embeddings of another model"):
        Retriever.from_pretrained(backbone_folder).open_index(tmp_path / "catalogue")
    with pytest.raises(ValueError, match="no item has class_name 'c'"):
        retriever.search(photos / "a" / "000.png", where={"class_name": "c"})
    fresh = Retriever.from_pretrained(retriever_folder)
    assert fresh.open_index(open_index(tmp_path / "catalogue")) is fresh._index
    groups = fresh.search(photos / "a" / "000.png", group_by="class_name", min_similarity=-1)[0]
    assert sorted(hit.metadata["class_name"] for hit in groups) == ["a", "b"]


def test_threads_find_what_one_after_the_other_finds(retriever_folder, photos, tmp_path):
    """Also while the index is brought in step and opened anew, with the same images."""
    retriever = Retriever.from_pretrained(retriever_folder)
    place = tmp_path / "catalogue"
    options = {"progress": False, "cache_dir": tmp_path / "cache"}
    retriever.index(photos, place, **options)
    queries = [np.random.default_rng(i).integers(0, 256, (18, 18, 3), dtype=np.uint8) for i in range(40)]
    expected = [retriever.search(query, k=4, where=["class_name=A", "class_name=b"]) for query in queries]
    encoded = [retriever.encode(query) for query in queries]
    with ThreadPoolExecutor(8) as threads:
        searches = [
            threads.submit(retriever.search, query, k=4, where=["class_name=A", "class_name=b"]) for query in queries
        ]
        again = threads.submit(retriever.index, photos, place, **options)
        vectors = list(threads.map(retriever.encode, queries))
        found = [search.result() for search in searches]
        assert again.result().unchanged == 7
    assert found == expected
    assert all(np.array_equal(a, b) for a, b in zip(vectors, encoded, strict=True))


def test_the_backbone_may_be_elsewhere(retriever_folder, backbone_folder, picture, tmp_path):
    import shutil

    expected = Embedder.from_pretrained(retriever_folder).embed_images(picture)
    moved, backbone = tmp_path / "deep" / "er" / "retriever", tmp_path / "backbone"
    shutil.copytree(retriever_folder, moved)
    shutil.copytree(backbone_folder, backbone)
    with pytest.raises(OSError, match=r"Give its place with backbone=\.\.\."):
        Retriever.from_pretrained(moved)
    torch.testing.assert_close(
        Retriever.from_pretrained(moved, backbone=backbone).encode(picture, convert_to_tensor=True), expected
    )
    with pytest.raises(DataError, match=r"backbone: there is no folder .*backbon; did you mean '.*/backbone'\?"):
        Retriever.from_pretrained(moved, backbone=tmp_path / "backbon")
    with pytest.raises(ValueError, match="backbone is for retrievers"):
        Retriever.from_pretrained(backbone_folder, backbone=backbone)
