"""Images made to take time or memory, or to reach what should not read them; and the endings that are read."""

import io
import logging
import random
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from data_fixtures import jpeg_bytes, write_archive, write_classes, write_files, write_image
from image_fixtures import encoded, photo
from PIL import EpsImagePlugin, Image, features
from transformers import ViTImageProcessorPil

from vptsp import (
    DataArguments,
    EvalTransform,
    ImageDataset,
    ImageError,
    TrainTransform,
    image_datasets,
    load_splits,
    open_image,
)
from vptsp.data_scripts.command_check import main as check_data
from vptsp.data_scripts.decoding import EncodedImage
from vptsp.data_scripts.image_files import is_image_name, list_images
from vptsp.data_scripts.image_formats import FORMATS, IMAGE_EXTENSIONS, MAX_IMAGE_PIXELS
from vptsp.data_scripts.streaming import StreamedImages
from vptsp.data_scripts.transforms import central_crop
from vptsp.search.embedder import ImagePreprocessor
from vptsp.search.image_sources import folder_source, list_source


RESIZE = Image.Image.resize
PROCESSOR = ViTImageProcessorPil(
    size={"shortest_edge": 64}, do_center_crop=True, crop_size=56, do_rescale=False, do_normalize=False
)


def smooth(width, height):
    """A picture that lossy formats keep."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([200 * x / width, 200 * y / height, 30 + 0 * x], -1).astype(np.uint8))


def large_png(width, height):
    """A PNG of zeros that hardly takes any bytes."""
    rows = zlib.compressobj(9)
    row = bytes(1 + width)
    packed = b"".join(rows.compress(row) for _ in range(height)) + rows.flush()
    head = struct.pack(">2I5B", width, height, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", packed), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


# ---- elongated images


@pytest.mark.parametrize("size", [(6000, 1), (1, 6000), (3000, 2), (7, 900)])
def test_an_elongated_image_is_resized_only_where_the_crop_is(size, monkeypatch):
    data = encoded(photo(*size), "PNG")
    short, long = sorted(size)
    limit = 64 * int(64 * long / short)  # pixels of the whole image, resized
    sizes = []
    monkeypatch.setattr(
        Image.Image, "resize", lambda image, size, *args: sizes.append(size) or RESIZE(image, size, *args)
    )
    for transform in (EvalTransform(64, 56), EvalTransform(64, 56, exact=False)):
        assert transform(EncodedImage(data)).shape == (3, 56, 56)
    assert ImagePreprocessor(PROCESSOR, 56)(data).shape == (3, 56, 56)
    assert len(sizes) == 3 and all(width * height <= 56 * 56 < limit for width, height in sizes)


@pytest.mark.parametrize("size", [(900, 7), (7, 900), (3000, 2), (2500, 33), (33, 2500)])
@pytest.mark.parametrize("resample", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
def test_an_elongated_crop_equals_that_of_the_whole_image_but_for_rounding(size, resample):
    image = photo(*size)
    short, long = sorted(size)
    wanted = {short: 64, long: int(64 * long / short)}
    whole = image.resize((wanted[size[0]], wanted[size[1]]), resample)
    left, top = (whole.width - 56) // 2, (whole.height - 56) // 2
    expected = np.asarray(whole.crop((left, top, left + 56, top + 56))).astype(int)
    gap = np.abs(np.asarray(central_crop(image, 64, 56, resample)) - expected)
    assert gap.max() <= 1 and (gap > 0).mean() < 0.01
    if resample == PROCESSOR.resample:
        embedded = ImagePreprocessor(PROCESSOR, 56)(image)
        assert torch.equal(embedded, EvalTransform(64, 56)(image).float())


def test_a_line_of_pixels_trains():
    data = encoded(photo(6000, 1), "PNG")
    assert TrainTransform(56)(EncodedImage(data), random.Random(0)).shape == (3, 56, 56)


# ---- too many pixels


def test_an_image_of_too_many_pixels_is_refused_by_its_header(tmp_path):
    side = 9500
    data = large_png(side, side)
    assert len(data) < 200_000 and side * side > MAX_IMAGE_PIXELS
    (tmp_path / "bomb.png").write_bytes(data)
    code = (
        "import resource, sys, warnings; warnings.simplefilter('ignore')\n"
        "from vptsp.data_scripts.images import open_image\n"
        "from vptsp.data_scripts.decoding import EncodedImage\n"
        "from vptsp.data_scripts.data_errors import ImageError\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for read in (open_image, EncodedImage):\n"
        "    try: read(sys.argv[1])\n"
        "    except ImageError as error: print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "bomb.png")], capture_output=True, text=True, check=True
    )
    *errors, kilobytes = done.stdout.splitlines()
    expected = "9500 x 9500 are 90,250,000 pixels, more than max_image_pixels 89,478,485"
    assert len(errors) == 2 and all("bomb.png" in error and expected in error for error in errors)
    assert int(kilobytes) < 20_000


def test_pillow_s_own_limit_is_an_error_too():
    with pytest.raises(ImageError, match=r"x: can't read this image .*exceeds limit of .* pixels"):
        open_image(large_png(14000, 13000), "x")


def test_the_limit_is_a_setting(tmp_path, capsys):
    root = write_classes(tmp_path / "root", {"a": 2, "b": 2})  # 12 x 10 pixels
    write_image(root / "b/large.png", (40, 30))
    args = DataArguments(data_dir=str(root), data_cache_dir=str(tmp_path / "cache"), max_image_pixels=1199)
    with pytest.raises(ImageError, match=r"large.png: .*40 x 30 are 1,200 pixels, more than max_image_pixels 1,199"):
        image_datasets(args)["test"][2]
    skipping = DataArguments(
        data_dir=str(root), data_cache_dir=str(tmp_path / "cache"), max_image_pixels=1199, skip_corrupt=True
    )
    assert not image_datasets(skipping)["test"][2]["readable"]
    stream = load_splits("folder", root, streaming=True)["test"]
    images = StreamedImages(stream, EvalTransform(8, 8), max_image_pixels=1199)
    (keys,) = images.evaluation_batches(3)
    with pytest.raises(ImageError, match="more than max_image_pixels 1,199"):
        images[keys[2]]
    with pytest.raises(ImageError, match="more than max_image_pixels 1,199"):
        ImagePreprocessor(PROCESSOR, 56, max_image_pixels=1199)(root / "b/large.png")
    with pytest.raises(ValueError, match="more than max_image_pixels 1,199"):
        ImagePreprocessor(PROCESSOR, 56, max_image_pixels=1199)(Image.new("RGB", (40, 30)))
    words = ["folder", "--data_dir", str(root), "--decode", "--picture", str(tmp_path / "x.png")]
    assert check_data([*words, "--max_image_pixels", "1199"]) == 1
    assert "large.png" in capsys.readouterr().err
    assert check_data([*words, "--max_image_pixels", "1200"]) == 0
    for wrong in (0, 2 * Image.MAX_IMAGE_PIXELS + 1):
        with pytest.raises(ValueError, match=rf"max_image_pixels must be >= 1 and <= \d+, .* got {wrong}"):
            DataArguments(max_image_pixels=wrong)
        with pytest.raises(ValueError, match=rf"got {wrong}"):
            ImageDataset(load_splits("folder", root)["test"], EvalTransform(8, 8), max_image_pixels=wrong)


# ---- kinds of files


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n0 0 8 8 rectfill showpage\n"


def test_postscript_does_not_reach_its_interpreter(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **kwargs: called.append(args))
    (tmp_path / "photo.png").write_bytes(POSTSCRIPT)
    assert Image.open(tmp_path / "photo.png").format == "EPS"  # as Pillow takes it
    preprocess = ImagePreprocessor(PROCESSOR, 56)
    for read in (open_image, EncodedImage, preprocess):
        with pytest.raises(ImageError, match=r"photo.png: .*not an image in any known format"):
            read(tmp_path / "photo.png")
        with pytest.raises(ImageError, match=r"x: .*not an image in any known format"):
            read(POSTSCRIPT, "x")
    assert called == []


@pytest.mark.parametrize(
    "ending, kind",
    [
        *((".jpg", "JPEG"), (".jfif", "JPEG"), (".jpe", "JPEG"), (".JPEG", "JPEG"), (".png", "PNG"), (".tif", "TIFF")),
        *((".TiFf", "TIFF"), (".bmp", "BMP"), (".gif", "GIF"), (".webp", "WEBP"), (".jp2", "JPEG2000")),
        *((".j2k", "JPEG2000"), (".AVIF", "AVIF"), (".ppm", "PPM"), (".pgm", "PPM"), (".heic", "HEIF")),
    ],
)
def test_every_ending_is_read_everywhere(tmp_path, ending, kind):
    if kind not in FORMATS:
        pytest.skip(f"{kind} is not read here")
    picture = smooth(24, 20).convert("L" if ending == ".pgm" else "RGB")
    data = encoded(picture, kind)
    assert np.abs(np.asarray(open_image(data)).astype(int) - np.asarray(picture.convert("RGB"))).mean() < 5
    name = f"odd{ending}"
    files = {f"images/001.a/{name}": data, "images/101.b/x.jpg": jpeg_bytes()}
    root = write_files(tmp_path / "root", files) / "images"
    assert [row["image"]["path"] for row in load_splits("folder", root)["train"]] == [str(root / "001.a" / name)]
    assert load_splits("folder", root, streaming=True)["train"]
    assert folder_source(root).ids == [f"001.a/{name}", "101.b/x.jpg"]
    (tmp_path / "list.txt").write_text(f"root/images/001.a/{name}\nroot/images/101.b/x.jpg\n")
    assert len(list_source(tmp_path / "list.txt")) == 2
    for archive in ("CUB_200_2011.tgz", "CUB_200_2011.zip"):
        path = write_archive(tmp_path / archive, files)
        splits = load_splits("cub", path, cache_dir=tmp_path / "cache", verify_counts=False)
        assert [row["image"]["path"].rpartition("/")[2] for row in splits["train"]] == [name]
        image = ImageDataset(splits["train"], EvalTransform(8, 8)).open_image(0)
        assert image.size == (24, 20)


def test_endings_are_those_of_the_kinds_that_are_read():
    assert {".jpg", ".jpe", ".jfif", ".png", ".apng", ".tif", ".bmp", ".gif", ".ppm"} <= IMAGE_EXTENSIONS
    assert (".avif" in IMAGE_EXTENSIONS) == features.check("avif")
    assert (".jp2" in IMAGE_EXTENSIONS) == features.check("jpg_2000")
    assert (".heic" in IMAGE_EXTENSIONS) == ("HEIF" in FORMATS)
    assert not {".eps", ".ps", ".wmf", ".pdf", ".psd", ".txt", ".ico"} & IMAGE_EXTENSIONS
    assert is_image_name("a.JpE") and not is_image_name("._a.jpe")


def test_what_is_left_out_is_counted_by_ending_and_said_once(tmp_path, caplog):
    root = write_classes(tmp_path / "root", {"a": 1, "b": 1, "c": 1})
    others = ["a/1.EPS", "b/2.eps", "b/deep/3.svg", "b/deep/readme", "labels.csv"]
    litter = ["a/._000.png", ".DS_Store", "a/.DS_Store", "__MACOSX/b/1.eps", ".hidden/1.eps"]
    write_files(root, dict.fromkeys([*others, *litter], b"x"))
    counts = "5 files are no images that can be read, left out: .eps 2, .svg 1, no ending 1, .csv 1"

    def said(make):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            make()
        lines = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
        return [line.split(": ", 1)[1].split("; the extra")[0] for line in lines]

    def counted(text):
        return sorted(text.replace("left out: ", ", ").split(", "))

    for make in (lambda: load_splits("folder", root), lambda: folder_source(root), lambda: list_images(root)):
        (line,) = said(make)
        assert counted(line) == counted(counts)
    write_classes(tmp_path / "two/train", {"x": 1})
    write_classes(tmp_path / "two/test", {"y": 2})
    write_files(tmp_path / "two", {"train/x/a.doc": b"x", "test/y/b.doc": b"x", "test/c.doc": b"x"})
    lines = said(lambda: load_splits("folder", tmp_path / "two"))
    assert lines == ["3 files are no images that can be read, left out: .doc 3"]
    files = {f"CUB/images/{name}": jpeg_bytes() for name in ("001.a/1.jpg", "101.b/1.jpg")}
    files |= {"CUB/images/001.a/note.doc": b"x", "CUB/attributes.txt": b"x", "CUB/images/001.a/._1.jpg": b"x"}
    archive = write_archive(tmp_path / "CUB_200_2011.tgz", files)
    lines = said(lambda: load_splits("cub", archive, cache_dir=tmp_path / "cache", verify_counts=False))
    assert lines == ["1 files are no images that can be read, left out: .doc 1"]


def test_heic_is_named_where_it_can_not_be_read(tmp_path):
    """In a process of its own, in which the package that reads it can't be imported."""
    write_files(write_classes(tmp_path / "root", {"a": 1, "b": 1}), {"a/1.HEIC": b"x", "a/2.heif": b"x"})
    code = (
        "import sys; sys.modules['pillow_heif'] = None\n"
        "from vptsp.data_scripts.image_files import list_images\n"
        "print(len(list_images(sys.argv[1])))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "root")], capture_output=True, text=True, check=True
    )
    assert done.stdout == "2\n"
    assert "2 files are no images that can be read, left out: .heic 1, .heif 1; the extra 'heic'" in done.stderr
    assert "reads .heic, .heif" in done.stderr


def test_heic_photos_come_upright():
    if "HEIF" not in FORMATS:
        pytest.skip("needs pillow-heif")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = smooth(40, 24)
    stream = io.BytesIO()
    picture.save(stream, "HEIF", quality=95, exif=exif.tobytes())
    found = np.asarray(open_image(stream.getvalue())).astype(int)
    assert np.abs(found - np.rot90(np.asarray(picture), -1)).mean() < 6
