import logging
import pickle

import pytest
from data_fixtures import jpeg_bytes, rows_of, split_list, write_archive, write_classes, write_files

from vptsp import CUB200, DataArguments, DataError, check_data_arguments, load_splits


FOLDERS = {"200.Yellowthroat": 1, "002.Laysan_Albatross": 2, "100.Brown_Pelican": 1, "101.White_Pelican": 3}
FILES = {
    f"images/{name}/{name[4:]}_{i}.jpg": jpeg_bytes(10 * row + i)
    for row, (name, count) in enumerate(FOLDERS.items())
    for i in range(count)
}
MEMBERS = {
    "attributes.txt": "1 has_bill_shape::curved\n",
    "CUB_200_2011/images.txt": "1 ...\n",
    **{f"CUB_200_2011/{name}": content for name, content in FILES.items()},
    "CUB_200_2011/images/._002.Laysan_Albatross": b"litter",
    "CUB_200_2011/images/200.Yellowthroat/._Yellowthroat_0.jpg": b"litter",
}


@pytest.fixture
def load(tmp_path):
    def load_cub(root, **options):
        return load_splits("cub", root, cache_dir=tmp_path / "cache", **options)

    return load_cub


def test_subset_in_official_order(tmp_path, load):
    root = write_files(tmp_path, {name: MEMBERS[name] for name in MEMBERS if name[0] == "C"}) / "CUB_200_2011"
    for data_dir in (root, tmp_path):
        splits = load(data_dir, verify_counts=False)
        assert list(splits) == ["train", "test"]
        assert splits["train"].features["label"].names == ["002.Laysan_Albatross", "100.Brown_Pelican"]
        assert splits["test"].features["label"].names == ["101.White_Pelican", "200.Yellowthroat"]
        assert splits["train"]["label"][:] == [0, 0, 1]
        assert splits["test"]["label"][:] == [0, 0, 0, 1]
    with pytest.raises(
        DataError,
        match=r"CUB-200-2011 in .*images is not complete.*train: found 3 images of 2 classes, expected 5,864 of 100; "
        r"test: found 4 images of 2 classes, expected 5,924 of 100.*verify_counts=False",
    ):
        load(root)


@pytest.mark.parametrize("name", ["CUB_200_2011.tgz", "CUB_200_2011.tar", "CUB_200_2011.zip"])
def test_archive(tmp_path, load, name):
    folder = load(write_files(tmp_path / "unpacked", MEMBERS), verify_counts=False)
    archive = write_archive(tmp_path / "packed" / name, MEMBERS)
    for data_dir in (archive, archive.parent) if archive.suffix != ".zip" else (archive,):
        for streaming in (False, True):
            splits = load(data_dir, verify_counts=False, streaming=streaming)
            assert list(splits) == ["train", "test"]
            for split in splits:
                assert splits[split].features == folder[split].features
                rows = rows_of(splits[split])
                members = {name: (path.removeprefix(f"{archive.name}/"), content) for name, path, content in rows}
                assert all(MEMBERS[path] == content for path, content in members.values())
                expected = [(name, content) for name, _, content in rows_of(folder[split])]
                assert sorted((name, content) for name, _, content in rows) == sorted(expected)
                assert rows == rows_of(load(data_dir, verify_counts=False)[split])
    assert splits["train"].num_shards == 1
    assert rows_of(pickle.loads(pickle.dumps(splits["train"]))) == rows_of(splits["train"])  # as workers get it
    with pytest.raises(DataError, match=rf"{name}/CUB_200_2011/images is not complete.*found 3 images of 2 classes"):
        load(archive)


@pytest.mark.parametrize("name", ["cub200.tar", "cub200.tgz", "cub200.zip", "CUB_200_2011.zip"])
def test_archives_of_other_names_are_found_in_a_folder(tmp_path, load, name):
    folder = load(write_files(tmp_path / "unpacked", MEMBERS), verify_counts=False)
    write_archive(tmp_path / "packed" / name, {path.removeprefix("CUB_200_2011/"): x for path, x in MEMBERS.items()})
    check_data_arguments(DataArguments(dataset_name="cub", data_dir=str(tmp_path / "packed")))
    splits = load(tmp_path / "packed", verify_counts=False)
    for split in folder:
        names_and_images = [[(name, content) for name, _, content in rows_of(x[split])] for x in (folder, splits)]
        assert sorted(names_and_images[0]) == sorted(names_and_images[1])
    (tmp_path / "packed/below").mkdir()
    (tmp_path / "packed" / name).rename(tmp_path / "packed/below" / name)
    with pytest.raises(DataError, match=r"packed is too high: did you mean .*packed/below\?"):
        load(tmp_path / "packed")


def test_prepared_archives_are_found_again_and_never_stale(tmp_path, load, monkeypatch):
    archive = write_archive(tmp_path / "CUB_200_2011.tgz", MEMBERS)
    load(archive, verify_counts=False)
    with monkeypatch.context() as patch:
        patch.setattr("vptsp.data_scripts.archives._walk_tar", None)  # neither listed nor read again
        assert len(load(archive, verify_counts=False)["train"]) == 3
        (tmp_path / "moved").mkdir()
        archive = archive.rename(tmp_path / "moved/CUB_200_2011.tgz")
        assert len(load(archive, verify_counts=False)["train"]) == 3
    extra = {"CUB_200_2011/images/002.Laysan_Albatross/new.jpg": jpeg_bytes(99)}
    write_archive(archive, {**MEMBERS, **extra})
    assert len(load(archive, verify_counts=False)["train"]) == 4


