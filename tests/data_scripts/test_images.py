import io

import numpy as np
import pytest
from data_fixtures import write_image
from PIL import Image

from vptsp.data_scripts.data_errors import DataError, ImageError
from vptsp.data_scripts.image_files import is_image_name, list_images
from vptsp.data_scripts.images import open_image


PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def encoded(image, format="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, format=format, **options)
    return stream.getvalue()


def test_rgb_is_read_unchanged_from_path_and_bytes(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes()):
        image = open_image(source)
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image), PIXELS)


@pytest.mark.parametrize(
    "orientation, turn",
    [
        (1, lambda p: p),
        (2, lambda p: p[:, ::-1]),
        (3, lambda p: p[::-1, ::-1]),
        (4, lambda p: p[::-1]),
        (6, lambda p: np.rot90(p, -1)),
        (8, lambda p: np.rot90(p, 1)),
    ],
)
def test_exif_orientation_is_applied(orientation, turn):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(PIXELS), exif=exif)
    assert np.array_equal(np.asarray(open_image(data)), turn(PIXELS))


def test_broken_exif_does_not_spoil_the_pixels():
    data = encoded(Image.fromarray(PIXELS), exif=b"Exif\x00\x00not a tiff header at all")
    assert np.array_equal(np.asarray(open_image(data)), PIXELS)


def test_grey_one_bit_and_alpha():
    grey = PIXELS[..., 0]
    assert np.array_equal(np.asarray(open_image(encoded(Image.fromarray(grey)))), np.stack([grey] * 3, -1))
    bits = grey > 127
    assert np.array_equal(np.asarray(open_image(encoded(Image.fromarray(bits))))[..., 1], bits * 255)
    alpha = np.concatenate([PIXELS, grey[..., None]], -1)
    assert np.array_equal(np.asarray(open_image(encoded(Image.fromarray(alpha)))), PIXELS)


@pytest.mark.filterwarnings("error")
def test_palette_with_and_without_transparency():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    for options in ({}, {"transparency": b"\x80\xff"}):
        assert np.asarray(open_image(encoded(image, **options))).tolist() == [[[255, 0, 0], [0, 0, 255]]]


def test_cmyk_jpeg():
    data = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    assert Image.open(io.BytesIO(data)).mode == "CMYK"
    assert np.abs(np.asarray(open_image(data)).astype(int) - [255, 0, 0]).max() <= 3


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_not_clipped(format):
    values = np.array([[0, 128, 129, 257, 1000], [30000, 40000, 65406, 65407, 65535]], dtype=np.uint16)
    expected = np.array([[round(int(v) * 255 / 65535) for v in row] for row in values])
    result = np.asarray(open_image(encoded(Image.fromarray(values), format)))
    assert np.array_equal(result, np.stack([expected] * 3, -1))


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(open_image(data))[0, 0].tolist() == [255, 0, 0]


def test_truncated_corrupt_empty_missing_name_the_file(tmp_path):
    whole = encoded(Image.fromarray(np.tile(PIXELS, (20, 20, 1))), "JPEG")
    cases = {
        "truncated.jpg": (whole[: len(whole) // 2], "truncated"),
        "corrupt.png": (encoded(Image.fromarray(PIXELS))[:40] + b"x" * 60, "can't read"),
        "text.jpg": (b"<html>not found</html>", "not an image in any known format"),
        "empty.jpg": (b"", "empty file"),
        "float.tiff": (encoded(Image.fromarray(np.full((2, 2), 1.5, np.float32)), "TIFF"), "floating-point"),
        "wide.tiff": (encoded(Image.fromarray(np.full((2, 2), 70000, np.int32)), "TIFF"), "32-bit integer"),
    }
    for name, (data, reason) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ImageError, match=f"{name}: .*{reason}"):
            open_image(tmp_path / name)
        with pytest.raises(ImageError, match=f"row 3: .*{reason}"):
            open_image(data, name="row 3")
    with pytest.raises(ImageError, match=r"gone.jpg: there is no such file"):
        open_image(tmp_path / "gone.jpg")
    with pytest.raises(ImageError, match="image of 3 bytes"):
        open_image(b"abc")
    assert issubclass(ImageError, ValueError)


def test_names_of_images():
    good = ["a.jpg", "a.JPEG", "b.c.Png", "a.bmp", "a.webp", "a.gif", "a.tif", "a.TIFF", "a.ppm", "é.jpg"]
    bad = ["._a.jpg", ".a.jpg", ".DS_Store", "a.txt", "jpg", ".jpg", "a.jpg.part", "__MACOSX", "Thumbs.db"]
    assert all(is_image_name(name) for name in good)
    assert not any(is_image_name(name) for name in bad)


def test_list_images_is_sorted_deep_and_without_litter(tmp_path):
    for name in ("b.jpg", "B.png", "deep/er/c.JPG", "deep/a.bmp"):
        write_image(tmp_path / name)
    for name in ("._b.jpg", ".DS_Store", "__MACOSX/b.jpg", ".hidden/c.jpg", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "folder.jpg").mkdir()
    found = list_images(tmp_path)
    assert [file.path for file in found] == ["B.png", "b.jpg", "deep/a.bmp", "deep/er/c.JPG"]
    status = (tmp_path / "deep/a.bmp").stat()
    assert found[2][1:] == (status.st_size, status.st_mtime_ns)


def test_list_images_follows_links_to_files_and_on_request_to_folders_but_not_round(tmp_path, caplog):
    write_image(tmp_path / "real/a.jpg")
    folder = tmp_path / "class"
    folder.mkdir()
    (folder / "linked.jpg").symlink_to(tmp_path / "real/a.jpg")
    (folder / "sub").symlink_to(tmp_path / "real")
    (folder / "round").symlink_to(folder)
    assert [file.path for file in list_images(folder)] == ["linked.jpg"]
    assert "class: 2 links to folders are not followed, left out: " in caplog.text
    assert f"{folder / 'sub'} -> {tmp_path / 'real'}" in caplog.text
    caplog.clear()
    assert [file.path for file in list_images(folder, follow_links=True)] == ["linked.jpg", "sub/a.jpg"]
    assert "class: 1 links to folders are not followed" in caplog.text and str(folder / "round") in caplog.text
    (folder / "broken.jpg").symlink_to(tmp_path / "nowhere.jpg")
    with pytest.raises(DataError, match=r"broken.jpg is a broken link to .*nowhere.jpg"):
        list_images(folder)


def test_list_images_errors(tmp_path):
    with pytest.raises(DataError, match=r"can't list the folder .*absent"):
        list_images(tmp_path / "absent")
    try:
        (tmp_path / "bad\udcff.jpg").write_bytes(b"x")
    except (OSError, UnicodeEncodeError):
        pytest.skip("this file system refuses names that are not UTF-8")
    with pytest.raises(DataError, match="not valid UTF-8"):
        list_images(tmp_path)
