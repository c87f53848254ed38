"""Hooks on parts of the training model: they run in its forward pass as they do in the retriever's."""

import pytest
import torch
from noise_runs import make_trainer

from vptsp import VPTSPForMetricLearning


LABELS = torch.tensor([0, 0, 1, 1])
LOSSES = {
    "own": {},
    "shared head": {"proxy_head": "shared"},
    "mean": {"proxy_update": "mean", "proxy_head": "own"},
    "no semantic proxies": {"proxy_update": "none"},
    "of embeddings": {"loss": "recall_at_k", "proxy_update": "none"},
    "of features": {"loss": "hyperbolic", "proxy_update": "none"},
}


def make_model(backbone_folder, **fields):
    fields = {"num_classes": 3, "embedding_dim": 8, "num_prompts": 2, "num_class_prompts": 1, **fields}
    return VPTSPForMetricLearning.from_backbone(backbone_folder, **fields).train()


@pytest.mark.parametrize("fields", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("with_labels", [True, False])
def test_hooks_on_the_retriever_and_its_head_run(backbone_folder, fields, with_labels):
    model, pixel_values = make_model(backbone_folder, **fields), torch.randn(4, 3, 16, 16)
    seen = {"before vptsp": [], "vptsp": [], "before head": [], "head": []}
    for name, module in (("vptsp", model.vptsp), ("head", model.vptsp.head)):
        module.register_forward_pre_hook(lambda _, inputs, name=name: seen[f"before {name}"].append(inputs[0]))
        module.register_forward_hook(lambda _, inputs, output, name=name: seen[name].append(output))
    output = model(pixel_values, LABELS if with_labels else None, images_per_class=2 if with_labels else None)
    semantic = with_labels and model.config.proxy_update != "none"
    assert len(seen["vptsp"]) == len(seen["before vptsp"]) == 1
    assert (
        len(seen["head"]) == len(seen["before head"]) == (2 if semantic and model.config.proxy_head == "shared" else 1)
    )
    assert torch.equal(seen["before vptsp"][0], pixel_values)
    assert torch.equal(seen["vptsp"][0].embeddings, output.embeddings)
    torch.testing.assert_close(torch.nn.functional.normalize(seen["head"][0], dim=-1), output.embeddings)


@pytest.mark.parametrize("fields", LOSSES.values(), ids=LOSSES)
def test_what_hooks_return_is_what_is_trained_on(backbone_folder, fields):
    """Images turned around by a hook on the retriever give the loss of images turned around."""
    model, pixel_values = make_model(backbone_folder, **fields), torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        expected = model(pixel_values.flip(3), LABELS, images_per_class=2)
        plain = model(pixel_values, LABELS, images_per_class=2)
        handle = model.vptsp.register_forward_pre_hook(lambda _, inputs: (inputs[0].flip(3), *inputs[1:]))
        assert torch.equal(model(pixel_values, LABELS, images_per_class=2).loss, expected.loss)
        assert not torch.equal(plain.loss, expected.loss)
        handle.remove()
        model.vptsp.head.register_forward_hook(lambda _, inputs, output: output.roll(1, dims=0))
        assert torch.equal(
            model(pixel_values, LABELS, images_per_class=2).embeddings, plain.embeddings.roll(1, dims=0)
        )


def test_backward_hooks_on_the_head_run(backbone_folder):
    model, seen = make_model(backbone_folder, proxy_head="shared"), []
    model.vptsp.head.register_full_backward_hook(lambda _, before, after: seen.append(after[0].shape))
    model(torch.randn(4, 3, 16, 16), LABELS, images_per_class=2).loss.backward()
    assert seen == [(4, 8), (4, 8)]  # of images, and of their semantic vectors


def test_only_what_is_known_can_be_kept(backbone_folder):
    retriever = make_model(backbone_folder).retriever
    with pytest.raises(ValueError, match=r"keep must name any of features and tokens, got \['token'\]"):
        retriever(torch.randn(1, 3, 16, 16), keep=["token"])
    output = retriever(torch.randn(1, 3, 16, 16), return_dict=False)
    assert [tuple(part.shape) for part in output] == [(1, 8), (1, 8)]


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
@pytest.mark.parametrize(
    "place, words",
    [
        ("proxies", "SemanticProxies never run: the proxies are read and updated in parts"),
        ("vptsp.adapters", "ModuleList never run: the adapters in it are called one by one"),
        ("vptsp.backbone", "ViTModel never run"),
    ],
)
def test_hooks_that_could_never_run_are_refused(backbone_folder, tmp_path, place, words, kind):
    model = make_model(backbone_folder, adapter_layers=1, adapter_dim=4)
    getattr(model.get_submodule(place), kind)(lambda *_: None)
    with pytest.raises(ValueError, match=f"hooks on {words}"):
        model(torch.randn(4, 3, 16, 16), LABELS)
    with pytest.raises(ValueError, match=f"hooks on {words}"):  # before anything is written
        make_trainer(model, tmp_path / "run").train()
    assert not [*(tmp_path / "run").iterdir()]


def test_hooks_on_the_adapters_of_a_retriever_are_refused(backbone_folder):
    retriever = make_model(backbone_folder, adapter_layers=1, adapter_dim=4).eval().retriever
    retriever.adapters.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="hooks on ModuleList never run: the adapters"):
        retriever(torch.randn(1, 3, 16, 16))


@pytest.mark.parametrize("fields", LOSSES.values(), ids=LOSSES)
def test_hooks_on_the_head_see_the_same_in_training_and_evaluation(backbone_folder, fields):
    model, pixel_values, seen = make_model(backbone_folder, **fields), torch.randn(4, 3, 16, 16), []
    model.vptsp.head.register_forward_hook(lambda _, inputs, output: seen.append(output.detach()))
    model(pixel_values, LABELS)
    trained = seen[0]
    model.eval()
    seen.clear()
    model.retriever(pixel_values)
    torch.testing.assert_close(seen[0], trained)
    assert not torch.allclose(trained.norm(dim=-1), torch.ones(4))
