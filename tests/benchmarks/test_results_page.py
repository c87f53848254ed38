"""benchmarks/results_page.py: what is put where, and what of a page stays."""

import re
from pathlib import Path

import pytest
import results_page


PAGE = Path(__file__).resolve().parents[2] / "docs" / "results.md"


@pytest.fixture
def page(tmp_path):
    (tmp_path / "images").mkdir()
    path = tmp_path / "page.md"
    path.write_text("# Title\n\n<!-- begin a -->\nold\n<!-- end a -->\n\ntext\n\n<!-- begin b -->\n<!-- end b -->\n")
    (tmp_path / "table.md").write_text("| x |\n| \\1 |\n")
    (tmp_path / "plot.png").write_bytes(b"picture")
    return path


def test_a_table_takes_its_place_and_all_else_stays(page, tmp_path):
    given = [f"a={tmp_path / 'table.md'}", f"a={tmp_path / 'plot.png'}"]
    results_page.main([str(page), "--report", *given])
    expected = (
        "# Title\n\n<!-- begin a -->\n\n| x |\n| \\1 |\n\n![a, as a picture](images/results_a.png)\n\n"
        "<!-- end a -->\n\ntext\n\n<!-- begin b -->\n<!-- end b -->\n"
    )
    assert page.read_text() == expected
    assert (tmp_path / "images" / "results_a.png").read_bytes() == b"picture"
    results_page.report(page, given)
    assert page.read_text() == expected


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("c=table.md", "must have one place 'c', got 0; its places are a, b"),
        ("a=none.md", r"--report a: there is no file .*none\.md"),
        ("a=table.csv", "takes NAME=FILE with a file .md or .png"),
        ("a", "takes NAME=FILE"),
    ],
)
def test_what_can_not_be_put_anywhere(page, tmp_path, part, message):
    before, (name, equals, file) = page.read_text(), part.partition("=")
    given = [
        f"a={tmp_path / 'table.md'}",
        f"b={tmp_path / 'plot.png'}",
        f"{name}{equals}{tmp_path / file if file else ''}",
    ]
    with pytest.raises(ValueError, match=message):
        results_page.report(page, given)
    assert page.read_text() == before
    assert not list((tmp_path / "images").iterdir())


def test_the_places_of_the_page_of_results():
    text = PAGE.read_text(encoding="utf-8")
    names = re.findall(r"<!-- begin (\S+) -->", text)
    assert names == list(dict.fromkeys(names))
    for name in names:
        results_page.fill(text, name, "")
