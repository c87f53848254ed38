"""The picture of before and after: whose neighbours stand where, and what its title counts."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from vptsp.eval import evaluated_images
from vptsp.eval.before_after import Maps, Row, save_before_after
from vptsp.eval.evaluated_images import EvaluatedImages, draw_before_after
from vptsp.training.run_pictures import draw_run


NAMES = ["Anjou", "Leek", "Kaiser-with-a-name-that-goes-on-and-on-and-on-until-it-ends"]


class Images:
    """A data set of flat images, one shade per row."""

    class_names = NAMES

    def open_images(self, rows):
        return {row: Image.new("RGB", (8, 8), (row, 100, 200)) for row in rows}


def evaluated(seed, labels, readable=None):
    generator = torch.Generator().manual_seed(seed)
    embeddings = normalize(torch.randn(len(labels), 6, generator=generator), dim=1)
    readable = torch.ones(len(labels), dtype=torch.bool) if readable is None else readable
    return EvaluatedImages(Images(), {"query": (embeddings, labels, readable), "gallery": None})


LABELS = torch.arange(18) % 3


def nearest(embeddings, query):
    similarity = (embeddings.double() @ embeddings[query].double()).tolist()
    similarity[query] = -2
    return sorted(range(len(similarity)), key=lambda row: -similarity[row])


def test_rows_are_those_of_both_models(tmp_path, monkeypatch):
    frozen, tuned = evaluated(0, LABELS), evaluated(1, LABELS)
    drawn = {}
    monkeypatch.setattr(
        evaluated_images, "save_before_after", lambda path, *parts, **options: drawn.update(parts=parts)
    )
    draw_before_after(tmp_path / "x.png", frozen, tuned, count=4, seed=3)
    queries, before, after, maps, title = drawn["parts"]
    assert len(queries) == len(before) == len(after) == 4
    for (image, name), *rows in zip(queries, before, after, strict=True):
        query = image.getpixel((0, 0))[0]  # the shade is the row
        assert name == NAMES[query % 3]
        for row, part in zip(rows, (frozen, tuned), strict=True):
            expected = nearest(part.query_embeddings, query)[:8]
            assert [found.getpixel((0, 0))[0] for found in row.images] == expected
            assert row.names == [NAMES[item % 3] for item in expected]
            assert row.correct == [item % 3 == query % 3 for item in expected]
    first = [[nearest(part.query_embeddings, q)[0] % 3 == q % 3 for q in range(18)] for part in (frozen, tuned)]
    gained = sum(b and not a for a, b in zip(*first, strict=True))
    lost = sum(a and not b for a, b in zip(*first, strict=True))
    assert f"R@1 {100 * sum(first[0]) / 18:.1f} % before, {100 * sum(first[1]) / 18:.1f} % after" in title
    assert f"Of 18 queries, {gained} find a correct image first only with tuning, {lost} only without" in title
    assert maps.before.shape == maps.after.shape == (18, 2)
    assert maps.labels.tolist() == LABELS.tolist()


def test_the_picture_says_it_all(tmp_path):
    image = Image.new("RGB", (8, 8))
    rows = [Row([image] * 2, [NAMES[2], "Leek"], [0.5, -0.25], [True, False])] * 2
    maps = Maps(np.random.rand(9, 2), np.random.rand(9, 2), np.arange(9) % 3, NAMES, [0, 2])
    svg = save_before_after(
        tmp_path / "x.svg", [(image, "Anjou")] * 2, rows, rows, maps, "Before $and$ after"
    ).read_text("utf-8")
    texts = re.findall("<!-- (.*?) -->", svg)
    assert texts.count("backbone alone") == texts.count("tuned") == 2
    for text in ("Embeddings, backbone alone", "Embeddings, tuned", "Before $and$ after", "✓ 0.500", "✗ −0.250"):
        assert text in texts
    assert "".join(texts).count(NAMES[2]) == 5  # in each row and in the legend, whole
    assert "1 other class" in texts
    with_maps = Image.open(save_before_after(tmp_path / "a.png", [(image, "Anjou")], rows[:1], rows[:1], maps)).height
    without = Image.open(save_before_after(tmp_path / "b.png", [(image, "Anjou")], rows[:1], rows[:1])).height
    assert with_maps - without > 500


def test_refusals(tmp_path):
    image = Image.new("RGB", (8, 8))
    row, other = Row([image], ["a"], [0.5], [True]), Row([image], ["a"], [0.5], [])
    with pytest.raises(ValueError, match=r"one entry per query, at least one, got \{'queries': 0"):
        save_before_after(tmp_path / "x.png", [], [], [])
    with pytest.raises(ValueError, match="one entry per query"):
        save_before_after(tmp_path / "x.png", [(image, "a")], [row], [])
    with pytest.raises(ValueError, match=r"as many neighbours, at least one, got \[0, 1\]"):
        save_before_after(tmp_path / "x.png", [(image, "a")], [row], [other])
    unread = torch.arange(18) != 4
    with pytest.raises(ValueError, match="must be of the same images"):
        draw_before_after(tmp_path / "x.png", evaluated(0, LABELS), evaluated(1, LABELS, unread))
    assert not list(tmp_path.iterdir())


def test_which_pictures_a_run_draws(tmp_path):
    names = {}
    for case, options in {
        "plain": {},
        "frozen": {"frozen": evaluated(0, LABELS)},
        "proxies": {"proxy_records": []},
    }.items():
        written, problems = draw_run(tmp_path / case, evaluated(1, LABELS), None, None, [], **options)
        names[case] = {path.stem for path in written} | set(problems)
    assert names["frozen"] - names["plain"] == {"before_after"}
    assert (tmp_path / "frozen" / "before_after.png").is_file()
    assert names["proxies"] - names["plain"] == {"proxies"}
