import math
import random
from decimal import ROUND_HALF_EVEN, Decimal

import numpy as np
import pytest
import torch
from PIL import Image

from vptsp import DataArguments, EvalTransform, TrainTransform, make_transforms


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def smooth(width, height):
    """Red counts columns, green rows: a pixel of the result says where it came from."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x, y, np.zeros_like(x)], -1).astype(np.uint8))


def resized(image, height, width):
    """Antialiased bilinear resize by torch, which shares no code with PIL."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].double()
    return torch.nn.functional.interpolate(
        pixels, (height, width), mode="bilinear", antialias=True, align_corners=False
    )[0]


class Scripted(random.Random):
    """Hands out given shares and ratios; places are always the last possible ones."""

    def __init__(self, draws, flip=1.0):
        super().__init__(0)
        self.draws, self.flip, self.places = list(draws), flip, []

    def uniform(self, low, high):
        value = self.draws.pop(0)
        assert low - 1e-12 <= value <= high + 1e-12
        return value

    def randint(self, low, high):
        self.places.append((low, high))
        return high

    def random(self):
        return self.flip


# ---- crops


@pytest.mark.parametrize("width, height", [(100, 80), (33, 200), (500, 375), (224, 224), (7, 5)])
def test_crop_geometry_against_a_slow_oracle(width, height):
    """Many (share, ratio) pairs: the first of each ten whose rounded sides fit, computed in decimals, decides."""
    source = random.Random(width * 1000 + height)
    transform = TrainTransform(scale=(0.08, 1.0))
    for _ in range(200):
        pairs = [(source.uniform(0.08, 1), source.uniform(math.log(0.75), math.log(4 / 3))) for _ in range(10)]
        expected = None
        tried = 0
        for share, log_ratio in pairs:
            tried += 1
            area, ratio = Decimal(share) * width * height, Decimal(math.exp(log_ratio))
            w = int((area * ratio).sqrt().to_integral_value(ROUND_HALF_EVEN))
            h = int((area / ratio).sqrt().to_integral_value(ROUND_HALF_EVEN))
            if 1 <= w <= width and 1 <= h <= height:
                expected = (width - w, height - h, width, height)
                break
        rng = Scripted([value for pair in pairs for value in pair])
        box = transform.sample_crop(width, height, rng)
        if expected is not None:
            assert box == expected
            assert len(rng.draws) == 20 - 2 * tried
            assert rng.places == [(0, height - h), (0, width - w)]
        else:
            assert rng.draws == [] and rng.places == []


@pytest.mark.parametrize(
    "size, box",
    [
        ((10, 100), (0, 43, 10, 56)),  # too tall: width / (3/4) = 13.3 rows
        ((101, 12), (42, 0, 58, 12)),  # too wide: 12 * 4/3 = 16 columns
        ((40, 40), (0, 0, 40, 40)),
        ((1, 300), (0, 149, 1, 150)),
        ((300, 1), (149, 0, 150, 1)),
    ],
)
def test_fallback_is_the_largest_central_crop_in_range(size, box):
    # a share of 1 with a ratio that never fits (a square image is missed by any ratio but 1)
    wide = size[0] <= size[1]
    draws = [1.0, math.log(4 / 3 if wide else 3 / 4)] * 10
    assert TrainTransform().sample_crop(*size, Scripted(draws)) == box


