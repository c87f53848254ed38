"""What an image's place says of its class and its split, the same everywhere; and what is no data."""

import logging

import pytest
from data_fixtures import jpeg_bytes, write_classes, write_files, write_image

from vptsp import DataArguments, DataError, check_data_arguments, check_output_apart, load_splits, train
from vptsp.data_scripts.image_files import list_images
from vptsp.search.image_sources import folder_source, list_source
from vptsp.training.output_folder import OutputFolderError, check_output_folder


def classes_of(source):
    return {name: source.class_name(row) for row, name in enumerate(source.ids)}


def classes_in_training(root, **options):
    found = {}
    for split in load_splits("folder", root, **options).values():
        names = split.features["label"].names
        found |= {row["image"]["path"].removeprefix(f"{root}/"): names[row["label"]] for row in split}
    return found


# ---- the same classes everywhere


def test_folders_in_a_class_folder(tmp_path):
    root = write_files(
        tmp_path / "photos",
        dict.fromkeys(["a/front/1.jpg", "a/back/deep/2.jpg", "a/3.jpg", "b/front/1.jpg"], jpeg_bytes()),
    )
    assert classes_of(folder_source(root)) == classes_in_training(root)
    assert set(classes_of(folder_source(root)).values()) == {"a", "b"}
    for place in (root, tmp_path):  # a list in the folder of the class folders, and one elsewhere
        prefix = "" if place == root else "photos/"
        (place / "list.txt").write_text("".join(f"{prefix}{name}\n" for name in classes_in_training(root)))
        found = {name.removeprefix("photos/"): c for name, c in classes_of(list_source(place / "list.txt")).items()}
        assert found == classes_in_training(root)
    assert list_source(tmp_path / "list.txt").description.endswith(f"classes are the folders in {root}")
    (tmp_path / "one.txt").write_text("photos/a/3.jpg\nphotos/a/front/1.jpg\n")
    assert classes_of(list_source(tmp_path / "one.txt")) == {"photos/a/3.jpg": "a", "photos/a/front/1.jpg": "a"}


@pytest.mark.parametrize("layout", ["train_test", "query_gallery"])
def test_folders_of_splits(tmp_path, layout):
    splits = {"train": {"x": 1}, "test": {"y": 2}}
    if layout == "query_gallery":
        splits = {"train": {"x": 1}, "query": {"y": 1}, "gallery": {"y": 2, "z": 1}}
    for name, counts in splits.items():
        write_classes(tmp_path / "root" / name, counts)
    found = classes_of(folder_source(tmp_path / "root"))
    assert found == classes_in_training(tmp_path / "root")
    write_image(tmp_path / "root/extra/w/1.png")
    write_image(tmp_path / "root/train/loose.png")
    found = classes_of(folder_source(tmp_path / "root"))
    assert found["extra/w/1.png"] == found["train/loose.png"] == "" and found["train/x/000.png"] == "x"


# ---- splits are no classes


@pytest.mark.parametrize(
    "layout, folders, advice",
    [
        ("classes", ("train", "test"), "expected layout='train_test'"),
        ("classes", ("Train", "Test", "roses"), "'Test', 'Train' among its folders; expected layout='train_test'"),
        ("classes", ("query", "gallery", "train"), "expected layout='query_gallery'"),
        *(
            (layout, folders, advice)
            for layout in ("classes", "auto")
            for folders, advice in [
                (("train", "val", "roses"), "expected train and test, or train, query and gallery"),
                (("train", "validation"), "has only 'train', 'validation'; expected train and test"),
                (("query", "gallery"), "has only 'gallery', 'query'"),
                (("valid",), "has only 'valid'"),
            ]
        ),
    ],
)
def test_splits_never_become_classes(tmp_path, layout, folders, advice):
    root = write_classes(tmp_path / "root", dict.fromkeys(folders, 1))
    for load in (
        lambda: load_splits("folder", root, layout=layout),
        lambda: check_data_arguments(DataArguments(data_dir=str(root), layout=layout)),
    ):
        with pytest.raises(DataError, match=rf"{advice}.*If these are the names of classes and not of splits"):
            load()


@pytest.mark.parametrize(
    "folders",
    [
        ("cars_train", "cars_test"),
        ("train_set", "test set", "test_set"),
        ("Train2018", "val2018"),
        ("my-train", "My-Test"),
    ],
)
def test_names_that_differ_in_the_word_for_a_split_are_splits(tmp_path, folders):
    for others in ((), ("rose",)):
        root = write_classes(tmp_path / f"root{len(others)}", dict.fromkeys(folders + others, 1))
        for layout in ("auto", "classes"):
            with pytest.raises(DataError, match=r"expected train and test, or .*If these are the names of classes"):
                load_splits("folder", root, layout=layout)


