"""Export a retriever to ONNX or `torch.export`, with its prompts folded into constants.

    vptsp export runs/photos --format onnx --output retriever.onnx
    vptsp export owner/name --revision <commit> --format torch --output retriever.pt2

The exported graph takes `pixel_values` `(batch, 3, S, S)`, float32 and normalised, with any batch and the retriever's
image size S, and gives `embeddings` `(batch, E)`, L2-normalised. Keys and values of the prompts are stored in it; the
prompts themselves are gone. A file is kept only if its embeddings are those of the retriever.
"""

from __future__ import annotations

import copy
import importlib
import io
import json
import logging
import sys
import warnings
from pathlib import Path

import torch
from torch import nn
from transformers.image_utils import PILImageResampling
from transformers.utils.logging import disable_progress_bar

from .._version import __version__
from ..data_scripts.command_options import CommandParser
from ..data_scripts.normalisation import Normalisation
from ..data_scripts.preprocessing import load_image_processor
from ..files.atomic import atomic_path
from ..modeling_vptsp import VPTSPModel, refuse_other_adapters
from ..search.model_names import check_model_name


OPSET = 18  # the newest that the exporter writes without converting, and old enough for every current runtime
TOLERANCE = 1e-4
CHECKED_BATCH_SIZES = (1, 3)
# A protobuf message, and so an ONNX file without others beside it, holds no more.
MAX_ONNX_BYTES = 2**31 - 2**20


class FoldedRetriever(nn.Module):
    """A retriever whose prompts are constants: the keys and values of each layer, as buffers.

    Args:
        model: A [`VPTSPModel`] in float32; its weights are shared, not copied.

    Raises:
        ValueError: a weight is not float32.
    """

    def __init__(self, model):
        super().__init__()
        if others := {tensor.dtype for tensor in model.parameters()} - {torch.float32}:
            raise ValueError(f"a retriever must be float32 to be exported, got {', '.join(map(str, others))}")
        self.training = False
        self.retriever = copy.copy(model)
        self.retriever._modules = {name: part for name, part in model._modules.items() if name != "prompts"}
        self.num_prompted_layers = 0
        with torch.no_grad():
            projected = model.project_prompts()  # of classes of the code that came with the model
        self.register_buffer("shallow_prompts", None)
        for prompts in projected:
            if isinstance(prompts, torch.Tensor):  # of shallow prompts, which are tokens of the first layer
                self.shallow_prompts = prompts
            elif prompts.key.shape[-2]:
                self.prompt_type = type(prompts)
                self.register_buffer(f"prompt_key_{self.num_prompted_layers}", prompts.key.contiguous())
                self.register_buffer(f"prompt_value_{self.num_prompted_layers}", prompts.value.contiguous())
                self.num_prompted_layers += 1

    def forward(self, pixel_values):
        """`(B, 3, S, S)` -> `(B, E)`, L2-normalised."""
        prompts = [
            self.prompt_type(getattr(self, f"prompt_key_{layer}"), getattr(self, f"prompt_value_{layer}"))
            for layer in range(self.num_prompted_layers)
        ]
        if self.shallow_prompts is not None:
            prompts = [self.shallow_prompts]
        tokens = self.retriever.embed_patches(pixel_values)
        return self.retriever.head(self.retriever.encode(tokens, prompts))


