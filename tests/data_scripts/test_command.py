import io
import subprocess
import sys
from collections import Counter

import datasets
import numpy as np
import pytest
from data_fixtures import jpeg_bytes, write_archive, write_classes, write_files, write_image
from PIL import Image

from vptsp.data_scripts.command_check import main
from vptsp.data_scripts.contact_sheet import COLUMNS, Cell, Section, _wrap, draw_contact_sheet, spread
from vptsp.data_scripts.dataset_report import SplitView, _shares, class_size_histogram, contact_sheet, count_table


SOLID = {"a": (255, 0, 0), "b": (0, 160, 0), "c": (0, 0, 255), "d": (200, 200, 0)}


@pytest.fixture
def flowers(tmp_path):
    """Four classes of 1 to 4 images, each of one colour."""
    for count, (name, colour) in enumerate(SOLID.items(), 1):
        for i in range(count):
            (tmp_path / "flowers" / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 20), colour).save(tmp_path / "flowers" / name / f"{i}.png")
    return tmp_path / "flowers"


def colours(picture):
    """How often each colour occurs in a picture."""
    image = Image.open(picture) if not isinstance(picture, Image.Image) else picture
    return {colour: count for count, colour in image.getcolors(1 << 20)}


def test_a_folder(flowers, tmp_path, capsys):
    picture = tmp_path / "sheet.png"
    assert main(["folder", "--data_dir", str(flowers), "--picture", str(picture), "--decode"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.splitlines() == [
        f"folder in {flowers}: any folder of class folders; classes split here, or train/test, or train/query/gallery "
        "folders",
        "",
        "split  images  classes  per class: least  median  mean  most",
        "train       3        2                 1     1.5   1.5     2",
        "test        7        2                 3     3.5   3.5     4",
        "",
        "Images per class, number of classes (train)",
        "1  1  ########################################",
        "2  1  ########################################",
        "",
        "Images per class, number of classes (test)",
        "3  1  ########################################",
        "4  1  ########################################",
        "",
        f"Picture of 4 classes: {picture}",
        "All 10 images can be read.",
    ]
    shown = colours(picture)
    assert all(shown[colour] == 150 * 75 for colour in SOLID.values())  # whole images, 150 wide
    assert not list(tmp_path.rglob("*.arrow"))


def test_options_reach_the_data_set(flowers, tmp_path, capsys):
    words = ["folder", "--data_dir", str(flowers), "--picture", str(tmp_path / "x.jpg"), "--max_classes", "2"]
    assert main([*words, "--train_classes", "d", "--test_classes", "a", "c"]) == 0
    out = capsys.readouterr().out
    assert "train       4        1" in out and "test        4        2" in out
    assert Image.open(tmp_path / "x.jpg").format == "JPEG"
    assert main([*words[:-2], "--max_classes", "0", "--class_split", "alternate"]) == 0
    out = capsys.readouterr().out
    assert "train       4        2" in out and "Picture" not in out


def test_labels_that_training_would_put_away_are_said(capsys):
    assert main(["digits", "--labels", "none", "--max_classes", "0"]) == 0
    assert "training with labels none puts those of train away" in capsys.readouterr().out


def test_an_archive_and_verify_counts(tmp_path, capsys):
    members = {f"CUB_200_2011/images/{i:03d}.Bird_{i}/{i}.jpg": jpeg_bytes(i) for i in (1, 2, 101, 102, 103)}
    archive = write_archive(tmp_path / "CUB_200_2011.tgz", members)
    words = ["cub", "--data_dir", str(archive), "--data_cache_dir", str(tmp_path / "cache")]
    words += ["--picture", str(tmp_path / "cub.png")]
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("error: CUB-200-2011 in ") and "expected 5,864 of 100" in captured.err
    assert main([*words, "--verify_counts", "false", "--decode"]) == 0
    out = capsys.readouterr().out
    assert "test        3        3" in out and "All 5 images can be read." in out
    assert not list((tmp_path / "cache").rglob("*.arrow"))


def test_query_and_gallery_and_digits_and_hub(tmp_path, capsys, monkeypatch):
    for split, classes in (("train", "ab"), ("query", "cd"), ("gallery", "cd")):
        write_classes(tmp_path / "shop" / split, dict.fromkeys(classes, 1))
    monkeypatch.chdir(tmp_path)
    assert main(["folder", "--data_dir", "shop"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[3:6]] == ["train", "query", "gallery"]
    assert (tmp_path / "folder.png").is_file()
    assert main(["digits", "--max_classes", "4", "--digit_size", "16"]) == 0
    assert "train     901        5               177     181  180.2   183" in capsys.readouterr().out
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    rows = {"image": [{"path": None, "bytes": jpeg_bytes(i)} for i in range(3)], "label": ["x", "y", "y"]}
    (tmp_path / "repository").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "repository/train.parquet")
    words = ["hub", "--data_dir", "repository", "--data_cache_dir", "cache", "--decode"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "test        2        1" in out and "All 3 images can be read." in out


def test_images_that_cannot_be_read(flowers, tmp_path, capsys):
    (flowers / "a/0.png").write_bytes((flowers / "a/0.png").read_bytes()[:50])
    (flowers / "d/3.png").write_bytes(b"")
    words = ["folder", "--data_dir", str(flowers), "--picture", str(tmp_path / "sheet.png")]
    assert main(words) == 1  # the first of its class is in the picture
    captured = capsys.readouterr()
    assert f"error: 1 of the images can't be read:\n  {flowers}/a/0.png: can't read this image" in captured.err
    assert SOLID["a"] not in colours(tmp_path / "sheet.png") and SOLID["b"] in colours(tmp_path / "sheet.png")
    assert (196, 60, 50) in colours(tmp_path / "sheet.png")  # crossed out
    assert main([*words, "--decode"]) == 1
    captured = capsys.readouterr()
    assert "error: 2 of the images can't be read:\n" in captured.err and "d/3.png" in captured.err
    assert "can be read" not in captured.out


@pytest.mark.parametrize(
    "words, message",
    [
        (["birds"], "unknown dataset_name 'birds'"),
        (["folder"], "data_dir is missing"),
        (["folder", "--data_dir", "absent"], "does not exist"),
        (["cub", "--data_dir", "flowers"], "expected images, CUB_200_2011/images, "),
        (["cub", "--data_dir", "flowers/a/0.png"], "is neither a zip nor a tar file"),
        (["folder", "--data_dir", "flowers", "--test_share", "2"], "test_share must be between 0 and 1"),
        (["folder", "--data_dir", "flowers", "--digit_size", "16"], "'folder' has no option 'digit_size'"),
        (["folder", "--data_dir", "flowers", "--picture", "x.txt"], "picture must end in .png, .jpg or .webp"),
        (["folder", "--data_dir", "flowers", "--picture", "no/x.png"], "picture: there is no folder no"),
        (["folder", "--data_dir", "flowers", "--picture", "flowers/x.png/.png"], "picture must end in .png"),
        (["folder", "--data_dir", "flowers", "--train_classes", "z"], "train_classes names unknown classes: 'z'"),
        (["hub"], "give either dataset_repo"),
        (["hub", "--data_dir", "flowers", "--dataset_config", "x"], "can't load the data set"),
    ],
)
def test_errors_are_one_line(flowers, words, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    (flowers / "x.png").mkdir()
    write_image(flowers / "x.png" / "0.png")
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert message in captured.err


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "the following arguments are required: NAME"),
        (["folder", "--colour", "red"], "unrecognized arguments: --colour red"),
        (["folder", "--test_share", "half"], "argument --test_share: invalid float value: 'half'"),
        (["folder", "--verify_counts", "maybe"], "argument --verify_counts: expected true or false, got 'maybe'"),
    ],
)
def test_usage_errors(words, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"error: {message} (--help-all lists the options)\n"


def test_a_picture_that_cannot_be_written(flowers, tmp_path, capsys):
    (tmp_path / "taken.png").mkdir()
    assert main(["folder", "--data_dir", str(flowers), "--picture", str(tmp_path / "taken.png")]) == 2
    assert "error: can't write the picture" in capsys.readouterr().err


def test_as_a_module(flowers, tmp_path):
    command = [sys.executable, "-m", "vptsp.cli", "check", "folder", "--data_dir"]
    done = subprocess.run([*command, str(flowers)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "Picture of 4 classes: folder.png" in done.stdout
    done = subprocess.run([*command, str(flowers / "a")], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    done = subprocess.run([*command[:4], "--help-all"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "--dataset_repo" in done.stdout and "CUB-200-2011" in done.stdout


# ---- the parts


def brute_force(sizes, text):
    """Every line of a histogram counts what it says."""
    total, last = 0, -1
    for line in text.splitlines():
        name, count, *bar = line.split()
        low, _, high = name.replace(",", "").partition("-")
        low, high = int(low), int(high or low)
        assert low > last
        last = high
        assert int(count.replace(",", "")) == sum(low <= size <= high for size in sizes)
        assert bool(bar) == (count != "0") and set("".join(bar)) <= {"#"} and len("".join(bar)) <= 40
        total += int(count.replace(",", ""))
    assert total == len(sizes)


@pytest.mark.parametrize(
    "low, high, count", [(1, 1, 1), (1, 9, 30), (40, 60, 100), (1, 5000, 3000), (2, 101, 9), (3, 150, 50)]
)
def test_histogram(low, high, count):
    sizes = np.random.default_rng(0).integers(low, high + 1, count).tolist()
    text = class_size_histogram(sizes)
    brute_force(sizes, text)
    assert len(text.splitlines()) <= 13


def test_histogram_by_hand():
    """Ranges that double, as the largest class is more than 50 times the smallest."""
    assert class_size_histogram([1, 2, 2, 60, 1000]).splitlines() == [
        "        1  1  ####################",
        "      2-3  2  ########################################",
        "      4-7  0",
        "     8-15  0",
        "    16-31  0",
        "    32-63  1  ####################",
        "   64-127  0",
        "  128-255  0",
        "  256-511  0",
        "512-1,023  1  ####################",
    ]


def test_count_table():
    views = {"train": SplitView([0] * 1200 + [1], ["a", "b"], None), "test": SplitView([], ["c"], None)}
    assert count_table(views).splitlines() == [
        "split  images  classes  per class: least  median   mean   most",
        "train   1,201        2                 1   600.5  600.5  1,200",
        "test        0        0                 0       0    0.0      0",
    ]


def test_spread_and_shares():
    assert spread(5, 8) == [0, 1, 2, 3, 4]
    assert spread(9, 3) == [0, 4, 8]
    assert spread(7, 1) == [0]
    for count in (64, 65, 100, 11318):
        picked = spread(count, 64)
        assert len(set(picked)) == 64 and picked[0] == 0 and picked[-1] == count - 1
        assert max(np.diff(picked)) - min(np.diff(picked)) <= 1
    assert _shares([100, 100], 64) == [32, 32]
    assert _shares([5, 100], 64) == [5, 59]
    assert sorted(_shares([3997, 3985, 3985], 64)) == [21, 21, 22]
    assert _shares([10, 10, 10], 2) == [1, 1, 1]


def test_sheet_shows_the_first_image_of_each_class():
    rng = np.random.default_rng(0)
    solid = [tuple(int(x) for x in rng.integers(0, 256, 3)) for _ in range(20)]
    labels = [label for label in range(10) for _ in range(2)]
    asked = []

    def read(rows):
        asked.extend(rows)
        for row in reversed(rows):  # in any order
            stream = io.BytesIO()
            Image.new("RGB", (30, 60), solid[row]).save(stream, "PNG")
            yield row, {"path": None, "bytes": stream.getvalue()}

    sheet, unreadable = contact_sheet({"train": SplitView(labels, list("abcdefghij"), read)}, max_classes=4)
    assert asked == [0, 6, 12, 18] and unreadable == []
    shown = Counter(colours(sheet))
    assert all(shown[solid[row]] == 75 * 150 for row in asked)
    assert not any(solid[row] in shown for row in range(20) if row not in asked)


def test_captions_and_size():
    cells = [Cell(None, "x", "1 image")] * 10
    sheet = draw_contact_sheet([Section("train", "remark", cells)])
    assert sheet.width == 2 * 24 + COLUMNS * 150 + (COLUMNS - 1) * 10
    narrow = draw_contact_sheet([Section("train", "a remark that is much wider than the only image below", cells[:1])])
    assert narrow.width > 300 and narrow.height < sheet.height

    class Font:
        def getlength(self, text):
            return len(text)

    assert _wrap("Mild-Low-Fat-Yoghurt", Font(), 10, 2) == ["Mild-Low-", "Fat-Yoghu…"]
    assert _wrap("Mild-Low-Fat-Yoghurt", Font(), 13, 2) == ["Mild-Low-Fat-", "Yoghurt"]
    assert _wrap("one two", Font(), 10, 2) == ["one two"]
    assert _wrap("abcdefghijklmnopqrstuvwxyz", Font(), 10, 2) == ["abcdefghij", "klmnopqrs…"]
    assert _wrap("", Font(), 10, 2) == []


def test_letters_beyond_ascii_are_drawn():
    """Each has a shape of its own, and not the box that stands for a letter which a font has not."""
    shapes = set()
    for letter in "\uffffAÄßéøЖΩ":
        sheet = draw_contact_sheet([Section("x", "", [Cell(Image.new("RGB", (9, 9)), letter, "")])])
        shapes.add(sheet.tobytes())
    assert len(shapes) == 8


def test_names_in_other_scripts(tmp_path, capsys):
    root = write_files(tmp_path / "plants", {f"{name}/1.jpg": jpeg_bytes(0) for name in ("Äpfel", "梨", "سیب", "🍒")})
    assert main(["folder", "--data_dir", str(root), "--picture", str(tmp_path / "x.png")]) == 0
    assert "Picture of 4 classes" in capsys.readouterr().out
