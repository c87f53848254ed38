"""Views whose embeddings are averaged: against PIL and the model itself, in files, and on the command line."""

import json

import numpy as np
import pytest
import torch
from data_fixtures import write_classes
from PIL import Image

from vptsp import Embedder, IndexMismatchError, RetrievalIndex, Retriever, build_image_processor
from vptsp.search.backbone_alone import backbone_alone
from vptsp.search.commands import main
from vptsp.search.embedder import ImagePreprocessor


SIZES = {"wide": (30, 22), "tall": (20, 33), "square": (25, 25), "line": (2000, 9), "post": (9, 2000)}


def picture(size, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(SIZES[size], Image.Resampling.BILINEAR)


def squares(image, short=18, size=16):
    """The central square and the corners of an image that PIL has resized as a whole: uint8, centre first."""
    width, height = image.size
    wide = (int(width * short / height), short) if width > height else (short, int(height * short / width))
    image = image.resize(wide, Image.Resampling.BILINEAR)
    right, low = wide[0] - size, wide[1] - size
    places = [(right // 2, low // 2), (0, 0), (right, 0), (0, low), (right, low)]
    return [np.asarray(image.crop((x, y, x + size, y + size))) for x, y in places]


@pytest.mark.parametrize("size", SIZES)
def test_five_crops_are_those_of_the_resized_image(size):
    processor = build_image_processor(16, 18)
    crops = ImagePreprocessor(processor, 16, views="five_crops")(picture(size))
    assert crops.shape == (5, 3, 16, 16)
    assert torch.equal(crops[0], ImagePreprocessor(processor, 16)(picture(size)))
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    for got, expected in zip(crops * std + mean, squares(picture(size)), strict=True):
        difference = got - torch.tensor(expected).permute(2, 0, 1) / 255
        assert difference.abs().max() <= (2.5 if size in ("line", "post") else 1.5) / 255


def averaged(embedder, image, crops, mirrored):
    """One view after the other, in float64."""
    pixels = ImagePreprocessor(embedder.preprocess.processor, 16, views="five_crops" if crops > 1 else "one")(image)
    views = list(pixels) if crops > 1 else [pixels]
    views += [view.flip(-1) for view in views] if mirrored else []
    with torch.no_grad():
        run = embedder.model.embed_with_backbone if embedder.backbone_only else lambda p: embedder.model(p).embeddings
        mean = torch.stack([run(view[None])[0].double() for view in views]).mean(0)
    return mean / mean.norm()


@pytest.mark.parametrize(
    ("views", "crops", "mirrored"), [("flip", 1, True), ("five_crops", 5, False), ("ten_crops", 5, True)]
)
@pytest.mark.parametrize("bare", [False, True])
def test_embeddings_are_the_normalised_mean(retriever_folder, views, crops, mirrored, bare):
    plain = Embedder.from_pretrained(retriever_folder)
    embedder = Embedder.from_pretrained(retriever_folder, views=views, batch_size=2)
    if bare:
        plain, embedder = backbone_alone(plain), backbone_alone(embedder)
    images = [picture("wide"), picture("tall", 1), picture("square", 2)]
    got = embedder.embed_images(images)
    for row, image in enumerate(images):
        torch.testing.assert_close(got[row].double(), averaged(plain, image, crops, mirrored), atol=2e-5, rtol=0)
    assert not torch.allclose(got, plain.embed_images(images), atol=1e-3)
    assert embedder.fingerprint != plain.fingerprint
    assert (embedder.description()["views"], plain.description()["views"]) == (views, "one")


def test_what_is_refused(retriever_folder):
    with pytest.raises(ValueError, match=r"views must be one of one, flip, five_crops, ten_crops, got 'flipp'.*flip"):
        Embedder.from_pretrained(retriever_folder, views="flipp")
    processor = build_image_processor(16, 18)
    processor.do_center_crop = False
    with pytest.raises(ValueError, match="views='ten_crops' needs an image processor that resizes the short side"):
        ImagePreprocessor(processor, 16, views="ten_crops")
    embedder = Embedder.from_pretrained(retriever_folder, views="five_crops")
    with pytest.raises(ValueError, match="a preprocessed image can't be cropped at other places"):
        embedder.embed_images([torch.zeros(3, 16, 16)])
    with pytest.raises(ValueError, match=r"must be \(images, 5, 3, S, S\), got \(1, 3, 16, 16\)"):
        embedder.embed_pixels(torch.zeros(1, 3, 16, 16))


@pytest.fixture
def photos(tmp_path):
    return write_classes(tmp_path / "photos", {"mug": 4, "cup": 4, "glass": 4})


def run(capsys, *words):
    status = main([str(word) for word in words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_an_index_remembers_its_views_projection_and_quantisation(retriever_folder, photos, tmp_path, capsys):
    index, cache = tmp_path / "index", ("--embeddings_cache", tmp_path / "cache", "--quiet")
    made = run(capsys, "index", "--model", retriever_folder, "--images", photos, "--index", index, "--views", "flip",
               "--projection", "whiten", "--dim", 4, "--quantise", "int8", *cache)  # fmt: skip
    assert made[0] == 0, made
    assert "compared in width 4: its first principal components, each scaled to variance 1, " in made[1]
    info = RetrievalIndex.open(index).info
    assert (info.model["views"], info.projection["kind"], info.factory) == ("flip", "whiten", "SQ8")

    query = next(photos.rglob("*.png"))
    status, out, err = run(capsys, "search", "--index", index, "--image", query, "--k", 1, "--json")
    assert status == 0, err
    hit = json.loads(out)[str(query)][0]
    assert (hit["path"], hit["similarity"]) == (str(query), pytest.approx(1, abs=0.05))
    status, _, err = run(capsys, "search", "--index", index, "--image", query, "--views", "one")
    assert status == 2
    assert "views flip), got" in err

    write_classes(photos / "new", {"bowl": 2})
    changed = run(capsys, "index", "--images", photos, "--index", index, *cache)
    assert changed[0] == 0, changed
    assert "2 added, 0 changed, 0 removed, 12 unchanged" in changed[1]
    assert run(capsys, "index", "--model", retriever_folder, "--images", photos, "--index", index, *cache)[0] == 0
    with pytest.raises(IndexMismatchError, match="views flip"):
        Retriever.from_pretrained(retriever_folder).open_index(index)
    retriever = Retriever.from_pretrained(retriever_folder, views="flip")
    retriever.open_index(index)
    assert retriever.search([query], k=1)[0][0].path == str(query)


def test_searching_and_evaluating_in_another_order(retriever_folder, photos, tmp_path, capsys):
    store, index = tmp_path / "store", tmp_path / "index"
    assert run(capsys, "embed", "--model", retriever_folder, "--images", photos, "--output", store, "--quiet")[0] == 0
    assert run(capsys, "index", "--store", store, "--index", index, "--quiet")[0] == 0
    words = ("search", "--index", index, "--id", "mug/mug_0.png")
    name = RetrievalIndex.open(index).ids[0]
    words = ("search", "--index", index, "--id", name, "--json")
    plain, other = run(capsys, *words), run(capsys, *words, "--rerank", "k1=2", "k2=1", "depth=8", "--expand")
    assert plain[0] == other[0] == 0, other
    assert [hit["id"] for hit in json.loads(plain[1])[name]] != [hit["id"] for hit in json.loads(other[1])[name]]
    evaluate = ("evaluate", "--store", store, "--output", tmp_path / "scores", "--no_clustering", "--quiet")
    status, out, _ = run(
        capsys, *evaluate, "--rerank", "k1=2", "--expand", "neighbours=2", "--projection", "pca", "--dim", 3
    )
    assert status == 0
    for line in (
        "- rerank: depth=100, k1=2, k2=6, weight=0.3",
        "- expand: neighbours=2, alpha=3.0",
        "compared in width 3",
    ):
        assert line in out
    report = json.loads((tmp_path / "scores" / "metrics.json").read_text())
    assert set(report["search"]) == {"rerank", "expand", "projection"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["search", "--index", "i", "--id", "a", "--rerank", "depth"], "rerank takes depth=..., k1=..., "),
        (
            ["search", "--index", "i", "--id", "a", "--rerank", "true"],
            "weight=..., or nothing for the defaults, got 'true'",
        ),
        (["search", "--index", "i", "--id", "a", "--views", "flip"], "--views goes with --image"),
        (["index", "--index", "a.db", "--store", "s", "--quantise", "int8"], "--quantise is for faiss"),
        (["index", "--index", "a.db", "--store", "s", "--target_recall", "0.9"], "--target_recall is for faiss"),
        (["index", "--index", "i", "--store", "s", "--views", "flip"], "--views goes with --model"),
        (["index", "--index", "i", "--remove", "x", "--projection", "pca"], "--remove goes without --projection"),
        (
            ["evaluate", "--model", "m", "--output", "o", "--before_after", "--rerank"],
            "--before_after is drawn of embeddings as they are: give it without --rerank",
        ),
    ],
)  # fmt: skip
def test_refused_words(words, message, capsys):
    status, _, err = run(capsys, *words)
    assert status == 2
    assert message in err