def test_words_for_splits_in_names_of_classes(tmp_path):
    names = {"bullet train", "freight train", "blood test", "test tube", "dev board", "query"}
    root = write_classes(tmp_path / "root", dict.fromkeys(sorted(names), 1))
    assert set(classes_in_training(root).values()) == names
    assert set(classes_of(folder_source(root)).values()) == names


@pytest.mark.parametrize("below", ["", "deep/"])
def test_splits_one_folder_further_down_never_become_classes(tmp_path, below, caplog):
    """Alone, or beside others, whose images would all be of one class."""
    root = tmp_path / "root"
    for split, names in (("train", {"x": 1, "y": 1}), ("test", {"z": 2})):
        write_classes(root / below / "flowers" / split, names)
    with pytest.raises(DataError, match=r"seems to be too high: .*the class folders \('test', 'train'\) .*/flowers\?"):
        load_splits("folder", root)
    write_classes(root / "extra", {"w": 1})
    write_classes(root / "extra2", {"w": 1})
    message = (
        f"the folder '{below}flowers' holds 'test', 'train', and the class '{below[:-1] or 'flowers'}' would join"
    )
    with pytest.raises(DataError, match=message):
        load_splits("folder", root)
    folder_source(root)
    assert message in caplog.text
    assert set(load_splits("folder", root / below / "flowers")) == {"train", "test"}


def test_images_in_the_folders_of_splits_are_in_no_class(tmp_path):
    for split in ("train", "test"):
        write_image(tmp_path / "root" / split / "1.png")
    with pytest.raises(
        DataError, match=r"train holds 1 images \(1.png, ...\) but no class folders; .* images inside$"
    ):
        load_splits("folder", tmp_path / "root")  # and nothing that says to give the folder that was given


def test_a_class_may_be_called_train(tmp_path):
    root = write_classes(tmp_path / "root", {"car": 1, "plane": 1, "train": 1})
    assert set(classes_in_training(root).values()) == {"car", "plane", "train"}
    assert set(classes_of(folder_source(root)).values()) == {"car", "plane", "train"}


def test_images_beside_the_splits_are_said_to_be_left_out(tmp_path, caplog):
    root = tmp_path / "root"
    write_classes(root / "train", {"x": 1})
    write_classes(root / "test", {"y": 1, "z": 1})
    write_image(root / "1.png")
    load_splits("folder", root)
    assert "root: 1 images lie beside the folders of the splits and are left out" in caplog.text


# ---- links


def test_a_link_to_a_folder_above_adds_no_images(tmp_path, caplog):
    root = write_classes(tmp_path / "root", {"a": 2, "b": 1, "c": 1})
    before = classes_in_training(root)
    (root / "a/above").symlink_to(root)
    (root / "a/further").symlink_to(tmp_path)
    (root / "a/sister").symlink_to(root / "c")
    (root / "b/outside").symlink_to(write_classes(tmp_path / "elsewhere", {"d": 2}))
    with caplog.at_level(logging.WARNING):
        assert classes_in_training(root) == before
    assert "root: 4 links to folders are not followed, left out: " in caplog.text
    assert f"{root / 'a/above'} -> {root}" in caplog.text
    assert classes_of(folder_source(root)) == before
    assert len(list_images(root, follow_links=True)) == 4 + 1 + 2  # c once more, d; none round


def test_a_class_folder_or_a_split_that_is_a_link_is_refused(tmp_path):
    root = write_classes(tmp_path / "root", {"a": 1, "b": 1})
    (root / "c").symlink_to(root / "a")
    with pytest.raises(DataError, match=rf"{root}/c is a link to the folder {root}/a, .*\(1 such links\); expected"):
        load_splits("folder", root)
    write_classes(tmp_path / "two/train", {"x": 1})
    write_classes(tmp_path / "two/query", {"y": 1})
    for target in (tmp_path / "two/query", tmp_path / "two/query/y"):
        (tmp_path / "two/gallery").symlink_to(target)
        with pytest.raises(DataError, match=r"two/gallery is a link into .*two/query: their images would be in both"):
            load_splits("folder", tmp_path / "two")
        (tmp_path / "two/gallery").unlink()
    (tmp_path / "two/gallery").symlink_to(
        write_classes(tmp_path / "disk2", {"y": 1})
    )  # a whole split may lie elsewhere
    assert load_splits("folder", tmp_path / "two")["gallery"].num_rows == 1


# ---- what an earlier run wrote


