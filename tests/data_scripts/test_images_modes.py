"""What becomes of images that are not RGB, against numpy; and the same everywhere that images are read."""

import io
import struct

import numpy as np
import pytest
import torch
from data_fixtures import write_image
from image_fixtures import encoded
from PIL import Image
from transformers import ViTImageProcessorPil

from vptsp import EvalTransform, ImageError
from vptsp.data_scripts.decoding import EncodedImage
from vptsp.data_scripts.images import open_image, to_rgb
from vptsp.search.embedder import ImagePreprocessor, read_image


RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (9, 7), dtype=np.uint8)
SIXTEEN = RNG.integers(0, 65536, (9, 7), dtype=np.uint16)
RGB = RNG.integers(0, 256, (9, 7, 3), dtype=np.uint8)


def grey(values):
    return np.stack([np.asarray(values)] * 3, -1).astype(np.uint8)


def from_white(values, white):
    """Rounded to 8 bits, one value at a time."""
    return grey([[int(int(v) * 255 / white + 0.5) for v in row] for row in values])


def png(bits, kind, pixels):
    """A PNG with any bit depth and colour type; `pixels` are the rows' bytes."""
    import zlib

    height = len(pixels)
    width = {(16, 0): 2, (16, 2): 6, (16, 4): 4, (16, 6): 8}[bits, kind]
    head = struct.pack(">2I5B", len(pixels[0]) // width, height, bits, kind, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(b"".join(b"\0" + row for row in pixels))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def tiff_with(data, tag, value):
    """A little-endian TIFF file with the value of one short tag replaced."""
    start = struct.unpack_from("<I", data, 4)[0]
    for place in range(start + 2, start + 2 + 12 * struct.unpack_from("<H", data, start)[0], 12):
        if struct.unpack_from("<H", data, place)[0] == tag:
            return data[: place + 8] + struct.pack("<H", value) + data[place + 10 :]
    raise AssertionError(f"no tag {tag}")


def palette():
    image = Image.fromarray(GREY % 4).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 200, 210, 220])
    return image, np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90], [200, 210, 220]])[GREY % 4]


def cmyk(pixels):
    ink = pixels.astype(int)
    return np.rint((255 - ink[..., :3]) * (255 - ink[..., 3:]) / 255)


def rows_of(array, dtype):
    return [row.astype(dtype).tobytes() for row in array.reshape(len(array), -1)]


SIXTEEN_RGB = RNG.integers(0, 65536, (9, 7, 3), dtype=np.uint16)
SIXTEEN_LA = RNG.integers(0, 65536, (9, 7, 2), dtype=np.uint16)
SIXTEEN_RGBA = RNG.integers(0, 65536, (9, 7, 4), dtype=np.uint16)
INK = RNG.integers(0, 256, (9, 7, 4), dtype=np.uint8)
INT32 = Image.fromarray(SIXTEEN.astype(np.int32))
FLOAT = RNG.random((9, 7)).astype(np.float32)
TIFF16 = encoded(Image.fromarray(SIXTEEN), "TIFF")

