"""Maps, curves and proxy movement: the numbers behind them, and that the files say what they should."""

import doctest
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from vptsp.eval import curves
from vptsp.eval.curves import save_training_curves, series_of
from vptsp.eval.embedding_map import MOST_CLASSES, choose_mapped, map_embeddings, save_embedding_map
from vptsp.eval.proxy_curves import save_proxy_movement


def test_pca_equals_the_eigenvectors_of_the_covariance():
    embeddings = normalize(torch.randn(40, 6, dtype=torch.float64), dim=1)
    points = map_embeddings(embeddings, "pca")
    centred = embeddings - embeddings.mean(0)
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    expected = (centred @ vectors[:, [-1, -2]]).numpy()
    np.testing.assert_allclose(abs(points), abs(expected), atol=1e-10)


def test_tsne_keeps_classes_together_and_follows_from_the_seed():
    labels = torch.arange(3).repeat_interleave(20)
    embeddings = normalize(torch.randn(3, 8)[labels] + 0.2 * torch.randn(60, 8), dim=1)
    points = map_embeddings(embeddings, seed=1)
    assert points.shape == (60, 2)
    distance = np.linalg.norm(points[:, None] - points[None], axis=-1) + np.diag([np.inf] * 60)
    assert (labels[distance.argmin(1)] == labels).float().mean() > 0.95
    np.testing.assert_array_equal(points, map_embeddings(embeddings, seed=1))


def test_maps_of_odd_embeddings():
    same = normalize(torch.ones(7, 3), dim=1)
    assert np.isfinite(map_embeddings(same)).all()
    assert map_embeddings(torch.ones(6, 1), "pca").shape == (6, 2)
    with pytest.raises(ValueError, match="at least 5 embeddings, got 4"):
        map_embeddings(torch.eye(4))
    with pytest.raises(ValueError, match="must be 'tsne' or 'pca', got 'umap'"):
        map_embeddings(torch.eye(6), "umap")
    with pytest.raises(ValueError, match="must be L2-normalised"):
        map_embeddings(2 * torch.eye(6))


def test_which_items_are_mapped():
    labels = torch.tensor([5] * 40 + [1] * 30 + list(range(100, 130)))
    rows, classes = choose_mapped(labels, max_items=200, max_classes=2)
    assert (rows, classes) == (list(range(100)), [1, 5])
    rows, classes = choose_mapped(labels, max_items=50, max_classes=2)
    assert len(rows) == len(set(rows)) == 50
    assert sum(labels[row] in (1, 5) for row in rows) >= 25
    assert len(labels[rows].unique()) >= 26  # the rest is spread over all classes, coloured ones among them
    assert choose_mapped(labels, max_items=50, seed=1)[0] != choose_mapped(labels, max_items=50, seed=2)[0]


def test_map_picture_names_classes(tmp_path):
    labels = torch.arange(60) % 20
    names = ["_вид $0 \\$", *(f"вид {i}" for i in range(1, 19)), "costs $5 and $6, and its name goes on and on and on"]
    classes = [0, 1, 19]
    path = save_embedding_map(tmp_path / "map.svg", np.random.rand(60, 2), labels, names, classes, "All of $it")
    svg = path.read_text("utf-8")
    for text in ("_вид $0 \\$", "вид 1", "costs $5", "17 other classes", "t-SNE dimension 1", "All of $it"):
        assert text in svg
    assert "вид 3" not in svg and "…" not in svg
    assert names[-1] in " ".join(re.findall("<!-- (.*?) -->", svg))  # in lines
    path = save_embedding_map(tmp_path / "map.png", np.random.rand(60, 2), labels, names, [0], dpi=100, method="pca")
    assert Image.open(path).size == (680, 460)
    with pytest.raises(ValueError, match=r"points must have shape \(60, 2\) for 60 labels, got \(59, 2\)"):
        save_embedding_map(tmp_path / "no.png", np.zeros((59, 2)), labels, names, [0])
    with pytest.raises(ValueError, match=f"at most {MOST_CLASSES} classes"):
        save_embedding_map(tmp_path / "no.png", np.zeros((60, 2)), labels, names, list(range(15)))


LOG = [
    {"step": 0, "epoch": 0, "frozen_recall_at_1": 0.4, "frozen_map_at_r": 0.1},
    {"step": 5, "epoch": 0.5, "loss": 4.0, "learning_rate": 1e-3},
    {"step": 10, "epoch": 1.0, "loss": 3.0, "learning_rate": 5e-4},
    {"step": 10, "epoch": 1.0, "eval_recall_at_1": 0.5, "eval_map_at_r": 0.2},
    {"step": 20, "epoch": 2.0, "loss": 2.5, "learning_rate": 0.0},
    {"step": 20, "epoch": 2.0, "eval_recall_at_1": 0.6, "eval_map_at_r": 0.25},
    {"step": 20, "epoch": 2.0, "final_recall_at_1": 0.61, "final_map_at_r": 0.26},
]


