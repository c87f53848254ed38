"""Decoding parts of JPEG files, against decoding the whole."""

import io

import numpy as np
import pytest
from data_fixtures import SHARED_DATA
from image_fixtures import encoded, photo, with_orientation
from PIL import Image, ImageOps

from vptsp import ImageError
from vptsp.data_scripts.decoding import EncodedImage, Turn
from vptsp.data_scripts.images import open_image


KINDS = {
    "plain": {},
    "progressive": {"progressive": True},
    "full colour": {"subsampling": 0},
    "half colour": {"subsampling": 1},
    "restarts": {"restart_marker_rows": 1},
    "progressive restarts": {"progressive": True, "restart_marker_blocks": 5},
}


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_above_the_end_are_those_of_the_whole_image(kind, grey):
    image = photo(217, 333)
    data = encoded(image.convert("L") if grey else image, **KINDS[kind])
    for shrink in (1, 2, 4, 8):
        whole = Image.open(io.BytesIO(data))
        whole.draft(None, (217 // shrink, 333 // shrink))
        whole = np.asarray(whole.convert("RGB"))
        for bottom in (1, 40, 95, 96, 97, 200, 333):
            part = EncodedImage(data).decode_part((8, 0, 160, bottom), shrink)
            left, top, right, end = part.box
            pixels = np.asarray(part.image)
            assert part.image.mode == "RGB" and part.shrink == shrink
            assert (left, top, right) == (8 // shrink, 0, 160 // shrink)
            assert abs(end - bottom / shrink) <= 0.5 or end == 1
            assert np.array_equal(pixels[:end], whole[:end])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_images(orientation):
    data = with_orientation(photo(90, 150), orientation, subsampling=0)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    image = EncodedImage(data)
    assert image.size == upright.size
    assert np.array_equal(np.asarray(image.load()), np.asarray(upright))
    box = (5, 11, 43, 77)
    part = EncodedImage(data).decode_part(box)
    left, top, right, bottom = part.box
    pixels = np.asarray(part.image)[top:bottom, left:right]
    pixels = pixels[:, ::-1] if part.turn.mirror_x else pixels
    pixels = pixels[::-1] if part.turn.mirror_y else pixels
    pixels = pixels.transpose(1, 0, 2) if part.turn.swap else pixels
    assert np.array_equal(pixels, np.asarray(upright.crop(box)))


def test_odd_orientations_count_as_upright():
    assert {Turn.from_exif(value) for value in (0, 1, 9, -1, "6")} == {Turn()}
    for data in (with_orientation(photo(40, 30), 9), encoded(photo(40, 30), exif=b"Exif\x00\x00not a tiff header")):
        assert EncodedImage(data).size == (40, 30) and EncodedImage(data).turn == Turn()


@pytest.mark.parametrize(
    "format, mode", [("PNG", "RGB"), ("PNG", "L"), ("JPEG", "CMYK"), ("BMP", "RGB"), ("GIF", "P")]
)
def test_other_kinds_are_decoded_in_full(format, mode):
    data = encoded(photo(200, 150).convert(mode), format)
    image = EncodedImage(data, "x")
    assert image.size == (200, 150)
    part = image.decode_part((10, 20, 30, 40), 4)
    assert (part.box, part.shrink, part.turn) == ((10, 20, 30, 40), 1, Turn())
    assert np.array_equal(np.asarray(part.image), np.asarray(open_image(data)))


def test_one_object_serves_many_parts():
    data = encoded(photo(160, 120))
    image, whole = EncodedImage(data), np.asarray(open_image(data))
    for _ in range(2):
        for shrink in (2, 1):
            part = image.decode_part((0, 0, 160, 120), shrink)
            assert part.image.size == (160 // shrink, 120 // shrink)
        assert np.array_equal(np.asarray(part.image), whole)
    assert np.array_equal(np.asarray(image.load()), whole)
    assert image.decode_part((0, 0, 160, 120), 2).image.size == (160, 120)  # what is decoded already is used


def test_whether_a_file_can_be_read_does_not_depend_on_the_part(tmp_path):
    data = encoded(photo(300, 400))
    for box in ((0, 0, 300, 400), (0, 0, 50, 50)):
        for shrink in (1, 2):
            assert EncodedImage(data).decode_part(box, shrink)
            (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
            with pytest.raises(ImageError, match=r"cut.jpg: can't read this image .*truncated"):
                EncodedImage(tmp_path / "cut.jpg").decode_part(box, shrink)
            padded = EncodedImage(data + b"\0\0")
            assert np.array_equal(np.asarray(padded.decode_part((0, 0, 300, 400)).image), np.asarray(open_image(data)))


def test_errors_name_the_image(tmp_path):
    (tmp_path / "text.jpg").write_bytes(b"<html>")
    with pytest.raises(ImageError, match=r"text.jpg: .*not an image in any known format"):
        EncodedImage(tmp_path / "text.jpg")
    with pytest.raises(ImageError, match=r"gone.jpg: there is no such file"):
        EncodedImage(str(tmp_path / "gone.jpg"))
    with pytest.raises(ImageError, match="image of 3 bytes: can't read"):
        EncodedImage(b"abc")
    with pytest.raises(ImageError, match="row 7: can't read"):
        EncodedImage(b"abc", "row 7")
    with pytest.raises(ImageError, match="row 8: can't read"):
        EncodedImage(encoded(photo(50, 50), "PNG")[:300], "row 8")


def test_photos():
    folder = SHARED_DATA / "grocery" / "images"
    if not folder.is_dir():
        pytest.skip("needs the grocery photos")
    for path in sorted(folder.rglob("*.jpg"))[::400]:
        whole = np.asarray(Image.open(path).convert("RGB"))
        image = EncodedImage(path)
        assert image.size == whole.shape[1::-1] and image.name == str(path)
        assert np.array_equal(np.asarray(image.decode_part((0, 0, 200, 150)).image)[:150], whole[:150])