def test_pictures_of_an_earlier_run_are_no_data(tmp_path, backbone_folder, capsys, caplog):
    root = write_classes(tmp_path / "root", {"a": 2, "b": 2})
    for output in (root, root / "run", root / "a/deep/run"):
        args = DataArguments(data_dir=str(root))
        with pytest.raises(DataError, match=rf"output_dir {output} lies in data_dir {root}, where pictures"):
            check_output_apart(args, output)
        with pytest.raises(SystemExit):
            train.main(["--data_dir", str(root), "--output_dir", str(output), "--backbone", str(backbone_folder)])
        assert "lies in data_dir" in capsys.readouterr().err
        write_files(output, {"all_results.json": "{}", "pictures/map.png": b"x"})
        for load in (lambda: load_splits("folder", root), lambda: folder_source(root)):
            if output == root:
                with pytest.raises(DataError, match=rf"{output} is the output_dir of a training run"):
                    load()
            else:
                caplog.clear()
                load()
                what = f"1 folders are no data and are left out: {output} is the output_dir of a training run"
                assert what in caplog.text
                assert not [path for path in classes_of(folder_source(root)) if "pictures" in path]
        (output / "all_results.json").unlink()
        (output / "pictures/map.png").unlink()
    check_output_apart(DataArguments(data_dir=str(root)), tmp_path / "root2")
    check_output_apart(DataArguments(dataset_name="cub", data_dir=str(root)), root / "run")
    check_output_apart(DataArguments(dataset_name="digits"), root)


OURS = {
    "store": {"store.json": '{"format_version": 1, "image_root": null}', "a.png": jpeg_bytes()},
    "index": {"index.json": '{"format_version": 1, "image_root": null}', "a.png": jpeg_bytes()},
    "space": {"vptsp_space.json": "{}", "images/a/1.jpg": jpeg_bytes()},
    "run": {"all_results.json": "{}", "pictures/map.png": jpeg_bytes()},
}


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("place", ["zz", "a/deep/zz", "train/zz"])
def test_what_this_package_wrote_is_no_data(tmp_path, kind, place, caplog):
    splits = place.startswith("train")
    names = ["train/x/1.jpg", "test/y/1.jpg"] if splits else ["a/1.jpg", "b/1.jpg"]
    root = write_files(tmp_path / "root", dict.fromkeys(names, jpeg_bytes()))
    write_files(root / place, OURS[kind])
    assert set(classes_in_training(root)) == set(names)
    assert f"1 folders are no data and are left out: {root / place} is " in caplog.text
    caplog.clear()
    assert set(classes_of(folder_source(root))) == set(names)
    assert f"1 folders are no data and are left out: {root / place} is " in caplog.text
    for load in (classes_in_training, folder_source):
        with pytest.raises(DataError, match=rf"{root / place} is .*, whose pictures would be taken for data"):
            load(root / place)


def test_a_file_of_the_same_name_is_no_mark(tmp_path):
    root = write_files(tmp_path / "root", dict.fromkeys(["a/1.jpg", "b/1.jpg"], jpeg_bytes()))
    write_files(root / "a", {"index.json": "[]", "store.json": "{"})
    assert set(classes_of(folder_source(root))) == {"a/1.jpg", "b/1.jpg"}


@pytest.mark.parametrize("kind", ["store", "index", "space"])
def test_a_run_does_not_write_into_what_is_there(tmp_path, kind):
    write_files(tmp_path / "there", OURS[kind])
    with pytest.raises(OutputFolderError, match=rf"output_dir {tmp_path}/there is a.*Give another one"):
        check_output_folder(tmp_path / "there", overwrite=True)


def test_a_list_of_images_of_one_class(tmp_path):
    """In the folder of the class folders, or above it: the classes are those that training would find."""
    names = ["a/front/1.jpg", "a/back/2.jpg", "b/front/1.jpg"]
    root = write_files(tmp_path / "photos", dict.fromkeys(names, jpeg_bytes()))
    for place, prefix in ((root, ""), (tmp_path, "photos/")):
        (place / "list.txt").write_text("".join(f"{prefix}{name}\n" for name in names[:2]))
        assert set(classes_of(list_source(place / "list.txt")).values()) == {"a"}
    write_files(tmp_path / "runs", OURS["run"])  # no class
    assert set(classes_of(list_source(tmp_path / "list.txt")).values()) == {"a"}


def test_images_beside_the_class_folders_are_named(tmp_path, caplog):
    loose = [f"{number}.jpg" for number in range(7)]
    root = write_files(tmp_path / "root", dict.fromkeys(["a/1.jpg", "b/1.jpg", *loose], jpeg_bytes()))
    assert set(classes_in_training(root)) == {"a/1.jpg", "b/1.jpg"}
    named = "'0.jpg', '1.jpg', '2.jpg', '3.jpg', '4.jpg' and 2 more"
    assert f"{root}: 7 images lie beside the class folders and are left out: {named}" in caplog.text
    caplog.clear()
    assert classes_of(folder_source(root))["3.jpg"] in (None, "")
    assert f"{root}: 7 images lie beside the class folders and have no class: {named}" in caplog.text
    caplog.clear()
    folder_source(write_files(tmp_path / "flat", dict.fromkeys(loose, jpeg_bytes())))
    assert "beside" not in caplog.text