def test_series_of_a_log():
    assert series_of(LOG, "loss") == ([0.5, 1.0, 2.0], [4.0, 3.0, 2.5])
    assert series_of(LOG, "eval_map_at_r") == ([1.0, 2.0], [0.2, 0.25])
    assert series_of(LOG, "nothing") == ([], [])
    assert doctest.testmod(curves).failed == 0


def test_curves_show_what_the_log_holds(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(curves, "save_figure", lambda figure, path: drawn.append(figure))
    save_training_curves(tmp_path / "curves.png", LOG)
    loss, scores, rate = drawn[0].axes
    assert loss.lines[0].get_xydata().tolist() == [[0.5, 4.0], [1.0, 3.0], [2.0, 2.5]]
    assert rate.lines[0].get_ydata().tolist() == [1, 0.5, 0.0]
    assert rate.get_title(loc="left") == "Learning rate × 1,000"
    lines = {line.get_label(): line.get_xydata().tolist() for line in scores.lines}
    # from the frozen backbone on; the last evaluation, of the best checkpoint, is no point of the curve
    assert lines["R@1"] == [[0.0, 40.0], [1.0, 50.0], [2.0, 60.0]]
    assert lines["MAP@R"] == [[0.0, 10.0], [1.0, 20.0], [2.0, 25.0]]
    levels = [line.get_ydata()[0] for line in scores.lines if list(line.get_xdata()) == [0, 1]]
    assert levels == [40.0, 10.0]


def test_a_run_too_short_for_a_logged_loss_has_its_curves(monkeypatch):
    drawn = []
    monkeypatch.setattr(curves, "save_figure", lambda figure, path: drawn.append(figure))
    short = [LOG[0], {"step": 3, "epoch": 0.6, "train_loss": 3.5}, {**LOG[-1], "step": 3, "epoch": 0.6}]
    save_training_curves("curves.png", short)
    loss, scores, rate = drawn[0].axes
    assert loss.lines[0].get_xydata().tolist() == [[0.0, 3.5], [0.6, 3.5]]
    assert loss.get_title(loc="left") == "Training loss, mean of the run"
    lines = {line.get_label(): line.get_xydata().tolist() for line in scores.lines}
    assert lines["R@1"] == [[0.0, 40.0], [0.6, 61.0]]
    assert [text.get_text() for text in rate.texts] == ["not logged"]


def test_a_map_is_as_tall_as_its_legend(tmp_path):
    names = [f"{number} " + "long words in a name " * 6 for number in range(14)]
    options = {"points": np.random.rand(28, 2), "labels": np.arange(28) % 14, "class_names": names}
    path = save_embedding_map(tmp_path / "map.png", **options, classes=list(range(14)), dpi=100)
    pixels = np.asarray(Image.open(path).convert("L"))
    assert pixels.shape[0] > 800
    assert (pixels[-8:, 520:] == 255).all()  # the legend doesn't run out of the picture
    svg = save_embedding_map(tmp_path / "map.svg", **options, classes=list(range(14))).read_text("utf-8")
    assert " ".join(re.findall("<!-- (.*?) -->", svg)).count("long words in a name") == 14 * 6


def test_curves_without_evaluations_and_without_training(tmp_path):
    path = save_training_curves(tmp_path / "curves.png", LOG[1:3], dpi=100)
    assert Image.open(path).size == (720, 215)
    with pytest.raises(ValueError, match="the log has no loss"):
        save_training_curves(tmp_path / "no.png", LOG[:1])


@pytest.mark.parametrize("semantic", [True, False])
def test_proxy_picture(tmp_path, semantic):
    names = ("proxy_start", "proxy_before", "state_before", "state_original")[: 4 if semantic else 2]
    records = [
        {"step": i, "epoch": i / 2, **{name: [0.5, 0.1, 0.6 - i / 10, 0.9] for name in names}} for i in range(1, 4)
    ]
    svg = save_proxy_movement(tmp_path / "proxies.svg", records, "Movement").read_text("utf-8")
    assert "Proxies Q" in svg and "Movement" in svg
    assert ("State S" in svg) == semantic
    width, _ = Image.open(save_proxy_movement(tmp_path / "proxies.png", records, dpi=100)).size
    assert width == (715 if semantic else 375)
    with pytest.raises(ValueError, match="no record of proxy movement"):
        save_proxy_movement(tmp_path / "no.png", [])


def test_records_are_read_as_written(tmp_path):
    from vptsp.training.proxy_movement import read_proxy_movement

    path = tmp_path / "proxy_movement.json"
    record = {"step": 3, "epoch": 1.0, "proxy_before": [1, 2, 3, 4]}
    path.write_text(json.dumps({"columns": ["mean", 0.1, 0.5, 0.9], "records": [record]}))
    assert read_proxy_movement(path) == [record]
    for text in ("[", "[]", "{}", '{"columns": ["mean"], "records": []}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"proxy_movement\.json"):
            read_proxy_movement(path)
