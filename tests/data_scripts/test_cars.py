import io
from collections import Counter

import numpy as np
import pytest
from data_fixtures import SHARED_DATA, jpeg_bytes, rows_of, split_list, write_archive, write_files
from scipy.io import loadmat, savemat

from vptsp import Cars196, DataArguments, DataError, check_data_arguments, load_splits
from vptsp.data_scripts.benchmarks.cars_names import CAR_NAMES, car_number


RAM = "Ram C/V Cargo Van Minivan 2012"
CARS = [  # class id (from 1), path
    (196, "000001.jpg"),
    (2, "000002.jpg"),
    (1, "000003.jpg"),
    (2, "000004.jpg"),
    (CAR_NAMES.index(RAM) + 1, "000005.jpg"),
    (98, "000006.jpg"),
    (99, "000007.jpg"),
]
IMAGES = {file: jpeg_bytes(seed) for seed, (_, file) in enumerate(CARS)}
EXPECTED = {  # class name, file; in class order
    "train": [
        ("AM General Hummer SUV 2000", "000003.jpg"),
        ("Acura RL Sedan 2012", "000002.jpg"),
        ("Acura RL Sedan 2012", "000004.jpg"),
        (CAR_NAMES[97], "000006.jpg"),
    ],
    "test": [(CAR_NAMES[98], "000007.jpg"), (RAM, "000005.jpg"), (CAR_NAMES[195], "000001.jpg")],
}


def annotations(rows, path_field="relative_im_path", names=CAR_NAMES, labels=True):
    """A .mat file with the fields of the official ones."""
    fields = ["bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", *(["class"] if labels else []), path_field]
    table = np.empty((1, len(rows)), dtype=[(name, object) for name in fields])
    for i, (class_id, path) in enumerate(rows):
        values = {"class": np.uint8(class_id), path_field: path}
        table[0, i] = tuple(values.get(name, np.uint16(7)) for name in fields)
    content = {"annotations": table}
    if names is not None:
        content["class_names"] = np.array([list(names)], dtype=object)
    stream = io.BytesIO()
    savemat(stream, content)
    return stream.getvalue()


ANNOS = annotations([(class_id, f"car_ims/{file}") for class_id, file in CARS])


def class_folders(top="images"):
    return {f"{top}/{CAR_NAMES[class_id - 1].replace('/', '-')}/{file}": IMAGES[file] for class_id, file in CARS}


def devkit(train=4):
    """The other form: images numbered anew in each half; returns images per half and the two label files."""
    halves = {"cars_train": CARS[:train], "cars_test": CARS[train:]}
    images, labels = {}, {}
    for half, rows in halves.items():
        files = [(class_id, f"{i:05d}.jpg") for i, (class_id, _) in enumerate(rows, 1)]
        images |= {f"{half}/{new}": IMAGES[old] for (_, new), (_, old) in zip(files, rows, strict=True)}
        name = "cars_train_annos.mat" if half == "cars_train" else "cars_test_annos_withlabels.mat"
        labels[name] = annotations(files, "fname", names=None)
    return images, labels


@pytest.fixture
def load(tmp_path):
    def load_cars(root, **options):
        return load_splits("cars", root, cache_dir=tmp_path / "cache", **{"verify_counts": False, **options})

    return load_cars


def check(splits, in_order=True):
    for split, expected in EXPECTED.items():
        rows = [(name, content) for name, _, content in rows_of(splits[split])]
        wanted = [(name, IMAGES[file]) for name, file in expected]
        assert (rows if in_order else sorted(rows)) == (wanted if in_order else sorted(wanted))
        assert splits[split].features["label"].names == list(dict.fromkeys(name for name, _ in expected))


def class_halves(top, train=4):
    """Class folders in two halves whose files are numbered anew, as archives of class folders have them."""
    files = {}
    for half, rows in (("train", CARS[:train]), ("test", CARS[train:])):
        for i, (class_id, file) in enumerate(rows, 1):
            files[f"{top}{half}/{CAR_NAMES[class_id - 1].replace('/', '-')}/{i:05d}.jpg"] = IMAGES[file]
    return files


HALVES = {"halves": "", "halves below car_data": "car_data/", "halves twice below car_data": "car_data/car_data/"}