# name: file, mode as Pillow opens it, expected pixels, largest difference
CASES = {
    "1 bit": (encoded(Image.fromarray(GREY > 99), "PNG"), "1", grey((GREY > 99) * 255), 0),
    "grey": (encoded(Image.fromarray(GREY), "PNG"), "L", grey(GREY), 0),
    "grey and alpha": (encoded(Image.fromarray(np.stack([GREY, 255 - GREY], -1)), "PNG"), "LA", grey(GREY), 0),
    "alpha": (encoded(Image.fromarray(np.dstack([RGB, GREY])), "PNG"), "RGBA", RGB, 0),
    "palette": (encoded(palette()[0], "PNG"), "P", palette()[1], 0),
    "palette, transparent": (encoded(palette()[0], "PNG", transparency=b"\x00\x80"), "P", palette()[1], 0),
    "grey, transparent": (encoded(Image.fromarray(GREY), "PNG", transparency=5), "L", grey(GREY), 0),
    "CMYK": (encoded(Image.fromarray(INK, "CMYK"), "TIFF"), "CMYK", cmyk(INK), 1),
    "16 bits, PNG": (png(16, 0, rows_of(SIXTEEN, ">u2")), "I;16", from_white(SIXTEEN, 65535), 0),
    "16 bits, TIFF": (TIFF16, "I;16", from_white(SIXTEEN, 65535), 0),
    "16 bits, dark": (encoded(Image.fromarray(SIXTEEN % 256), "TIFF"), "I;16", from_white(SIXTEEN % 256, 65535), 0),
    "16 bits, big-endian": (
        b"P5 7 9 65535\n" + b"".join(rows_of(SIXTEEN, ">u2")),
        "I",
        from_white(SIXTEEN, 65535),
        0,
    ),
    "16 bits, dark, PGM": (
        b"P5 7 9 65535\n" + b"".join(rows_of(SIXTEEN % 256, ">u2")),
        "I",
        from_white(SIXTEEN % 256, 65535),
        0,
    ),
    "10 bits, PGM": (
        b"P5 7 9 1023\n" + b"".join(rows_of(SIXTEEN % 1024, ">u2")),
        "I",
        from_white(SIXTEEN % 1024, 1023),
        0,
    ),
    "16 bits, white is 0": (tiff_with(TIFF16, 262, 0), "I;16", 255 - from_white(SIXTEEN, 65535), 0),
    "16 bits, colour": (png(16, 2, rows_of(SIXTEEN_RGB, ">u2")), "RGB", SIXTEEN_RGB // 256, 0),
    "16 bits, grey and alpha": (png(16, 4, rows_of(SIXTEEN_LA, ">u2")), "RGBA", grey(SIXTEEN_LA[..., 0] // 256), 0),
    "16 bits, colour and alpha": (png(16, 6, rows_of(SIXTEEN_RGBA, ">u2")), "RGBA", SIXTEEN_RGBA[..., :3] // 256, 0),
    "32 bits, 8-bit values": (encoded(Image.fromarray(GREY.astype(np.int32)), "TIFF"), "I", grey(GREY), 0),
    "32 bits, 16-bit values": (encoded(INT32, "TIFF"), "I", from_white(SIXTEEN, 65535), 0),
    "floating point": (encoded(Image.fromarray(FLOAT), "TIFF"), "F", grey(np.rint(FLOAT * 255.0)), 0),
}


def twelve_bits():
    """A TIFF of 12 bits per pixel, two pixels in three bytes."""
    values = SIXTEEN[:8, :6] % 4096
    packed = b"".join(
        bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255])
        for row in values.tolist()
        for a, b in zip(row[::2], row[1::2], strict=True)
    )
    tags = [(256, 6), (257, 8), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 8), (279, len(packed))]
    head = struct.pack("<2sHI", b"II", 42, 8 + len(packed))
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    return head + packed + struct.pack("<H", len(tags)) + entries + bytes(4), values


CASES["12 bits"] = (twelve_bits()[0], "I;16", from_white(twelve_bits()[1], 4095), 0)


@pytest.mark.parametrize("name", CASES)
def test_every_mode(name):
    data, mode, expected, tolerance = CASES[name]
    with Image.open(io.BytesIO(data)) as opened:
        assert opened.mode == mode
        found = read_image(opened)
        assert opened.mode == mode  # the caller's image stays
    assert found.mode == "RGB" and np.abs(np.asarray(found).astype(int) - expected).max() <= tolerance
    assert np.array_equal(np.asarray(open_image(data)), np.asarray(found))
    assert np.array_equal(np.asarray(EncodedImage(data).load()), np.asarray(found))
    # training's evaluation and embedding see the same
    processor = ViTImageProcessorPil(
        size={"shortest_edge": 8}, do_center_crop=True, crop_size=6, do_rescale=False, do_normalize=False
    )
    embedded = ImagePreprocessor(processor, 6)(data)
    assert torch.equal(embedded, EvalTransform(8, 6)(EncodedImage(data)).float())


@pytest.mark.parametrize(
    "values, reason",
    [
        (np.array([[0, 65536]], np.int32), r"32-bit integer pixels 0\.\.65536; expected 8 or 16 bits"),
        (np.array([[-1, 5]], np.int32), r"32-bit integer pixels -1\.\.5"),
        (np.array([[0, 1.01]], np.float32), r"floating-point pixels 0\.\.1\.01; expected 0 \(black\) to 1"),
        (np.array([[-0.5, 1]], np.float32), r"floating-point pixels -0\.5\.\.1;"),
        (np.array([[0, np.nan]], np.float32), "floating-point pixels nan"),
        (np.array([[0, np.inf]], np.float32), r"floating-point pixels 0\.\.inf"),
    ],
)
def test_values_out_of_range_are_refused(values, reason):
    data = encoded(Image.fromarray(values), "TIFF")
    with pytest.raises(ImageError, match=f"x.tif: .*{reason}"):
        open_image(data, "x.tif")
    with pytest.raises(ImageError, match=f"x.tif: .*{reason}"):
        EncodedImage(data, "x.tif")
    with pytest.raises(ValueError, match=reason):
        to_rgb(Image.fromarray(values))


def test_a_turned_image_of_16_bits_keeps_its_scale(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    dark = Image.fromarray(SIXTEEN % 256)
    for kind in ("PNG", "TIFF"):
        found = np.asarray(open_image(encoded(dark, kind, exif=exif)))
        assert np.array_equal(found, np.rot90(from_white(SIXTEEN % 256, 65535), -1))
    image = open_image(write_image(tmp_path / "a.png"))
    assert read_image(image) is image  # nothing to do, nothing copied
