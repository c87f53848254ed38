"""Pictures of neighbours: what is drawn, read back from the file, and which queries are chosen."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image

from vptsp.eval import pictures
from vptsp.eval.pictures import choose_queries, save_neighbour_grid


BLUE, YELLOW = (20, 40, 200), (240, 220, 40)


def flat(colour, size=(8, 8)):
    return Image.new("RGB", size, colour)


def draw(path, hits=((True, False),), **changes):
    rows, columns = np.shape(hits)
    arguments = {
        "query_images": [flat(BLUE)] * rows,
        "neighbour_images": [[flat(YELLOW)] * columns] * rows,
        "query_names": ["query class"] * rows,
        "neighbour_names": [["class"] * columns] * rows,
        "similarity": torch.full((rows, columns), 0.5),
        "correct": torch.tensor(hits),
    }
    return save_neighbour_grid(path, **{**arguments, **changes})


def where(path, colour):
    """Columns and rows of the pixels of one colour, in a file."""
    wanted = np.array(to_rgb(colour)) * 255 if isinstance(colour, str) else np.array(colour)
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(float)
    rows, columns = np.nonzero((abs(pixels - wanted) < 3).all(-1))
    return columns, rows


def test_frames_tell_correct_from_wrong_and_stand_in_order(tmp_path):
    path = draw(tmp_path / "grid.png", hits=((True, False), (False, True)))
    assert path == tmp_path / "grid.png"
    width, height = Image.open(path).size
    query, _ = where(path, BLUE)
    assert query.max() < width / 3
    green = set(zip(*(part.tolist() for part in where(path, pictures.CORRECT_COLOUR)), strict=True))
    red = set(zip(*(part.tolist() for part in where(path, pictures.WRONG_COLOUR)), strict=True))

    def quarter(points, right, lower):
        left_edge = 0.35 * width
        middle = left_edge + (width - left_edge) / 2
        return sum((x > middle) == right and (y > height / 2) == lower for x, y in points)

    for points, places in ((green, [(False, False), (True, True)]), (red, [(True, False), (False, True)])):
        inside = [quarter(points, *place) for place in places]
        assert min(inside) > 500
        assert sum(inside) == len(points)


def test_signs_tell_correct_from_wrong_without_colour(tmp_path):
    written = draw(tmp_path / "grid.svg").read_text(encoding="utf-8")
    assert pictures.CORRECT_SIGN in written
    assert pictures.WRONG_SIGN in written
    both = draw(tmp_path / "right.svg", hits=((True, True),)).read_text(encoding="utf-8")
    assert pictures.WRONG_SIGN not in both


def test_names_similarities_and_title_are_written(tmp_path):
    svg = draw(
        tmp_path / "grid.svg",
        query_names=["Laysan albatross"],
        neighbour_names=[["$a_b$", "two\nlines"]],
        similarity=[[0.98765, -0.25]],
        title="Unseen classes",
    ).read_text(encoding="utf-8")
    for text in ("Laysan albatross", "$a_b$", "two lines", "0.988", "−0.250", "Unseen classes", "query"):
        assert text in svg


def test_names_and_titles_are_broken_and_not_cut(tmp_path):
    long = "Garant-Ecological-Standard-Milk-with-a-long-name"
    word = "Donaudampfschifffahrtsgesellschaft" * 2
    path = tmp_path / "grid.svg"
    svg = draw(path, neighbour_names=[[long, word]], query_names=[long], title=50 * "title ").read_text("utf-8")
    texts = re.findall("<!-- (.*?) -->", svg)
    assert "…" not in svg
    joined = "".join(texts)
    assert joined.count(long) == 2 and word in joined
    assert " ".join(texts).count("title") == 50
    assert len(texts) > 10


def test_a_row_is_as_tall_as_its_longest_name(tmp_path):
    short, tall = (Image.open(draw(tmp_path / f"{n}.png", query_names=["word " * n], dpi=100)).height for n in (1, 20))
    lines = len(wrapped("word " * 20)) - 1
    assert tall - short == pytest.approx(100 * lines * pictures._LINE, abs=1)


def wrapped(text, room=pictures._CELL + pictures._GAP / 2, size=7.5):
    return pictures.wrap(text, room, pictures.new_figure(1, 1, dpi=100), pictures.font(size, "bold"))


@pytest.mark.parametrize("limit", range(1, 12))
@pytest.mark.parametrize("text", ["Brown - Cap", "Donaudampfschiff", "a/b_c.d", "", " x", "a  b"])
def test_lines_fit_and_nothing_is_left_out(text, limit):
    lines = pictures._wrap(text.strip(), lambda line: len(line) > limit)
    assert all(len(line) <= limit for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert all(line == line.strip() for line in lines)


def test_lines_break_at_words():
    assert pictures._wrap("one two three", lambda line: len(line) > 7) == ["one two", "three"]
    assert pictures._wrap("Garant-Standard-Milk", lambda line: len(line) > 9) == ["Garant-", "Standard-", "Milk"]


def test_small_images_keep_sharp_pixels(tmp_path):
    checks = (np.indices((8, 8)).sum(0) % 2 * 255).astype(np.uint8)
    path = draw(tmp_path / "grid.png", query_images=[checks], hits=((True,),))
    pixels = np.asarray(Image.open(path).convert("L")).astype(int)
    # inside the query's cell, between its frame and its middle
    side = round(pictures._CELL * 150)
    left, top = round(pictures._MARGIN * 150), round((pictures._MARGIN + pictures._HEAD) * 150)
    cell = pixels[top + 8 : top + side - 8, left + 8 : left + side - 8]
    assert np.isin(cell, (0, 255)).mean() > 0.85  # blurred, hardly a pixel would be black or white
    assert 0.4 < (cell > 127).mean() < 0.6


def test_images_keep_their_shape():
    for size, expected in (((8, 8), (180, 180)), ((400, 200), (180, 90)), ((1, 500), (1, 180))):
        assert pictures._fit(flat(BLUE, size), 180).size == expected


@pytest.mark.parametrize(
    "image",
    [
        np.full((8, 8), 90, np.uint8),
        np.full((8, 8, 1), 90, np.uint8),
        np.full((8, 8, 3), 90, np.uint8),
        np.concatenate([np.full((8, 8, 3), 90, np.uint8), np.full((8, 8, 1), 255, np.uint8)], axis=2),
        Image.new("L", (8, 8), 90),
        Image.new("RGBA", (8, 8), (90, 90, 90, 255)),
    ],
)
def test_kinds_of_images(image):
    rgb = pictures._to_rgb(image)
    assert rgb.mode == "RGB"
    assert rgb.size == (8, 8)
    assert rgb.getpixel((3, 3)) == (90, 90, 90)


def test_makes_the_folder_and_other_formats(tmp_path):
    path = draw(str(tmp_path / "new" / "folder" / "grid.pdf"))
    assert isinstance(path, Path)
    assert path.read_bytes().startswith(b"%PDF")


def test_needs_no_display_and_leaves_pyplot_alone(tmp_path):
    code = (
        "import sys, numpy as np\n"
        "from vptsp import save_neighbour_grid\n"
        "assert 'matplotlib' not in sys.modules\n"
        "image = np.zeros((8, 8), np.uint8)\n"
        "save_neighbour_grid(sys.argv[1], [image], [[image]], ['a'], [['b']], [[0.1]], [[False]])\n"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "MPLBACKEND": "tkagg"}
    command = [sys.executable, "-c", code, str(tmp_path / "grid.png")]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"
    assert (tmp_path / "grid.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query_images": []}, ValueError, "query_images must have one entry per query, 1, got 0"),
        ({"query_names": ["a", "b"]}, ValueError, "query_names must have one entry per query, 1, got 2"),
        (
            {"neighbour_images": [[flat(BLUE)]]},
            ValueError,
            r"neighbour_images must have 1 rows of 2, got rows of \[1\]",
        ),
        ({"neighbour_names": []}, ValueError, r"neighbour_names must have 1 rows of 2, got rows of \[\]"),
        ({"similarity": np.zeros((0, 3))}, ValueError, r"neither of them 0, got \(0, 3\)"),
        ({"similarity": [0.5, 0.5]}, ValueError, r"shape \(queries, neighbours\).*got \(2,\)"),
        ({"correct": [[True]]}, ValueError, r"correct must have similarity's shape \(1, 2\), got \(1, 1\)"),
        ({"query_images": [np.zeros((8, 8))]}, TypeError, r"PIL image or a uint8 array, got float64"),
        ({"query_images": ["image.png"]}, TypeError, r"PIL image or a uint8 array, got str"),
        ({"query_images": [np.zeros((8, 8, 2), np.uint8)]}, ValueError, r"1, 3 or 4\), got \(8, 8, 2\)"),
        ({"query_images": [np.zeros((0, 8), np.uint8)]}, ValueError, r"got \(0, 8\)"),
    ],
)
def test_refuses_what_doesn_t_fit_together(tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        draw(tmp_path / "grid.png", **changes)
    assert not (tmp_path / "grid.png").exists()


def test_chosen_queries_are_spread_over_classes():
    labels = torch.tensor([3] * 50 + [1] * 2 + [8] * 30 + [5])
    for seed in range(5):
        chosen = choose_queries(labels, 4, seed)
        assert sorted(labels[chosen].tolist()) == [1, 3, 5, 8]
    chosen = choose_queries(labels, 9, seed=0)
    assert len(set(chosen)) == 9
    assert sorted(labels[chosen].tolist()) == [1, 1, 3, 3, 3, 5, 8, 8, 8]
    assert sorted(choose_queries(labels, 83)) == list(range(83))


def test_chosen_queries_follow_from_the_seed():
    labels = [index % 7 for index in range(70)]
    assert choose_queries(labels, 5, seed=3) == choose_queries(labels, 5, seed=3)
    assert len({tuple(choose_queries(labels, 5, seed=seed)) for seed in range(10)}) > 8
    firsts = {labels[choose_queries(labels, 1, seed=seed)[0]] for seed in range(60)}
    assert firsts == set(range(7))


def test_choosing_refuses():
    with pytest.raises(ValueError, match="between 1 and the 3 queries, got 4"):
        choose_queries([0, 1, 2], 4)
    with pytest.raises(ValueError, match="got 0"):
        choose_queries([0, 1, 2], 0)
    with pytest.raises(ValueError, match=r"1-D, got shape \(1, 2\)"):
        choose_queries([[0, 1]], 1)
