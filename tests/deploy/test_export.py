"""Exported files: the same embeddings, prompts folded into constants, metadata, and what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import test_families
import torch
from conftest import tiny_vit_config
from remote_code import remote_model
from transformers import DeiTConfig

from vptsp import VPTSPConfig, VPTSPForMetricLearning, VPTSPModel
from vptsp.data_scripts.preprocessing import build_image_processor
from vptsp.deploy import export


onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

LAYERS = 2
DEIT = DeiTConfig(**{**tiny_vit_config(num_hidden_layers=LAYERS).to_dict(), "model_type": "deit"})
BACKBONES = {"vit": tiny_vit_config(num_hidden_layers=LAYERS), "deit": DEIT}


def make_retriever(backbone_config, **fields):
    fields = {"embedding_dim": 10, "num_prompts": 5, "prompt_step": 3, **fields}  # 5 and 2 prompts
    model = VPTSPModel(VPTSPConfig(backbone_config=backbone_config, **fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@pytest.fixture(scope="module", params=BACKBONES)
def exported(request, tmp_path_factory):
    """A retriever, its ONNX file, its `.pt2` file and the differences that the exports returned."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    retriever = make_retriever(BACKBONES[request.param])
    processor = build_image_processor(16, 18)
    differences = (
        export.export_onnx(retriever, folder / "retriever.onnx", processor),
        export.export_program(retriever, folder / "retriever.pt2", processor),
    )
    return retriever, folder / "retriever.onnx", folder / "retriever.pt2", differences


@pytest.mark.parametrize("batch_size", [1, 3, 5])
def test_same_embeddings_for_any_batch(exported, batch_size):
    retriever, onnx_file, program_file, differences = exported
    pixel_values = torch.randn(batch_size, 3, 16, 16)
    with torch.no_grad():
        expected = retriever(pixel_values).embeddings
    session = onnxruntime.InferenceSession(onnx_file, providers=["CPUExecutionProvider"])
    assert [(node.name, node.shape[1:]) for node in session.get_inputs()] == [("pixel_values", [3, 16, 16])]
    assert [node.name for node in session.get_outputs()] == ["embeddings"]
    embeddings = torch.from_numpy(session.run(None, {"pixel_values": pixel_values.numpy()})[0])
    torch.testing.assert_close(embeddings, expected, atol=1e-5, rtol=0)
    program = torch.export.load(program_file).module()
    torch.testing.assert_close(program(pixel_values), expected, atol=1e-5, rtol=0)
    assert all(0 <= difference < 1e-5 for difference in differences)


@pytest.mark.slow
@test_families.every_kind
def test_every_family(name, tmp_path):
    for pooling in test_families.FAMILIES[name][1].split()[:2]:
        retriever, pixel_values = test_families.retriever(name, pooling=pooling), torch.randn(3, 3, 16, 16)
        file = tmp_path / f"{pooling}.onnx"
        assert export.export_onnx(retriever, file) < 1e-5
        with torch.no_grad():
            expected = retriever(pixel_values).embeddings
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        embeddings = torch.from_numpy(session.run(None, {"pixel_values": pixel_values.numpy()})[0])
        torch.testing.assert_close(embeddings, expected, atol=1e-5, rtol=0)


def test_prompts_are_constants(exported):
    retriever, onnx_file, program_file, _ = exported
    graph = onnx.load(onnx_file).graph
    stored = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    shapes = {f"prompt_{kind}_{layer}": (3, p, 8) for layer, p in enumerate((5, 2)) for kind in ("key", "value")}
    assert {name: dims for name, dims in stored.items() if "prompt" in name} == shapes
    first_layer = retriever.backbone.layers[0]
    with torch.no_grad():
        normed = first_layer.layernorm_before(retriever.prompts.tokens[:5])
        key = first_layer.attention.k_proj(normed).view(5, 3, 8).transpose(0, 1)
    constants = torch.export.load(program_file).state_dict
    torch.testing.assert_close(constants["prompt_key_0"], key)
    assert not any("tokens" in name for name in constants)

    operators = [node.op_type for node in graph.node]
    heads = 2 if retriever.config.backbone_config.model_type == "deit" else 1
    # Per layer q, k, v, scores, weighted values, output and the two of the MLP; nothing more for the prompts.
    assert operators.count("MatMul") + operators.count("Gemm") == 8 * LAYERS + heads
    assert operators.count("LayerNormalization") == 2 * LAYERS + 1 + heads


def test_metadata(exported):
    _, onnx_file, program_file, _ = exported
    model = onnx.load(onnx_file)
    assert [opset.version for opset in model.opset_import if opset.domain == ""] == [18]
    metadata = {item.key: item.value for item in model.metadata_props}
    extra_files = {"metadata.json": ""}
    torch.export.load(program_file, extra_files=extra_files)
    for values in (metadata, json.loads(extra_files["metadata.json"])):
        assert (values["embedding_dim"], values["image_size"], values["resize_size"]) == ("10", "16", "18")
        assert json.loads(values["image_mean"]) == json.loads(values["image_std"]) == [0.5, 0.5, 0.5]
        assert values["producer"].startswith("vptsp ")


def test_wrong_file_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "TOLERANCE", 0.0)
    retriever = make_retriever(BACKBONES["vit"])
    path = tmp_path / "retriever.pt2"
    path.write_text("earlier")
    project = VPTSPModel.project_prompts
    wrong = lambda model: [prompts._replace(key=prompts.value) for prompts in project(model)]  # noqa: E731
    monkeypatch.setattr(VPTSPModel, "project_prompts", wrong)
    with pytest.raises(RuntimeError, match=r"differ from the retriever's by .*: it was not kept"):
        export.export_program(retriever, path)
    assert [file.name for file in tmp_path.iterdir()] == ["retriever.pt2"]
    assert path.read_text() == "earlier"


