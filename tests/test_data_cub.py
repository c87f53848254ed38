import io

import pytest
from data_fixtures import SHARED_DATA, write_classes
from PIL import Image

from vptsp.data_scripts import DataError, load_splits


@pytest.fixture
def load(tmp_path):
    def load_cub(root, **options):
        return load_splits("cub", root, cache_dir=tmp_path / "cache", **options)

    return load_cub


def test_subset_in_official_order(tmp_path, load):
    counts = {"200.Yellowthroat": 1, "002.Laysan_Albatross": 2, "100.Brown_Pelican": 1, "101.White_Pelican": 3}
    root = write_classes(tmp_path / "CUB_200_2011/images", counts, "jpg").parent
    (root / "images/._002.Laysan_Albatross").write_bytes(b"")
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


def test_errors(tmp_path, load):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"expected images/ or CUB_200_2011/images/ in .*empty; found no folders"):
        load(tmp_path / "empty")
    images = write_classes(tmp_path / "high/birds/CUB_200_2011/images", {"001.a": 1, "002.b": 1})
    with pytest.raises(DataError, match=r"images holds the class folders themselves.*did you mean .*CUB_200_2011\?"):
        load(images)
    with pytest.raises(DataError, match=r"high is too high: did you mean .*birds\?"):
        load(tmp_path / "high")
    with pytest.raises(DataError, match=r"holds no test class; ids 1 to 100 train.* found 1 to 2"):
        load(images.parent, verify_counts=False)
    write_classes(images, {"002.c": 1})
    with pytest.raises(DataError, match=r"two folders of class 2: '002.b' and '002.c'"):
        load(images.parent)
    (images / "002.c").rename(images / "thumbnails")
    with pytest.raises(DataError, match="holds the folder 'thumbnails'; expected only class folders named like"):
        load(images.parent)
    with pytest.raises(DataError, match="no option 'class_split'; its options are verify_counts"):
        load(images.parent, class_split="first")


def test_full_size(tmp_path, load):
    """The published split, with the official file names and images of one pixel."""
    lists = [SHARED_DATA / "splits" / f"CUB_{split}.csv" for split in ("train", "test")]
    if not all(path.is_file() for path in lists):
        pytest.skip("needs the published split lists")
    stream = io.BytesIO()
    Image.new("RGB", (1, 1)).save(stream, "JPEG")
    expected = {}
    for split, path in zip(("train", "test"), lists, strict=True):
        lines = [line.rsplit(",", 1) for line in path.read_text().splitlines()]
        expected[split] = sorted((int(label) - 1, file.removeprefix("/data/")) for file, label in lines)
        for _, file in expected[split]:
            target = tmp_path / file
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(stream.getvalue())
    splits = load(tmp_path)
    for split, first in (("train", 0), ("test", 100)):
        table = splits[split].with_format("arrow")[:]
        labels = table["label"].to_pylist()
        files = [image["path"].removeprefix(f"{tmp_path.resolve()}/") for image in table["image"].to_pylist()]
        assert sorted(zip([label + first for label in labels], files, strict=True)) == expected[split]
        assert splits[split].features["label"].num_classes == 100
    target.unlink()
    with pytest.raises(DataError, match="test: found 5,923 images of 100 classes, expected 5,924 of 100"):
        load(tmp_path)