def make_layout(root, layout):
    images, labels = devkit()
    car_ims = {f"car_ims/{file}": content for file, content in IMAGES.items()}
    kit = {f"devkit/{name}": content for name, content in labels.items()}
    if layout == "class folders":
        write_files(root, {**class_folders(), "images/._x.jpg": b"x", "images/.DS_Store": b"x"})
    elif layout == "class folders below cars196":
        write_files(root, class_folders("cars196/images"))
    elif layout == "car_ims":
        write_files(root, {**car_ims, "car_ims/._000001.jpg": b"x", "cars_annos.mat": ANNOS})
    elif layout in HALVES:
        tables = {"names.csv": "\n".join(CAR_NAMES), "anno_train.csv": "00001.jpg,39,116,569,375,196\n"}
        write_files(root, class_halves(HALVES[layout]) | tables)
    elif layout == "devkit":
        write_files(root, images | kit)
    elif layout == "devkit, folders twice":
        twice = {f"{name.partition('/')[0]}/{name}": content for name, content in images.items()}
        write_files(root, twice | {f"car_devkit/{name}": content for name, content in kit.items()})
    elif layout == "devkit with the test labels beside it":
        write_files(root, {**images, **kit})
        (root / "devkit/cars_test_annos_withlabels.mat").rename(root / "cars_test_annos_withlabels.mat")
    elif layout == "car_ims.tgz":
        write_archive(root / "car_ims.tgz", car_ims)
        write_files(root, {"cars_annos.mat": ANNOS})
    elif layout == "devkit archives":
        for half in ("cars_train", "cars_test"):
            write_archive(root / f"{half}.tgz", {name: images[name] for name in images if name.startswith(half)})
        write_archive(root / "car_devkit.tgz", {f"devkit/{name}": labels[name] for name in labels})
    return root


LAYOUTS = ["class folders", "class folders below cars196", *HALVES, "car_ims", "devkit", "devkit, folders twice"]
LAYOUTS += ["devkit with the test labels beside it", "car_ims.tgz", "devkit archives"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, load, layout):
    root = make_layout(tmp_path / "root", layout)
    splits = load(root)
    packed = "tgz" in layout or "archives" in layout
    check(splits, in_order=not packed)
    stream = load(root, streaming=True)
    assert {split: rows_of(stream[split]) for split in stream} == {split: rows_of(splits[split]) for split in splits}
    # training images come from both halves of the devkit, test images from the second and the first
    assert stream["train"].num_shards == (2 if layout == "devkit archives" else 1)
    check_data_arguments(DataArguments(dataset_name="cars", data_dir=str(root)))
    with pytest.raises(DataError, match=r"Cars-196 in .* train: found 4 images of 3 classes, expected 8,054 of 98"):
        load(root, verify_counts=True)


@pytest.mark.parametrize("layout", [*HALVES, "devkit", "devkit, folders twice", "devkit archives"])
@pytest.mark.parametrize("half", ["train", "test"])
def test_one_half_alone_is_a_subset(tmp_path, load, layout, half, caplog):
    root = make_layout(tmp_path / "root", layout)
    gone = {"train": "test", "test": "train"}[half]
    for place in [root / f"{HALVES.get(layout, 'cars_')}{gone}", root / f"cars_{gone}.tgz"]:
        if place.exists():
            place.rename(tmp_path / "gone")
    for data_dir in [root, *((root / HALVES[layout] / half).parent for _ in range(layout in HALVES))]:
        with pytest.raises(
            DataError, match=rf"one half of the images; (cars_)?{gone}/ .*missing\. verify_counts=False"
        ):
            load(data_dir, verify_counts=True)
        caplog.clear()
        splits = load(data_dir)
        assert "one half of the images" in caplog.text and "taken alone, as a subset" in caplog.text
        wanted = {IMAGES[file] for _, file in (CARS[:4] if half == "train" else CARS[4:])}
        assert {content for split in splits for _, _, content in rows_of(splits[split])} == wanted
        for split in splits:
            assert {(name, IMAGES[file]) for name, file in EXPECTED[split] if IMAGES[file] in wanted} == {
                (name, content) for name, _, content in rows_of(splits[split])
            }


def test_a_half_without_labels_is_left_out(tmp_path, load, caplog):
    root = make_layout(tmp_path / "root", "devkit")
    (root / "devkit/cars_test_annos_withlabels.mat").unlink()
    splits = load(root)
    assert "cars_test_annos_withlabels.mat are missing (the kit's cars_test_annos.mat has no classes)" in caplog.text
    assert "the other half is taken alone" in caplog.text
    assert sum(len(splits[split]) for split in splits) == 4


def test_the_archive_itself_and_one_renamed(tmp_path, load):
    root = make_layout(tmp_path / "root", "car_ims.tgz")
    check(load(root / "car_ims.tgz"), in_order=False)
    (root / "car_ims.tgz").rename(root / "car_ims (1).tgz")
    check(load(root / "car_ims (1).tgz"), in_order=False)


