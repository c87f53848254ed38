"""`vptsp evaluate --before_after`: the pictures are of the right images and models."""

import pytest
import torch
from data_fixtures import write_classes

from vptsp import Embedder, VPTSPModel
from vptsp.data_scripts.preprocessing import build_image_processor
from vptsp.search import command_evaluate
from vptsp.search.commands import main


@pytest.fixture(scope="module")
def place(backbone_folder, tmp_path_factory):
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("evaluate")
    write_classes(folder / "images", {"a": 3, "b": 3, "c": 2})
    VPTSPModel.from_backbone(backbone_folder, num_prompts=2, embedding_dim=8).save_pretrained(folder / "model")
    build_image_processor(16, 18).save_pretrained(folder / "model")
    return folder


def evaluate(place, output, *words):
    base = ["--output", str(output), "--embeddings_cache", str(place / "cache"), "--quiet", "--no_clustering"]
    return main(["evaluate", *map(str, words), *base])


def test_before_and_after(place, backbone_folder, tmp_path, monkeypatch):
    drawn = {}
    draw = command_evaluate.draw_before_after
    monkeypatch.setattr(
        command_evaluate,
        "draw_before_after",
        lambda *args, **options: drawn.update(args=args) or draw(*args, **options),
    )
    words = ["--model", place / "model", "--images", place / "images"]
    assert evaluate(place, tmp_path, *words, "--before_after") == 0
    path, frozen, tuned = drawn["args"]
    assert path == tmp_path / "before_after.png" and path.stat().st_size > 10_000
    files = sorted((place / "images").rglob("*.png"))
    for part, name in ((frozen, backbone_folder), (tuned, place / "model")):
        options = {"resize_size": 18} if part is frozen else {}
        expected = Embedder.from_pretrained(name, **options).embed_images(files)
        torch.testing.assert_close(part.query_embeddings, expected)
        assert part.query_names(range(8)) == [file.parent.name for file in files]
    assert evaluate(place, tmp_path / "plain", *words) == 0
    assert not (tmp_path / "plain" / "before_after.png").exists()


def test_refusals(place, backbone_folder, tmp_path, capsys):
    words = ["--model", backbone_folder, "--images", place / "images", "--before_after"]
    assert evaluate(place, tmp_path, *words) == 2
    assert "is a bare backbone" in capsys.readouterr().err
    assert evaluate(place, tmp_path, "--store", place / "x", "--before_after") == 2
    assert "--before_after goes with --model" in capsys.readouterr().err


def test_what_is_said_of_images_is_said_once(place, backbone_folder, tmp_path, caplog, capsys):
    """Also where two models look at the same images."""
    images, model = write_classes(tmp_path / "images", {"a": 3, "b": 3}), str(place / "model")
    (images / "a" / "notes.eps").write_text("x")
    compared = ["compare", model, str(backbone_folder), "--output", str(tmp_path / "c"), "--images", str(images)]
    for command in (
        lambda: main([*compared, "--embeddings_cache", str(tmp_path / "cache"), "--quiet"]),
        lambda: evaluate(place, tmp_path / "e", "--model", model, "--images", images, "--before_after"),
    ):
        caplog.clear()
        assert command() == 0
        said = [record.getMessage() for record in caplog.records if "left out: .eps 1" in record.getMessage()]
        assert len(said) == 1
        assert "Loading weights" not in capsys.readouterr().err
