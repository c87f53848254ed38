"""Transforms of encoded images against the plain way: open, convert, crop, resize with PIL."""

import io
import math
import random

import numpy as np
import pyarrow
import pytest
import torch
from data_fixtures import SHARED_DATA
from image_fixtures import encoded, photo, with_orientation
from PIL import Image, ImageOps

from vptsp import EvalTransform, TrainTransform
from vptsp.data_scripts.decoding import EncodedImage


BILINEAR = Image.Resampling.BILINEAR


def tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def plain_eval(data, resize, size):
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    width, height = image.size
    short, long = min(width, height), max(width, height)
    sizes = {short: resize, long: int(resize * long / short)}
    image = image.resize((sizes[width], sizes[height]), BILINEAR)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return tensor(image.crop((left, top, left + size, top + size)))


def plain_train(data, box, size):
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    return tensor(image.crop(box).resize((size, size), BILINEAR))


def difference(one, other):
    return (one.int() - other.int()).abs().float()


# ---- evaluation


@pytest.mark.parametrize(
    "size", [(300, 200), (200, 300), (333, 77), (77, 333), (64, 90), (64, 64), (120, 64), (40, 35)]
)
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_evaluation_is_exact(size, options):
    image = photo(*size, seed=size[0])
    for data in (encoded(image, **options), encoded(image.convert("L"), **options), encoded(image, "PNG")):
        for resize, crop in ((64, 56), (64, 64), (33, 28)):
            result = EvalTransform(resize, crop)(EncodedImage(data))
            assert torch.equal(result, plain_eval(data, resize, crop)) and result.is_contiguous()
            upright = Image.open(io.BytesIO(data)).convert("RGB")
            assert torch.equal(EvalTransform(resize, crop)(upright), result)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_evaluation_of_turned_images(orientation):
    data = with_orientation(photo(190, 130), orientation)
    exact = EvalTransform(32, 28)(EncodedImage(data))
    assert torch.equal(exact, plain_eval(data, 32, 28))
    fast = EvalTransform(32, 28, exact=False)(EncodedImage(data))
    assert difference(fast, exact).mean() < 1.5 and fast.is_contiguous()
    assert difference(EvalTransform(120, 112, exact=False)(EncodedImage(data)), plain_eval(data, 120, 112)).max() <= 1


def test_repr_says_that_it_is_not_exact():
    assert repr(EvalTransform(32, 28, exact=False)) == "EvalTransform(resize=32, size=28, exact=False)"


# ---- training


def test_crops_lie_on_multiples_of_what_the_image_is_shrunk_by():
    found = set()
    for margin in (1.0, 1.5):
        transform = TrainTransform(32, decode_margin=margin)
        for seed in range(300):
            source = random.Random(seed)
            width, height = source.randint(20, 700), source.randint(20, 700)
            drawn = transform.sample_crop(width, height, random.Random(seed))
            box, shrink = transform.choose_crop(width, height, random.Random(seed))
            side = min(drawn.right - drawn.left, drawn.bottom - drawn.top)
            assert shrink == max((s for s in (1, 2, 4, 8) if side / s >= 32 * margin), default=1)
            assert all(edge % shrink == 0 for edge in box)
            for before, after, limit in zip(drawn, box, (width, height) * 2, strict=True):
                assert abs(after - before) <= shrink / 2 or limit - shrink < after <= limit
            assert 0 <= box.left < box.right <= width and 0 <= box.top < box.bottom <= height
            found.add(shrink)
    assert found == {1, 2, 4, 8}


def test_small_images_differ_by_rounding_only():
    transform = TrainTransform(64, horizontal_flip=0)
    for seed in range(20):
        image = photo(120, 100, seed)
        for data in (
            encoded(image),
            encoded(image.convert("L")),
            encoded(image, "PNG"),
            encoded(image.convert("CMYK")),
        ):
            box, shrink = transform.choose_crop(120, 100, random.Random(seed))
            result = transform(EncodedImage(data), random.Random(seed))
            gap = difference(result, plain_train(data, box, 64))
            assert shrink == 1 and gap.max() <= 2 and gap.mean() < 0.3
            assert result.shape == (3, 64, 64) and result.dtype == torch.uint8 and result.is_contiguous()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size, largest", [(64, 1), (24, 60)])