def test_the_order_is_the_official_one_whatever_a_file_numbers(tmp_path, load):
    names = sorted(CAR_NAMES)  # an annotation file with an order of its own
    rows = [(names.index(CAR_NAMES[class_id - 1]) + 1, f"car_ims/{file}") for class_id, file in CARS]
    root = make_layout(tmp_path / "root", "car_ims")
    write_files(root, {"cars_annos.mat": annotations(rows, names=names)})
    check(load(root))


def test_names_are_those_of_the_devkit():
    assert len(set(CAR_NAMES)) == 196 and list(CAR_NAMES) != sorted(CAR_NAMES)
    assert CAR_NAMES[0] == "AM General Hummer SUV 2000" and CAR_NAMES[195] == "smart fortwo Convertible 2012"
    assert [car_number(name) for name in CAR_NAMES] == list(range(196))
    assert car_number("Ram C-V Cargo Van Minivan 2012") == CAR_NAMES.index(RAM)
    assert car_number("Ram") is None
    file = SHARED_DATA / "splits/cars_devkit/cars_meta.mat"
    if not file.is_file():
        pytest.skip("needs the devkit")
    assert [str(name[0]) for name in loadmat(file)["class_names"][0]] == list(CAR_NAMES)


def test_missing_parts(tmp_path, load):
    def root(number, files):
        return write_files(tmp_path / str(number), files)

    def load_all(where):
        return load(where, verify_counts=True)

    images, labels = devkit()
    kit = {f"devkit/{name}": content for name, content in labels.items()}
    halves = {half: {k: v for k, v in images.items() if k.startswith(half)} for half in ("cars_train", "cars_test")}
    with pytest.raises(DataError, match=r"holds car_ims, but not cars_annos.mat, which has its classes"):
        load(root(1, {"car_ims/000001.jpg": b"x"}))
    with pytest.raises(DataError, match=r"one half of the images; cars_test/ or cars_test.tgz is missing"):
        load_all(root(2, {**halves["cars_train"], **kit}))
    unlabelled = annotations([(0, "00001.jpg")], "fname", names=None, labels=False)
    files = {**images, "devkit/cars_train_annos.mat": labels["cars_train_annos.mat"]}
    with pytest.raises(DataError, match=r"cars_test_annos_withlabels.mat are missing \(the kit's cars_test_annos.mat"):
        load_all(root(3, {**files, "devkit/cars_test_annos.mat": unlabelled}))
    with pytest.raises(DataError, match=r"withlabels.mat: its annotations have no classes; is this cars_test_annos"):
        load(root(4, {**files, "devkit/cars_test_annos_withlabels.mat": unlabelled}))
    with pytest.raises(DataError, match=r"the labels cars_train_annos.mat are missing: expected them in"):
        load(root(5, images))
    archive = write_archive(tmp_path / "6/car_ims.tgz", {"car_ims/000001.jpg": b"x"})
    with pytest.raises(DataError, match=r"cars_annos.mat, which has the classes of .*car_ims.tgz, is missing"):
        load(archive)
    archive = write_archive(tmp_path / "7/cars_train.tgz", halves["cars_train"])
    with pytest.raises(DataError, match=r"cars_train.tgz is one part of the images: give the folder that holds all"):
        load(archive)


def test_wrong_folder_and_wrong_files(tmp_path, load):
    root = make_layout(tmp_path / "high/root", "class folders")
    for low in (root / "images", root / "images" / CAR_NAMES[0]):
        with pytest.raises(DataError, match=rf"{low} is too low: did you mean {root}\?"):
            load(low)
    with pytest.raises(DataError, match=rf"high is too high: did you mean {root}\?"):
        load(tmp_path / "high")
    with pytest.raises(DataError, match=r"expected images/<class name>/, .* or car_ims/ .* in .*; found 'birds'"):
        load(write_files(tmp_path / "other", {"birds/x/1.jpg": b"x"}))
    write_files(root, {"images/Trabant 601 1964/1.jpg": b"x"})
    with pytest.raises(DataError, match=r"holds 'Trabant 601 1964', which is none of the 196 official classes"):
        load(root)
    root = make_layout(tmp_path / "annos", "car_ims")
    for content, message in (
        (b"not a matlab file", "cars_annos.mat: expected a MATLAB file with 'annotations'"),
        (annotations([(197, "car_ims/000001.jpg")]), "row 1 has the class 197; expected 1 to 196"),
        (annotations([(1, "car_ims/000001.jpg"), (0, "x.jpg")]), "row 2 has the class 0; expected 1 to 196"),
        (annotations([(1, "../000001.jpg")]), "cars_annos.mat: row 1: expected a path within the data set"),
        (annotations([(1, "car_ims/000001.jpg")], names=["Trabant"]), "'Trabant' is none of the 196 official"),
        (annotations([(1, "x.jpg")], "image"), "have no relative_im_path or fname, but"),
        (annotations([(1, "a.jpg"), (2, "a.jpg")]), "row 2: the image 'a.jpg' was named before, at .*: row 1"),
    ):
        write_files(root, {"cars_annos.mat": content})
        with pytest.raises(DataError, match=message):
            load(root)