def export_program(model, path, image_processor=None) -> float:
    """Export a retriever with `torch.export`, to be read with `torch.export.load(path).module()`.

    Args:
        model: A [`VPTSPModel`] (or a training model, of which its retriever is taken) in float32.
        path: File to write, by convention `.pt2`. It is replaced only by one that is right.
        image_processor: Whose mean, std and sizes go into the metadata, as the extra file `metadata.json`.

    Returns:
        Largest absolute difference between embeddings of the file and of the model.

    Raises:
        OSError: the file can't be written.
        RuntimeError: the difference is above 1e-4; no file is left.
        ValueError: the model is not float32.
    """
    model = _own_retriever(model)
    metadata = json.dumps(export_metadata(model, image_processor), indent=2, allow_nan=False)

    def write(file):
        content = io.BytesIO()  # torch ends the process where it can't write to a file
        torch.export.save(_traced(model), content, extra_files={"metadata.json": metadata})
        Path(file).write_bytes(content.getbuffer())

    def read(file):
        with Path(file).open("rb") as stream:
            program = torch.export.load(stream).module()
        return lambda pixel_values: program(pixel_values.to(model.device)).cpu()

    return _write_checked(model, Path(path), write, read)


def export_onnx(model, path, image_processor=None) -> float:
    """Export a retriever to ONNX: one file, opset 18, input `pixel_values`, output `embeddings`, dynamic batch.

    Args:
        model: A [`VPTSPModel`] (or a training model, of which its retriever is taken) in float32.
        path: File to write. It is replaced only by one that is right.
        image_processor: Whose mean, std and sizes go into the file's `metadata_props`.

    Returns:
        Largest absolute difference between embeddings of the file, computed by onnxruntime, and of the model.

    Raises:
        ImportError: the packages of `vptsp[export]` are not installed.
        OSError: the file can't be written.
        RuntimeError: the difference is above 1e-4; no file is left.
        ValueError: the model is not float32, or has more than 2 GB of weights.
    """
    _require_onnx()
    import onnxruntime

    model = _own_retriever(model)
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    if size > MAX_ONNX_BYTES:
        raise ValueError(f"an ONNX file holds at most 2 GB, the retriever has {size / 1e9:.1f} GB: use export_program")
    metadata = export_metadata(model, image_processor)

    def write(file):
        exported = torch.onnx.export(
            _traced(model),
            dynamo=True,
            input_names=["pixel_values"],
            output_names=["embeddings"],
            opset_version=OPSET,
            verbose=False,
        )
        exported.model.metadata_props.update(metadata)
        exported.save(file, external_data=False)

    def read(file):
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        return lambda pixel_values: torch.from_numpy(session.run(None, {"pixel_values": pixel_values.numpy()})[0])

    return _write_checked(model, Path(path), write, read)


def export_metadata(model, image_processor=None) -> dict[str, str]:
    """What a user of an exported file must know, as text; lists of numbers are JSON."""
    config = model.config
    values = {
        "producer": f"vptsp {__version__}",
        "backbone": config.backbone or "",
        "backbone_revision": config.backbone_revision or "",
        "embedding_dim": config.embedding_dim,
        "image_size": config.backbone_config.image_size,
    }
    if image_processor is not None:
        size, crop_size = image_processor.size, image_processor.crop_size
        cuts = image_processor.do_resize and image_processor.do_center_crop and crop_size is not None
        if not cuts or size.get("shortest_edge") is None:
            raise ValueError(
                f"the image processor must scale the short side and crop the centre, got {image_processor}"
            )
        crop = crop_size["height"]
        if crop != values["image_size"]:
            raise ValueError(f"the image processor crops to {crop} pixels, but the model takes {values['image_size']}")
        values["resize_size"] = size["shortest_edge"]
        values["resample"] = PILImageResampling(image_processor.resample).name.lower()
        normalisation = Normalisation.of(image_processor)
        values |= {"image_mean": normalisation.mean, "image_std": normalisation.std}
        values["rescale_factor"] = normalisation.scale
    return {
        name: value if isinstance(value, str) else json.dumps(value, allow_nan=False) for name, value in values.items()
    }


def _own_retriever(model):
    refuse_other_adapters(model)
    return model.retriever


def _require_onnx():
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(f"export to ONNX needs {name}: pip install vptsp[export]") from error


def _traced(model):
    """The folded retriever as an `ExportedProgram` with a dynamic batch; two images stand for any number."""
    folded = FoldedRetriever(model)
    example = _images(model, 2).to(model.device)
    with torch.no_grad():
        return torch.export.export(folded, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))


