"""search/mteb_model.py: a retriever on tasks of MTEB, on sets made here."""

import numpy as np
import pytest
import torch
from data_fixtures import jpeg_bytes, write_retrieval_set

from vptsp import Embedder, MTEBModel


mteb = pytest.importorskip("mteb")

CLASSES = {"a": range(4), "b": range(4, 7), "c": range(7, 9), "d": range(9, 14)}
OF = {number: name for name, members in CLASSES.items() for number in members}
METADATA = {
    "name": "TinyI2IRetrieval",
    "description": "Noise of four kinds.",
    "reference": "https://example.org",
    "type": "Any2AnyRetrieval",
    "category": "i2i",
    "eval_splits": ["test"],
    "eval_langs": ["eng-Latn"],
    "main_score": "hit_rate_at_1",
    "date": ("2020-01-01", "2020-12-31"),
    "domains": ["Web"],
    "task_subtypes": ["Object recognition"],
    "license": "not specified",
    "annotations_creators": "derived",
    "dialect": [],
    "modalities": ["image"],
    "sample_creation": "created",
    "bibtex_citation": "",
}


def make_task(root, **changed):
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    class Tiny(AbsTaskRetrieval):
        metadata = TaskMetadata(dataset={"path": str(root), "revision": "main"}, **METADATA | changed)
        skip_first_result = True

    return Tiny()


@pytest.fixture
def retrieval_set(tmp_path):
    """Every image asks for the others of its class, as in the sets of CUB-200-2011 and Cars-196."""
    qrels = [(f"q{x}", f"c{y}", 1) for x in OF for y in OF if x != y and OF[x] == OF[y]]
    images = {number: jpeg_bytes(number, (20, 18)) for number in OF}
    return write_retrieval_set(
        tmp_path / "set", {f"q{x}": images[x] for x in OF}, {f"c{x}": images[x] for x in OF}, qrels
    )


def expected_scores(model_folder):
    """Of the nearest other image, and the mean gain of the first ten."""
    embeddings = Embedder.from_pretrained(model_folder).embed_images([jpeg_bytes(number, (20, 18)) for number in OF])
    similarities = (embeddings.double() @ embeddings.double().T).numpy()
    np.fill_diagonal(similarities, -2)
    labels = np.array([OF[number] for number in OF])
    hits, gains = [], []
    for row, order in enumerate(np.argsort(-similarities, axis=1)[:, :-1]):
        relevant = labels[order] == labels[row]
        discounts = 1 / np.log2(np.arange(len(order)) + 2)
        hits.append(relevant[0])
        gains.append((relevant * discounts)[:10].sum() / discounts[: min(relevant.sum(), 10)].sum())
    return np.mean(hits), np.mean(gains)


def test_scores_of_an_image_task(retrieval_set, retriever_folder, tmp_path):
    model = MTEBModel(str(retriever_folder), device="cpu")
    found = mteb.evaluate(model, make_task(retrieval_set), cache=None, show_progress_bar=False, num_proc=1)
    (scores,) = found.task_results[0].scores["test"]
    hit_rate, gain = expected_scores(retriever_folder)
    assert 0 < hit_rate < 1
    assert scores["hit_rate_at_1"] == scores["main_score"] == pytest.approx(hit_rate, abs=1e-5)
    assert scores["ndcg_at_10"] == pytest.approx(gain, abs=1e-5)


def test_it_has_what_an_encoder_has(retriever_folder):
    from mteb.models import EncoderProtocol

    model = MTEBModel(retriever_folder, meta={"name": "ann/photos", "license": "mit", "training_datasets": {"CUB200"}})
    assert isinstance(model, EncoderProtocol)
    meta = model.mteb_model_meta
    assert (meta.name, meta.license, meta.modalities, meta.embed_dim) == ("ann/photos", "mit", ["image"], 8)
    assert meta.n_parameters == sum(parameter.numel() for parameter in model.embedder.model.parameters())
    one, two = torch.nn.functional.normalize(torch.randn(2, 3, 8, generator=torch.manual_seed(0)), dim=-1)
    torch.testing.assert_close(model.similarity(one.numpy(), two), one @ two.T)
    torch.testing.assert_close(model.similarity_pairwise(one, two.numpy()), (one @ two.T).diagonal())
    with pytest.raises(ValueError, match="licence"):
        MTEBModel(retriever_folder, meta={"licence": "mit"})
    assert MTEBModel(str(retriever_folder)).mteb_model_meta.name == f"local/{retriever_folder.name}"


def test_results_are_kept_by_what_made_them(retriever_folder, backbone_folder):
    """Else a retriever trained anew in its folder would get the scores of the last."""
    model = MTEBModel(retriever_folder)
    assert model.mteb_model_meta.revision == model.embedder.fingerprint[:40]
    small = MTEBModel(backbone_folder, image_size=16).mteb_model_meta
    large = MTEBModel(backbone_folder, image_size=32, dtype=torch.bfloat16).mteb_model_meta
    assert dict(small.experiment_kwargs) == {"image_size": 16}
    assert dict(large.experiment_kwargs) == {"image_size": 32, "dtype": "bfloat16"}


@pytest.mark.parametrize("modalities, category", [(["text"], "t2t"), (["image", "text"], "it2i")])
def test_tasks_with_text_are_refused(retrieval_set, retriever_folder, modalities, category):
    model = MTEBModel(retriever_folder)
    task = make_task(retrieval_set, modalities=modalities, category=category)
    with pytest.raises(
        ValueError, match=r"task TinyI2IRetrieval has .*text, but .* embeds images alone: choose tasks of"
    ):
        model.encode([], task_metadata=task.metadata, hf_split="test", hf_subset="default")
