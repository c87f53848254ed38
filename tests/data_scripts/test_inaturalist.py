import pytest
from data_fixtures import jpeg_bytes, rows_of, write_archive, write_files

from vptsp import DataArguments, DataError, INaturalist2018, check_data_arguments, load_splits
from vptsp.data_scripts.listing import SplitCounts


TRAIN = ["Plantae/5702/aa.jpg", "Aves/2761/c1.jpg", "Aves/2761/c0.jpg", "Insecta/10/x.jpg"]
TEST = ["Aves/3001/c1.jpg", "Reptilia/999/c1.jpg", "Aves/3001/c0.jpg"]
IMAGES = {f"train_val2018/{path}": jpeg_bytes(seed) for seed, path in enumerate(TRAIN + TEST)}
LISTS = {
    "Inaturalist_train_set1.txt": "".join(f"train_val2018/{path}\n" for path in TRAIN),
    "Inaturalist_test_set1.txt": "".join(f"train_val2018/{path}\n" for path in TEST),
}
EXPECTED = {  # by the number of the category
    "train": ["Insecta/10/x.jpg", "Aves/2761/c1.jpg", "Aves/2761/c0.jpg", "Plantae/5702/aa.jpg"],
    "test": ["Reptilia/999/c1.jpg", "Aves/3001/c1.jpg", "Aves/3001/c0.jpg"],
}


@pytest.fixture
def load(tmp_path):
    def load_inaturalist(root, **options):
        return load_splits("inaturalist", root, cache_dir=tmp_path / "cache", **{"verify_counts": False, **options})

    return load_inaturalist


def check(splits, order=None):
    for split, expected in EXPECTED.items():
        rows = [(name, content) for name, _, content in rows_of(splits[split])]
        listed = expected if order is None else [path for path in order if path in expected]
        assert rows == [(path.rpartition("/")[0], IMAGES[f"train_val2018/{path}"]) for path in listed]
    assert splits["train"].features["label"].names == ["Insecta/10", "Aves/2761", "Plantae/5702"]
    assert splits["test"].features["label"].names == ["Reptilia/999", "Aves/3001"]


def test_folder(tmp_path, load):
    root = write_files(tmp_path / "root", {**LISTS, **IMAGES, "train_val2018/Aves/._2761": b"x", ".DS_Store": b"x"})
    check(load(root))
    check(load(root, streaming=True))
    (root / "Inat_dataset_splits").mkdir()
    for name in LISTS:
        (root / name).rename(root / "Inat_dataset_splits" / name)
    check(load(root))
    with pytest.raises(DataError, match=r"iNaturalist 2018 in .*train: found 4 images of 3 classes, expected 325,846"):
        load(root, verify_counts=True)


@pytest.mark.parametrize("images", ["", "photos/"])
@pytest.mark.parametrize("lists", ["", "lists/", "Inat_dataset_splits/"])
def test_lists_and_images_in_folders_beside_each_other(tmp_path, load, lists, images):
    root = write_files(
        tmp_path / "root",
        {f"{lists}{name}": x for name, x in LISTS.items()} | {f"{images}{name}": x for name, x in IMAGES.items()},
    )
    check_data_arguments(DataArguments(dataset_name="inaturalist", data_dir=str(root)))
    check(load(root))
    for low in dict.fromkeys(part for part in (lists, images, f"{images}train_val2018/") if part):
        with pytest.raises(DataError, match=rf"{root / low} is too low: did you mean {root}\?"):
            load(root / low)  # and not that this or the other part is missing
    (root / "copy").mkdir()
    for name in LISTS:
        (root / "copy" / name).write_text("")
    if lists == "lists/":
        with pytest.raises(DataError, match=r"root holds Inaturalist_train_set1.txt in several folders \(.*/copy/"):
            load(root)
    else:
        check(load(root))


def test_one_folder_with_lists_and_images_is_the_data_set(tmp_path, load):
    root = write_files(tmp_path / "high/root", {**LISTS, **IMAGES})
    write_files(tmp_path / "high/other/train_val2018", {"Aves/1/x.jpg": b"x"})
    (tmp_path / "high/other").rename(tmp_path / "high/another")
    check(load(root))


@pytest.mark.parametrize("name", ["train_val2018.tar.gz", "train_val2018.tar"])
def test_archive(tmp_path, load, name):
    root = write_files(tmp_path / "root", LISTS)
    extra = {"train_val2018/Aves/1/not_listed.jpg": jpeg_bytes(50), "train_val2018/Aves/2761/._c0.jpg": b"x"}
    archive = write_archive(root / name, {**extra, **IMAGES})
    for data_dir in (root, archive):
        check(load(data_dir), order=TRAIN + TEST)
        stream = load(data_dir, streaming=True)
        check(stream, order=TRAIN + TEST)
        assert stream["train"].num_shards == 1
    path = load(root)["test"][0]["image"]["path"]
    assert path == f"{name}/train_val2018/Aves/3001/c1.jpg"


def test_an_archive_is_read_once_per_group(tmp_path, load, monkeypatch):
    """One pass for the list of members, one for each of the two tables; none for what is there already."""
    from vptsp.data_scripts import archives

    root = write_files(tmp_path / "root", LISTS)
    write_archive(root / "train_val2018.tar.gz", IMAGES)
    passes, walk = [], archives._walk_tar
    monkeypatch.setattr(archives, "_walk_tar", lambda *args: passes.append(args) or walk(*args))
    load(root)
    assert len(passes) == 3
    load(root)
    assert len(passes) == 3