def test_training_model_in_any_mode(tmp_path):
    fields = {"num_classes": 3, "embedding_dim": 10, "num_prompts": 1, "prompt_step": 1, "embedding_dropout": 0.5}
    model = VPTSPForMetricLearning(VPTSPConfig(backbone_config=BACKBONES["vit"], **fields)).train()
    export.export_program(model, tmp_path / "retriever.pt2")
    assert all(module.training for module in (model, model.vptsp, model.vptsp.head))
    pixel_values = torch.randn(3, 3, 16, 16)
    program = torch.export.load(tmp_path / "retriever.pt2").module()
    torch.testing.assert_close(program(pixel_values), model.eval().vptsp(pixel_values).embeddings)


@pytest.mark.parametrize("fields", [{"prompt_mode": "shallow"}, {"prompt_step": 1}, {"num_prompts": 0}])
def test_other_layouts_of_prompts(fields, tmp_path):
    model = VPTSPModel(VPTSPConfig(**{"backbone_config": BACKBONES["vit"], "num_prompts": 3, **fields})).eval()
    export.export_program(model, tmp_path / "retriever.pt2")
    program, pixel_values = torch.export.load(tmp_path / "retriever.pt2").module(), torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(program(pixel_values), model(pixel_values).embeddings)


def test_a_model_of_automodel(retriever_folder, tmp_path):
    model = remote_model(retriever_folder)
    assert type(model).__module__.startswith("transformers_modules.")
    assert export.export_program(model, tmp_path / "retriever.pt2") < 1e-4
    pixel_values = torch.randn(3, 3, 16, 16)
    program = torch.export.load(tmp_path / "retriever.pt2").module()
    torch.testing.assert_close(program(pixel_values), model(pixel_values).embeddings)


def test_what_can_not_be_exported_is_named(tmp_path, monkeypatch):
    retriever = make_retriever(BACKBONES["vit"])
    with pytest.raises(ValueError, match="the image processor crops to 32 pixels, but the model takes 16"):
        export.export_onnx(retriever, tmp_path / "a.onnx", build_image_processor(32, 36))
    with pytest.raises(ValueError, match=r"must be float32 to be exported, got torch\.bfloat16"):
        export.export_onnx(retriever.to(torch.bfloat16), tmp_path / "a.onnx")
    monkeypatch.setattr(export, "MAX_ONNX_BYTES", 1000)
    with pytest.raises(ValueError, match="an ONNX file holds at most 2 GB, the retriever has"):
        export.export_onnx(retriever, tmp_path / "a.onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"needs onnxscript: pip install vptsp\[export\]"):
        export.export_onnx(retriever, tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


def test_command(tmp_path, capsys, monkeypatch):
    retriever = make_retriever(BACKBONES["vit"])
    retriever.to(torch.bfloat16).save_pretrained(tmp_path / "retriever")  # loaded in float32
    command = [str(tmp_path / "retriever"), "--format", "torch", "--output", str(tmp_path / "retriever.pt2")]
    export.main(command)
    printed = capsys.readouterr().out
    assert "has no image processor" in printed
    assert "retriever.pt2: 0." in printed
    assert "largest difference" in printed
    program = torch.export.load(tmp_path / "retriever.pt2").module()
    pixel_values = torch.randn(2, 3, 16, 16)
    expected = VPTSPModel.from_pretrained(tmp_path / "retriever", dtype=torch.float32)(pixel_values).embeddings
    torch.testing.assert_close(program(pixel_values), expected)

    def refused(arguments):
        with pytest.raises(SystemExit) as exit_info:
            export.main(arguments)
        assert exit_info.value.code == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    assert "there is no folder" in refused([*command[:-1], str(tmp_path / "nowhere" / "retriever.pt2")])
    assert f"retriever: there is no folder {tmp_path / 'none'}" in refused([str(tmp_path / "none"), *command[1:]])
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "pip install vptsp[export]" in refused([command[0], "--format", "onnx", *command[3:]])


@pytest.mark.parametrize("kind", ["nan", "one image for all"])
def test_a_file_that_gives_no_embeddings_is_not_kept(tmp_path, monkeypatch, kind):
    """Python's `max(0.0, nan)` is 0.0, and embeddings of one image can be compared with those of three."""
    retriever = make_retriever(BACKBONES["vit"])

    def load(path):
        program = torch.export.ExportedProgram
        assert isinstance(exported_load(path), program)
        return Broken()

    class Broken:
        def module(self):
            def embed(pixel_values):
                with torch.no_grad():
                    embeddings = retriever(pixel_values).embeddings
                return embeddings * torch.nan if kind == "nan" else embeddings[:1]

            return embed

    exported_load = torch.export.load
    monkeypatch.setattr(torch.export, "load", load)
    message = "by nan, more than 1e-04" if kind == "nan" else r"embeddings of shape \(1, 10\) for 3 images"
    with pytest.raises(RuntimeError, match=message):
        export.export_program(retriever, tmp_path / "retriever.pt2")
    assert not list(tmp_path.iterdir())


def test_torch_has_nothing_to_say_of_a_file_that_is_right(tmp_path):
    """In a process of its own, as torch keeps where its log goes."""
    code = (
        "import sys, torch, test_export as t\n"
        "from vptsp.deploy import export\n"
        "model = t.make_retriever(t.BACKBONES['vit'])\n"
        "export.export_program(model, sys.argv[1] + '/r.pt2'), export.export_onnx(model, sys.argv[1] + '/r.onnx')\n"
    )
    places = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": places}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.onnx", "r.pt2"]
    assert not [word for word in ("pt2", "package", "Warning") if word in done.stderr], done.stderr