def test_crops_are_distributed_as_published():
    """On a large square image, where rounding is nothing: share uniform, log ratio uniform, place uniform."""
    rng = random.Random(0)
    boxes = np.array([TrainTransform(scale=(0.1, 0.6)).sample_crop(10_000, 10_000, rng) for _ in range(4000)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    share = width * height / 1e8
    log_ratio = np.log(width / height) / math.log(4 / 3)
    for values, low, high in ((share, 0.1, 0.6), (log_ratio, -1, 1), (boxes[:, 0] / (10_000 - width), 0, 1)):
        ranks = np.sort((values - low) / (high - low))
        gap = np.abs(ranks - (np.arange(4000) + 0.5) / 4000).max()
        assert gap < 1.63 / math.sqrt(4000)  # Kolmogorov-Smirnov at 1 %


def test_crop_stays_inside_and_is_resized_to_the_square():
    rng = random.Random(1)
    image = smooth(200, 120)
    transform = TrainTransform(size=24, horizontal_flip=0)
    for _ in range(20):
        state = rng.getstate()
        (left, top, right, bottom), _ = transform.choose_crop(200, 120, rng)
        assert 0 <= left < right <= 200 and 0 <= top < bottom <= 120
        rng.setstate(state)
        result = transform(image, rng)
        assert result.shape == (3, 24, 24) and result.dtype == torch.uint8 and result.is_contiguous()
        # in a linear ramp, the value at an output pixel's centre is the source coordinate there
        where = (torch.arange(24) + 0.5) / 24
        red, green = left + where * (right - left) - 0.5, top + where * (bottom - top) - 0.5
        inner = slice(2, -2)  # the ramp ends at the image's border
        assert (result[0, :, inner] - red[None, inner]).abs().max() <= 1.01
        assert (result[1, inner, :] - green[inner, None]).abs().max() <= 1.01


def test_whole_image_crop_against_torch():
    image = noise(61, 47)
    transform = TrainTransform(20, scale=(1, 1), ratio=(61 / 47, 61 / 47), horizontal_flip=0, decode_margin=math.inf)
    result = transform(image, random.Random(0))
    assert (result.double() - resized(image, 20, 20)).abs().max() <= 1.01


def test_flip():
    image = noise(40, 30)
    transform = TrainTransform(size=16)
    draws = [0.5, 0.0]
    plain, flipped = (transform(image, Scripted(draws, flip)) for flip in (0.5, 0.49))
    assert torch.equal(flipped, plain.flip(-1)) and not torch.equal(flipped, plain)
    assert torch.equal(TrainTransform(size=16, horizontal_flip=1.0)(image, Scripted(draws, 0.999)), flipped)
    assert torch.equal(TrainTransform(size=16, horizontal_flip=0.0)(image, Scripted(draws, 0.0)), plain)


def test_randomness_comes_from_the_generator_alone():
    image = noise(50, 40)
    transform = TrainTransform(size=8)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    first = transform(image, random.Random(5))
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert torch.equal(first, transform(image, random.Random(5)))
    assert not torch.equal(first, transform(image, random.Random(6)))


# ---- evaluation


@pytest.mark.parametrize("width, height", [(50, 40), (40, 50), (33, 33), (37, 201), (128, 31), (32, 64), (20, 10)])
@pytest.mark.parametrize("resize, size", [(32, 28), (32, 32), (37, 32), (33, 28)])
def test_eval_against_torch(width, height, resize, size):
    image = noise(width, height, seed=width)
    short = min(width, height)
    new_width = resize if width == short else resize * width // short
    new_height = resize if height == short else resize * height // short
    left, top = math.floor((new_width - size) / 2), math.floor((new_height - size) / 2)
    expected = resized(image, new_height, new_width)[:, top : top + size, left : left + size]
    result = EvalTransform(resize, size)(image)
    assert result.shape == (3, size, size) and result.dtype == torch.uint8
    assert (result.double() - expected).abs().max() <= 1.01  # PIL rounds twice, after rows and after columns
    assert torch.equal(result, EvalTransform(resize, size)(image, random.Random(0)))


def test_transforms_from_arguments():
    train, evaluation = make_transforms(DataArguments(image_size=112, crop_scale_min=0.3, horizontal_flip=False))
    assert repr(train).startswith("TrainTransform(size=112, scale=(0.3, 1.0), ratio=(0.75, 1.33")
    assert train.horizontal_flip == 0.0
    assert repr(evaluation) == "EvalTransform(resize=128, size=112)"


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: TrainTransform(size=0), "size must be >= 1, got 0"),
        (lambda: TrainTransform(scale=(0.5, 0.1)), "scale must be 0 < min <= max <= 1"),
        (lambda: TrainTransform(scale=(0, 1)), "scale must be 0 < min <= max <= 1"),
        (lambda: TrainTransform(ratio=(2, 1)), "ratio must be 0 < min <= max"),
        (lambda: TrainTransform(horizontal_flip=1.5), "horizontal_flip must be a probability in .0, 1., got 1.5"),
        (lambda: TrainTransform(decode_margin=0.9), "decode_margin must be >= 1, got 0.9"),
        (lambda: TrainTransform(decode_margin=math.nan), "decode_margin must be >= 1, got nan"),
        (lambda: EvalTransform(resize=200, size=224), "resize must be >= size 224, got 200"),
        (lambda: EvalTransform(size=0), "size must be >= 1, got 0"),
        (lambda: EvalTransform(8, 8)(Image.new("L", (9, 9))), "expected an image of mode RGB .* got L"),
        (
            lambda: TrainTransform(8)(Image.new("L", (9, 9)), random.Random(0)),
            "expected an image of mode RGB .* got L",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