def test_missing_images(tmp_path, load, caplog):
    root = make_layout(tmp_path / "root", "car_ims")
    (root / "car_ims/000002.jpg").unlink()
    (root / "car_ims/000003.jpg").unlink()
    with pytest.raises(DataError, match=r"2 of the 7 images that Cars-196 names are missing in .*'car_ims/000002.jpg"):
        load(root, verify_counts=True)
    splits = load(root)
    assert splits["train"].features["label"].names == ["Acura RL Sedan 2012", CAR_NAMES[97]]
    assert splits["train"]["label"][:] == [0, 1]
    assert "2 of the 7 images" in caplog.text and "they are left out" in caplog.text


def published():
    """Published images, `class name/file`, and the split of each."""
    return {
        "/".join(file.split("/")[-2:]): split
        for split in ("train", "test")
        for file, _ in split_list(f"CARS_{split}.csv")
    }


NUMBERS = {name.replace("/", "-"): number for number, name in enumerate(CAR_NAMES, 1)}


@pytest.mark.parametrize(
    "layout", ["class folders", *(pytest.param(name, marks=pytest.mark.slow) for name in ("car_ims.tgz", "halves"))]
)
def test_full_size(tmp_path, layout):
    images, origin = published(), {}
    if layout == "class folders":
        origin = {str(tmp_path / "images" / image): image for image in images}
        write_files(tmp_path, {f"images/{image}": b"" for image in images})
    elif layout == "halves":  # of one class, both halves have files of one name
        counts = Counter()
        for i, image in enumerate(images):
            half, name = ("train", "test")[i % 2], image.partition("/")[0]
            counts[half, name] += 1
            origin[f"{tmp_path}/car_data/car_data/{half}/{name}/{counts[half, name]:05d}.jpg"] = image
        write_files(tmp_path, dict.fromkeys((path.removeprefix(f"{tmp_path}/") for path in origin), b""))
    else:
        rows = [(NUMBERS[image.partition("/")[0]], f"car_ims/{i:06d}.jpg") for i, image in enumerate(images, 1)]
        origin = {f"{tmp_path}/car_ims.tgz/{path}": image for (_, path), image in zip(rows, images, strict=True)}
        write_files(tmp_path, {"cars_annos.mat": annotations(rows)})
        write_archive(tmp_path / "car_ims.tgz", {path: b"" for _, path in rows})
    listing = Cars196.list_splits(str(tmp_path), str(tmp_path / "cache"))
    found = {}
    for split, rows in listing.splits.items():
        names = listing.class_names[split]
        assert names == list(CAR_NAMES[:98] if split == "train" else CAR_NAMES[98:])
        for file, label in zip(rows.files, rows.labels, strict=True):
            found[origin[file]] = split
            assert origin[file].startswith(names[label].replace("/", "-") + "/")
    assert found == images
    assert Counter(found.values()) == {"train": 8054, "test": 8131}


def test_real_devkit(tmp_path):
    """The kit's own training labels; those of the test half are made up to fit the published counts per class."""
    kit = SHARED_DATA / "splits/cars_devkit"
    if not kit.is_dir():
        pytest.skip("needs the devkit")
    train = (kit / "cars_train_annos.mat").read_bytes()
    ids = [int(row["class"]) for row in loadmat(io.BytesIO(train), simplify_cells=True)["annotations"]]
    counts = Counter(NUMBERS[image.partition("/")[0]] for image in published())
    rest = counts - Counter(ids)
    assert rest.total() == 8041
    rows = [(class_id, f"{i:05d}.jpg") for i, class_id in enumerate(sorted(rest.elements()), 1)]
    write_files(
        tmp_path,
        {
            "devkit/cars_train_annos.mat": train,
            "cars_test_annos_withlabels.mat": annotations(rows, "fname", names=None),
            **{f"cars_train/{i:05d}.jpg": b"" for i in range(1, 8145)},
            **{f"cars_test/{i:05d}.jpg": b"" for i in range(1, 8042)},
        },
    )
    listing = Cars196.list_splits(str(tmp_path))
    assert listing.counts("train") == (8054, 98) and listing.counts("test") == (8131, 98)
    found = {}
    for split, split_rows in listing.splits.items():
        names = listing.class_names[split]
        found |= {file: names[label] for file, label in zip(split_rows.files, split_rows.labels, strict=True)}
    assert [found[f"{tmp_path}/cars_train/{i:05d}.jpg"] for i in range(1, 8145)] == [CAR_NAMES[i - 1] for i in ids]