def _images(model, number):
    size = model.config.backbone_config.image_size
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(number))


def _write_checked(model, path, write, read) -> float:
    """Write a file beside `path`, compare, and move it there if it is right."""
    with atomic_path(path) as partial:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module="copyreg")  # of torch, on its own copies
            write(str(partial))
        difference = _largest_difference(model, read(str(partial)))
        if not difference <= TOLERANCE:  # also where it is not a number
            raise RuntimeError(
                f"embeddings of the exported file differ from the retriever's by {difference:.1e}, more than "
                f"{TOLERANCE:.0e}: it was not kept"
            )
    return difference


@torch.no_grad()
def _largest_difference(model, embed) -> float:
    """Between `embed` and the model with its prompts as tokens, over batches of several sizes; NaN where one is.

    Raises:
        RuntimeError: embeddings have another shape.
    """
    differences = []
    for number in CHECKED_BATCH_SIZES:
        pixel_values = _images(model, number)
        tokens = model.embed_patches(pixel_values.to(model.device))
        expected = model.head(model.encode(tokens, model.prompts())).cpu()
        embeddings = embed(pixel_values)
        if embeddings.shape != expected.shape:  # which could be compared all the same, by broadcasting
            raise RuntimeError(
                f"the exported file gives embeddings of shape {tuple(embeddings.shape)} for {number} images, expected "
                f"{tuple(expected.shape)}: it was not kept"
            )
        differences.append((embeddings - expected).abs().max())
    return torch.stack(differences).max().item()  # torch's maximum of NaN and a number is NaN, unlike Python's


def _parse_arguments(argv):
    parser = CommandParser(prog="vptsp export", description=__doc__.split("\n\n")[0])
    parser.add_argument("retriever", help="Hub name or local folder of a saved retriever")
    parser.add_argument("--format", required=True, choices=("onnx", "torch"), help="ONNX, or torch.export's .pt2")
    parser.add_argument("--output", required=True, type=Path, help="file to write")
    parser.add_argument("--revision", help="commit, tag or branch of the retriever on the Hub")
    parser.add_argument("--backbone", help="its backbone: folder or Hub name, where it isn't where the retriever says")
    return parser.parse_args(argv)


def _load(retriever, revision, backbone):
    """The saved retriever in float32, and its image processor; None where none was saved beside it."""
    model = VPTSPModel.from_pretrained(retriever, revision=revision, backbone=backbone, dtype=torch.float32)
    image_processor = load_image_processor(retriever, revision)
    if image_processor is None:
        print(f"note: {retriever} has no image processor, so the file will not say mean, std and resizing")
    return model, image_processor


def main(argv=None):
    """Entry point; exit status 2 and one line on stderr where the export can't be done."""
    args = _parse_arguments(argv)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of torchvision, which is not needed
    disable_progress_bar()  # loading weights takes a second
    try:
        if args.format == "onnx":
            _require_onnx()
        if not args.output.absolute().parent.is_dir():
            raise OSError(f"output: there is no folder {args.output.absolute().parent}")
        retriever = check_model_name(args.retriever, "retriever")
        backbone = None if args.backbone is None else check_model_name(args.backbone, "backbone")
        model, image_processor = _load(retriever, args.revision, backbone)
        export = export_onnx if args.format == "onnx" else export_program
        difference = export(model, args.output, image_processor)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"export: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    opset = f", opset {OPSET}" if args.format == "onnx" else ""
    print(
        f"saved  {args.output}: {args.output.stat().st_size / 1e6:.1f} MB{opset}, "
        f"largest difference {difference:.1e} over batches of {' and '.join(map(str, CHECKED_BATCH_SIZES))}"
    )


if __name__ == "__main__":
    main()


__all__ = ["FoldedRetriever", "export_metadata", "export_onnx", "export_program"]