def test_what_preparing_from_an_archive_says(tmp_path, load, monkeypatch, capfd):
    archive = write_archive(tmp_path / "CUB_200_2011.tgz", MEMBERS)
    load(archive, verify_counts=False)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""  # a bar only where it takes more than two seconds
    monkeypatch.setattr("vptsp.data_scripts.builder.free_bytes", lambda folder: 100)
    write_archive(archive, {**MEMBERS, "CUB_200_2011/images/002.Laysan_Albatross/new.jpg": jpeg_bytes(99)})
    with pytest.raises(DataError, match=r"need 0.0 GB in .*cache, where 0.0 GB are free; name another folder"):
        load(archive, verify_counts=False)
    monkeypatch.undo()
    load(archive, verify_counts=False)
    monkeypatch.setattr("vptsp.data_scripts.builder.free_bytes", lambda folder: 100)
    load(archive, verify_counts=False)  # nothing more to be written


def test_an_archive_that_breaks_while_it_is_read(tmp_path, load, monkeypatch):
    archive = write_archive(tmp_path / "CUB_200_2011.tar", MEMBERS)
    listing = CUB200.list_splits(str(archive), str(tmp_path / "cache"), verify_counts=False)
    archive.write_bytes(archive.read_bytes()[:3000])
    builder = CUB200("test", str(archive), str(tmp_path / "cache"), listing, verify_counts=False)
    with pytest.raises(DataError, match=r"CUB_200_2011.tar is truncated.*; the last whole member is 'CUB_200_2011/"):
        builder.download_and_prepare()
    with pytest.raises(DataError, match=r"CUB_200_2011.tar is truncated"):
        list(builder.as_streaming_dataset("test"))


def test_errors(tmp_path, load, caplog):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"expected images/.* or CUB_200_2011.tgz in .*empty; found no folders"):
        load(tmp_path / "empty")
    images = write_classes(tmp_path / "high/birds/CUB_200_2011/images", {"001.a": 1, "002.b": 1})
    for low in (images, images / "001.a"):
        with pytest.raises(DataError, match=rf"{low} is too low: did you mean {images.parent}\?"):
            load(low)
    with pytest.raises(DataError, match=r"high is too high: did you mean .*birds\?"):
        load(tmp_path / "high")
    with pytest.raises(DataError, match=r"holds no test class of CUB-200-2011"):
        load(images.parent, verify_counts=False)
    write_classes(images, {"002.c": 1})
    with pytest.raises(DataError, match=r"two folders of class 2: '002.b' and '002.c'"):
        load(images.parent)
    (images / "002.c").rename(images / "thumbnails")
    with pytest.raises(DataError, match=r"holds the folder 'thumbnails'; expected only class folders named like"):
        load(images.parent)
    with pytest.raises(DataError, match=r"no option 'class_split'; its options are verify_counts"):
        load(images.parent, class_split="first")
    with pytest.raises(DataError, match=r"holds no images in a folder 'images'; found images in 'pictures'"):
        load(write_archive(tmp_path / "other.tgz", {"pictures/001.a/1.jpg": b"x"}))
    with pytest.raises(DataError, match=r"holds no images in a folder 'images'; found no images at all"):
        load(write_archive(tmp_path / "none.tgz", {"pictures/001.a/1.txt": b"x"}))
    (images / "thumbnails").rename(images / "101.c")
    write_files(images, {"overview.jpg": b"x"})
    with caplog.at_level(logging.WARNING):
        assert len(load(images.parent, verify_counts=False)["train"]) == 2
    assert "the image 'overview.jpg' lies beside the class folders and is left out" in caplog.text


@pytest.mark.parametrize("packed", [False, True])
def test_full_size(tmp_path, load, packed):
    """The published split, with the official file names; the images are empty in the folder."""
    expected, files = {}, {}
    for split in ("train", "test"):
        lines = split_list(f"CUB_{split}.csv")
        expected[split] = sorted((label - 1, file.removeprefix("/data/")) for file, label in lines)
        files |= {file: b"" for _, file in expected[split]}
    where = tmp_path / "CUB_200_2011.tgz"
    if packed:
        write_archive(where, files)
    else:
        write_files(tmp_path, files)
    listing = CUB200.list_splits(str(tmp_path), str(tmp_path / "cache"))
    prefix = f"{where}/" if packed else f"{tmp_path}/"
    for split, first in (("train", 0), ("test", 100)):
        rows = listing.splits[split]
        found = [
            (label + first, file.removeprefix(prefix)) for label, file in zip(rows.labels, rows.files, strict=True)
        ]
        assert sorted(found) == expected[split]
        assert len(listing.class_names[split]) == 100
    if not packed:
        (tmp_path / expected["test"][0][1]).unlink()
        with pytest.raises(DataError, match=r"test: found 5,923 images of 100 classes, expected 5,924 of 100"):
            load(tmp_path)