def test_training_on_turned_images(orientation, size, largest):
    """At full size (64) to the rounding; at a smaller one, up to what leaving out high frequencies does at edges."""
    transform = TrainTransform(size, horizontal_flip=0)
    data = with_orientation(photo(96, 112), orientation, subsampling=0)
    upright = EncodedImage(data).size
    for seed in range(8):
        box, _ = transform.choose_crop(*upright, random.Random(seed))
        gap = difference(transform(EncodedImage(data), random.Random(seed)), plain_train(data, box, size))
        assert gap.max() <= largest and gap.mean() < 2


def test_flip_comes_last():
    data = with_orientation(photo(96, 128), 6)
    plain, flipped = (TrainTransform(40, horizontal_flip=p)(EncodedImage(data), random.Random(3)) for p in (0, 1))
    assert torch.equal(flipped, plain.flip(-1)) and not torch.equal(flipped, plain)


def test_crop_and_random_numbers_do_not_depend_on_the_format():
    image = photo(260, 200)
    transform = TrainTransform(32)
    for seed in range(10):
        results, states = [], []
        for source in (
            image,
            EncodedImage(encoded(image, quality=100, subsampling=0)),
            EncodedImage(encoded(image, "PNG")),
        ):
            rng = random.Random(seed)
            results.append(transform(source, rng))
            states.append(rng.getstate())
        assert states[0] == states[1] == states[2]
        assert difference(results[0], results[1]).mean() < 2
        assert torch.equal(results[0], results[2])


def test_shrunk_decoding_can_be_switched_off():
    data = encoded(photo(300, 280))
    transform = TrainTransform(24, horizontal_flip=0, decode_margin=math.inf)
    box, shrink = transform.choose_crop(300, 280, random.Random(1))
    assert shrink == 1 and box == transform.sample_crop(300, 280, random.Random(1))
    assert difference(transform(EncodedImage(data), random.Random(1)), plain_train(data, box, 24)).max() <= 1


def test_without_a_view_of_the_pixels(monkeypatch):
    """Pillow before 11.2, or an image that lies in several blocks of memory."""
    data = encoded(photo(150, 130))
    expected = TrainTransform(40)(EncodedImage(data), random.Random(0))

    def refuse(image):
        raise ValueError("more than one block")

    monkeypatch.setattr(pyarrow, "array", refuse)
    assert difference(TrainTransform(40)(EncodedImage(data), random.Random(0)), expected).max() <= 1


def test_large_image():
    """More than fits into one block of PIL's memory."""
    image = Image.linear_gradient("L").resize((3000, 2000)).convert("RGB")
    result = TrainTransform(32, scale=(1, 1), ratio=(1.5, 1.5), horizontal_flip=0)(image, random.Random(0))
    assert difference(result, tensor(image.resize((32, 32), BILINEAR))).max() <= 1


def test_tolerance_on_photos():
    """The figures that the module documents. Small photos with small results stand for large ones."""
    folder = SHARED_DATA / "grocery" / "images"
    if not folder.is_dir():
        pytest.skip("needs the grocery photos")
    files = [path.read_bytes() for path in sorted(folder.rglob("*.jpg"))[::100]]
    for size in (112, 56, 28):
        transform, gaps = TrainTransform(size, horizontal_flip=0), []
        for seed, data in enumerate(files):
            image = EncodedImage(data)
            box, shrink = transform.choose_crop(*image.size, random.Random(seed))
            gap = difference(transform(image, random.Random(seed)), plain_train(data, box, size))
            if shrink == 1:
                assert gap.max() <= 2 and gap.mean() < 0.3
            else:
                gaps.append(gap)
        assert len(gaps) > 10
        gaps = torch.stack(gaps)
        assert gaps.mean() < 1.8 and gaps.max() <= 45 and (gaps > 16).float().mean() < 2e-3
    for resize, size in ((96, 84), (56, 49)):
        gaps = torch.stack(
            [
                difference(
                    EvalTransform(resize, size, exact=False)(EncodedImage(data)), plain_eval(data, resize, size)
                )
                for data in files
            ]
        )
        assert 0.1 < gaps.mean() < 0.8 and gaps.max() <= 20
