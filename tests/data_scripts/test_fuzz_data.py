"""Damaged images, archives and tables: read, or refused by our own error; no hang, no gigabyte, nothing written."""

import gzip
import io
import tarfile
import zipfile

import numpy as np
import pytest
from fuzzing import bounded, examples, mutated
from hypothesis import given
from PIL import Image

from vptsp import DataError, ImageError
from vptsp.data_scripts.archives import list_members, read_members
from vptsp.data_scripts.decoding import EncodedImage
from vptsp.data_scripts.images import open_image
from vptsp.data_scripts.table_files import read_text_table


pytestmark = pytest.mark.fuzz


def encoded(mode, image_format, **options):
    values = np.random.default_rng(0).integers(0, 255, (24, 20, 4), dtype=np.uint8)
    image = (
        Image.fromarray(values).convert(mode) if mode != "I;16" else Image.fromarray(values[..., 0].astype("u2") * 9)
    )
    stream = io.BytesIO()
    image.save(stream, image_format, **options)
    return stream.getvalue()


exif = Image.Exif()
exif[0x0112] = 6
IMAGES = {
    "grey.jpg": encoded("L", "JPEG"),
    "turned.jpg": encoded("RGB", "JPEG", exif=exif),
    "progressive.jpg": encoded("RGB", "JPEG", progressive=True),
    "cmyk.jpg": encoded("CMYK", "JPEG"),
    "palette.png": encoded("P", "PNG"),
    "alpha.png": encoded("RGBA", "PNG"),
    "16.png": encoded("I;16", "PNG"),
    "lossy.webp": encoded("RGB", "WEBP"),
    "lossless.webp": encoded("RGBA", "WEBP", lossless=True),
    "plain.tif": encoded("RGB", "TIFF"),
    "lzw.tif": encoded("RGB", "TIFF", compression="tiff_lzw"),
    "16.tif": encoded("I;16", "TIFF"),
    "a.gif": encoded("P", "GIF"),
    "a.bmp": encoded("RGB", "BMP"),
}


@examples(300)
@given(mutated(IMAGES))
def test_images(drawn):
    _, content = drawn
    with bounded():
        try:
            whole = open_image(content, "the image")
            assert whole.mode == "RGB"
        except ImageError as error:
            assert str(error).startswith("the image: ")
        try:
            image = EncodedImage(content, "the image")
            width, height = image.size
            part = image.decode_part((0, 0, max(width // 2, 1), max(height // 2, 1)), shrink=2)
            assert part.image.mode == "RGB"
        except ImageError as error:
            assert str(error).startswith("the image: ")


def as_zip():
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("a/0.jpg", "a/1.jpg", "b/é.jpg"):
            archive.writestr(name, IMAGES["grey.jpg"])
        archive.writestr("notes.txt", "x" * 500)
    return stream.getvalue()


def as_tar(tar_format):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tar_format) as archive:
        for name in ("a/0.jpg", "a/" + "long" * 40 + ".jpg", "b/é.jpg"):
            info = tarfile.TarInfo(name)
            info.size = len(IMAGES["grey.jpg"])
            archive.addfile(info, io.BytesIO(IMAGES["grey.jpg"]))
    return stream.getvalue()


ARCHIVES = {
    "set.zip": as_zip(),
    "gnu.tar": as_tar(tarfile.GNU_FORMAT),
    "pax.tar": as_tar(tarfile.PAX_FORMAT),
    "set.tar.gz": gzip.compress(as_tar(tarfile.GNU_FORMAT), mtime=0),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def read_archive(folder, name, content):
    path = folder / "archive" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    before = {file for file in folder.rglob("*") if "index" not in file.parts}
    try:
        members = list_members(path, folder / "index")
        images = [member.path for member in members if member.path.endswith(".jpg")]
        for _, image in read_members(path, images):
            assert len(image) <= 1 << 28
    except DataError as error:
        assert name in str(error)
    assert {file for file in folder.rglob("*") if "index" not in file.parts} == before


@examples(300)
@given(mutated(ARCHIVES))
def test_archives(place, drawn):
    with bounded():
        read_archive(place, *drawn)


@examples(60)
@given(mutated({"inside.tar.gz": as_tar(tarfile.PAX_FORMAT)}))
def test_archives_that_are_damaged_before_they_are_packed(place, drawn):
    name, content = drawn
    with bounded():
        read_archive(place, name, gzip.compress(content, mtime=0))


TABLES = {
    "images.csv": 'path,label,price\na/0.jpg,"a, b",1.5\nb/é.jpg,c,2\n'.encode(),
    "images.tsv": b"path\tlabel\na/0.jpg\ta\n",
    "images.jsonl": '{"path": "a/0.jpg", "label": 1}\n{"path": "é", "label": 2}\n'.encode(),
}


@examples(150)
@given(mutated(TABLES))
def test_tables_of_text(place, drawn):
    name, content = drawn
    (place / name).write_bytes(content)
    with bounded():
        try:
            read_text_table(place / name)
        except DataError as error:
            assert name in str(error)