@pytest.mark.parametrize("before", ["", "train_val2018/", "/data/inat/train_val2018/", "train_val2018\\"])
def test_paths_of_other_roots(tmp_path, load, before):
    lists = {
        "Inaturalist_train_set1.txt": "".join(f"{before}{path}\r\n" for path in TRAIN),
        "Inaturalist_test_set1.txt": "".join(f"{before}{path}\r\n" for path in TEST),
    }
    check(load(write_files(tmp_path / "root", {**lists, **IMAGES})))


@pytest.mark.parametrize(
    "line, message",
    [
        ("c9.jpg", r"test_set1.txt:4: expected a path like train_val2018/Aves/2761/<image>.jpg.* got 'c9.jpg'"),
        ("train_val2018/Aves/c9.jpg", r"test_set1.txt:4: expected a path like .* number of a category"),
        ("train_val2018/Aves/../1/c9.jpg", r"test_set1.txt:4: expected a path within the data set"),
        (
            "train_val2018/Aves/3001/c1.jpg",
            r"test_set1.txt:4: the image 'Aves/3001/c1.jpg' was named before, at .*:1$",
        ),
        ("train_val2018/Aves/2761/c1.jpg", r"test_set1.txt:4: the image .* was named before, at .*train_set1.txt:2$"),
        ("train_val2018/Aves/2761/c9.jpg", r"test_set1.txt:4: the class 'Aves/2761' is in the training list too"),
        (
            "train_val2018/Aves/4/c9.jpg",
            r"1 of the 8 images that iNaturalist 2018 names are missing in .*Aves/4/c9.jpg",
        ),
    ],
)
def test_lines_that_are_wrong(tmp_path, load, line, message):
    test = LISTS["Inaturalist_test_set1.txt"] + line
    root = write_files(tmp_path / "root", {**LISTS, **IMAGES, "Inaturalist_test_set1.txt": test})
    with pytest.raises(DataError, match=message):
        load(root, verify_counts=True)


def test_wrong_folder(tmp_path, load):
    root = write_files(tmp_path / "high/root", {**LISTS, **IMAGES})
    for low in (root / "train_val2018", root / "train_val2018/Aves"):
        with pytest.raises(DataError, match=rf"{low} is too low: did you mean {root}\?"):
            load(low)
    with pytest.raises(DataError, match=rf"high is too high: did you mean {root}\?"):
        load(tmp_path / "high")
    with pytest.raises(DataError, match=r"bare holds the lists, but no images: expected train_val2018/ or"):
        load(write_files(tmp_path / "bare", LISTS))
    with pytest.raises(DataError, match=r"one of the lists; Inaturalist_test_set1.txt is missing"):
        load(write_files(tmp_path / "one", {"Inaturalist_train_set1.txt": "x"}))
    with pytest.raises(DataError, match=r"the lists are missing: expected Inaturalist_train_set1.txt and .* beside"):
        load(write_archive(tmp_path / "alone/train_val2018.tar.gz", IMAGES))
    with pytest.raises(DataError, match=r"holds no images in a folder 'train_val2018'; found images in 'train_2019'"):
        load(write_archive(tmp_path / "bare/train_val2018.tar.gz", {"train_2019/Aves/1/a.jpg": b"x"}))


def full_lists():
    """As many rows and classes as the published lists have."""
    sizes = {"train": (325846, 5690, 0), "test": (136093, 2452, 5690)}
    return {
        split: [f"Aves/{first + i % classes}/{i:06x}.jpg" for i in range(images)]
        for split, (images, classes, first) in sizes.items()
    }


def test_published_counts():
    from vptsp.data_scripts.benchmarks.inaturalist import INATURALIST_COUNTS

    assert {"train": SplitCounts(325846, 5690), "test": SplitCounts(136093, 2452)} == INATURALIST_COUNTS


@pytest.mark.parametrize("share", [50, pytest.param(1, marks=pytest.mark.slow)])
def test_full_size(tmp_path, monkeypatch, share):
    """All rows of the published lists, and (to be quick) one in 50; from an archive of empty images."""
    lists = {split: paths[: len(paths) // share] for split, paths in full_lists().items()}
    counts = {split: SplitCounts(len(paths), len({p.split("/")[1] for p in paths})) for split, paths in lists.items()}
    if share > 1:
        monkeypatch.setattr("vptsp.data_scripts.benchmarks.inaturalist.INATURALIST_COUNTS", counts)
    else:
        assert counts == {"train": (325846, 5690), "test": (136093, 2452)}
    text = {
        f"Inaturalist_{split}_set1.txt": "".join(f"train_val2018/{path}\n" for path in paths)
        for split, paths in lists.items()
    }
    write_files(tmp_path, text)
    write_archive(
        tmp_path / "train_val2018.tar", {f"train_val2018/{path}": b"" for paths in lists.values() for path in paths}
    )
    listing = INaturalist2018.list_splits(str(tmp_path), str(tmp_path / "cache"))
    prefix = f"{tmp_path}/train_val2018.tar/train_val2018/"
    for split, paths in lists.items():
        rows, names = listing.splits[split], listing.class_names[split]
        assert sorted(rows.files) == sorted(prefix + path for path in paths)
        assert all(
            file.startswith(f"{prefix}{names[label]}/") for file, label in zip(rows.files, rows.labels, strict=True)
        )
        assert [int(name.partition("/")[2]) for name in names] == sorted({int(path.split("/")[1]) for path in paths})
    monkeypatch.undo()
    if share > 1:
        with pytest.raises(DataError, match=r"train: found 6,516 images of .* expected 325,846 of 5,690; test: found"):
            INaturalist2018.list_splits(str(tmp_path), str(tmp_path / "cache"))
