"""VPTSP retriever: a frozen vision transformer with tuned prompts and an embedding head.

This file, `backbones_vptsp.py` and `configuration_vptsp.py` are all that a shared retriever needs. The proxies and
losses of training are in `modeling_metric_learning.py`.

Shapes: B images, N tokens (CLS + patches), P prompts, D backbone width, E embedding width.
"""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.utils import SAFE_WEIGHTS_NAME, ModelOutput, cached_file, logging

from .backbones_vptsp import family_of, project_prompts, project_tokens, prompted_forward
from .configuration_vptsp import VPTSPConfig
from .tuning_vptsp import add_tuning


# Arguments of `from_pretrained` that say where files are, and so go to every look-up on the Hub.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "token", "subfolder")


@dataclass
class VPTSPModelOutput(ModelOutput):
    """Output of [`VPTSPModel`].

    Attributes:
        embeddings: `(B, E)` float32 (float64 for a float64 model), L2-normalised.
        pooler_output: The same tensor, under the name that `AutoModel` users look for.
    """

    embeddings: torch.FloatTensor | None = None
    pooler_output: torch.FloatTensor | None = None


class Prompts(nn.Module):
    """Learnable prompt tokens of consecutive layers, Xavier normal (paper section 3.1).

    Layer i has `lengths[i]` of them. All lie in one parameter `tokens` of shape `(sum(lengths), D)`. Each layer's
    tokens are drawn as the first rows of a table of `num_prompts` rows would be. None where there are no prompts.
    """

    def __init__(self, lengths, num_prompts, width):
        super().__init__()
        self.lengths = tuple(lengths)
        self.std = math.sqrt(2.0 / (num_prompts + width))
        self.tokens = nn.Parameter(torch.empty(sum(self.lengths), width)) if sum(self.lengths) else None

    def init_weights(self):
        if self.tokens is not None:
            init.normal_(self.tokens, std=self.std)

    def forward(self):
        """Tokens of each layer, `(P_i, D)`."""
        return () if self.tokens is None else self.tokens.split(self.lengths)


class EmbeddingHead(nn.Module):
    """LayerNorm and a linear layer (Xavier uniform, zero bias) to the embedding width, then L2 normalisation."""

    def __init__(self, pooled_dim, embedding_dim):
        super().__init__()
        self.norm = nn.LayerNorm(pooled_dim)
        self.projection = nn.Linear(pooled_dim, embedding_dim)

    def project(self, pooled):
        """`(B, pooled_dim)` -> `(B, E)`, not yet normalised, in float32 or wider."""
        return at_least_float32(self.projection(self.norm(pooled)))

    def forward(self, pooled):
        """`(B, pooled_dim)` -> `(B, E)`, L2-normalised, in float32 or wider."""
        return F.normalize(self.project(pooled), dim=-1)


def at_least_float32(tensor):
    """Half-precision tensors as float32, others as they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def backbone_fingerprint(state_dict) -> str:
    """Digest of a backbone's weights, from names, shapes and up to 64 values of each tensor, evenly spaced."""
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        tensor = state_dict[name].detach().flatten()
        sample = tensor[:: max(tensor.numel() // 64, 1)][:64].to(device="cpu", dtype=torch.float32)
        digest.update(f"{name} {tuple(state_dict[name].shape)} ".encode())
        digest.update(sample.contiguous().numpy().tobytes())
    return digest.hexdigest()


def load_backbone(config, folder=None, **hub_kwargs):
    """The backbone named in `config.backbone`, in the dtype of its checkpoint.

    Args:
        config: A `VPTSPConfig` with `backbone` set; it gets the place where a local backbone was found.
        folder: Local folder of the retriever that names the backbone. A local backbone is looked for relative to it,
            then relative to the working directory.
        **hub_kwargs: `cache_dir`, `token`, `local_files_only` and the like.

    Raises:
        OSError: there is no such folder here and no such repository on the Hub.
        ValueError: a weight is missing, or the weights are not those that `config.backbone_fingerprint` was taken of.
    """
    source = config.backbone
    if folder is not None and (Path(folder) / source).is_dir():
        source = str(Path(folder) / source)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the weights of a pooler or a classifier are not missed; others are reported below
    try:
        backbone, info = AutoModel.from_pretrained(
            source,
            revision=config.backbone_revision or "main",
            output_loading_info=True,
            **family_of(config.backbone_config).model_options,
            **hub_kwargs,
        )
    except OSError as error:
        raise OSError(
            f"the backbone {config.backbone!r} could not be loaded: it is neither a folder here nor to be had from "
            f"the Hub. Give its place with backbone=... ({error})"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    if info["missing_keys"]:
        raise ValueError(f"the backbone {source!r} lacks {_listed(info['missing_keys'])}")
    config.backbone = source
    if config.backbone_fingerprint not in (None, backbone_fingerprint(backbone.state_dict())):
        raise ValueError(
            f"the weights of the backbone {source!r} are not those that the prompts were tuned with "
            f"(backbone_fingerprint {config.backbone_fingerprint[:12]} expected)"
        )
    return backbone


def _relative_to(backbone, folder):
    """A local backbone's path as seen from `folder`, so that both can be moved together; other names as they are."""
    if backbone is None or not Path(backbone).is_dir():
        return backbone
    try:
        return Path(os.path.relpath(backbone, folder)).as_posix()
    except ValueError:  # another drive
        return str(Path(backbone).resolve())


def _listed(names, at_most=8):
    names = sorted(names)
    return ", ".join(names[:at_most]) + (f" and {len(names) - at_most} more" if len(names) > at_most else "")


def _refuse_differences(missing, unknown, source, shapes=()):
    """Raise if a checkpoint holds other tensors than the model."""
    problems = (("lacks", missing), ("has unknown", unknown), ("has", shapes))
    found = [f"{verb} {_listed(names)}" for verb, names in problems if names]
    if found:
        raise ValueError(f"the checkpoint {str(source)!r} {' and '.join(found)}")


class VPTSPPreTrainedModel(PreTrainedModel):
    """What retriever and training model share: building on a backbone, freezing, saving only what is tuned."""

    config_class = VPTSPConfig
    base_model_prefix = "vptsp"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ("ViTEmbeddings", "ViTLayer")
    _supports_sdpa = True
    _supports_attention_backend = True
    # The loss is a mean over the batch: the Trainer has to scale it for gradient accumulation.
    accepts_loss_kwargs = False

    @torch.no_grad()
    def _init_weights(self, module):
        if hasattr(module, "init_weights") and not isinstance(module, PreTrainedModel):
            module.init_weights()
        elif isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)

    def freeze_backbone(self):
        """Let gradients reach only what the configuration says is tuned."""
        tuned = self.tuned_names()
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in tuned)

    def tuned_names(self) -> set[str]:
        """Names in `state_dict()` of everything but the frozen backbone."""
        bitfit = self.config.bitfit
        return {
            name
            for name in self.state_dict()
            if "backbone" not in name.split(".") or (bitfit and name.endswith(".bias"))
        }

    def train(self, mode: bool = True):
        """Set the training mode of everything but the backbone, which always computes as in evaluation."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, VPTSPModel):
                module.backbone.eval()
        return self

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None, **kwargs):
        """Recompute layers in the backward pass; non-reentrant, since a frozen backbone's input needs no gradient.

        Raises:
            ValueError: `use_reentrant=True` was asked for; no gradient would reach the prompts.
        """
        options = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        if options["use_reentrant"]:
            raise ValueError("gradient checkpointing of prompts needs use_reentrant=False, got True")
        self._activation_checkpointing_enable(options, **kwargs)

    @classmethod
    def from_backbone(cls, backbone, revision=None, dtype=None, **kwargs):
        """A new model on a pretrained backbone, with untrained prompts and heads.

        Args:
            backbone: Hub name or local folder of a vision transformer.
            revision: Commit, tag or branch on the Hub.
            dtype: Of the weights; None for float32.
            **kwargs: Fields of `VPTSPConfig`, and `cache_dir`, `token`, `local_files_only` and the like for the Hub.

        Raises:
            ValueError: an argument is no field of `VPTSPConfig`, or the backbone is not supported.
        """
        hub_kwargs = {key: kwargs.pop(key) for key in HUB_ARGUMENTS if key in kwargs}
        known = {field.name for field in fields(VPTSPConfig)}
        if unknown := set(kwargs) - known:
            raise ValueError(f"VPTSPConfig has no field {_listed(unknown)}")
        backbone_config = AutoConfig.from_pretrained(backbone, revision=revision or "main", **hub_kwargs)
        family_of(backbone_config)
        config = VPTSPConfig(
            backbone_config=backbone_config, backbone=str(backbone), backbone_revision=revision, **kwargs
        )
        weights = load_backbone(config, **hub_kwargs).state_dict()
        config.backbone_fingerprint = backbone_fingerprint(weights)
        model = cls(config)
        model.retriever.backbone.load_state_dict(weights, strict=True)
        return model.to(dtype or torch.float32)

    @property
    def retriever(self) -> VPTSPModel:
        """The part that embeds images and is shared."""
        return self if isinstance(self, VPTSPModel) else self.vptsp

    def save_pretrained(self, save_directory, state_dict=None, save_backbone=None, **kwargs):
        """Save what is tuned; the frozen backbone is only named, unless `save_backbone`.

        Args:
            save_directory: Folder to write to.
            state_dict: Weights to save instead of the model's own.
            save_backbone: Save the backbone too; None for what the configuration says. A backbone that has no name is
                always saved.
            **kwargs: As for `PreTrainedModel.save_pretrained`, `push_to_hub` among them.
        """
        if save_backbone is not None:
            self.config.save_backbone = save_backbone
        if self.config.backbone is None:
            self.config.save_backbone = True
        state_dict = self.state_dict() if state_dict is None else state_dict
        if not self.config.save_backbone:
            tuned = self.tuned_names()
            state_dict = {name: tensor for name, tensor in state_dict.items() if name in tuned}
        kwargs["save_original_format"] = False
        backbone = self.config.backbone
        try:
            self.config.backbone = _relative_to(backbone, save_directory)
            super().save_pretrained(save_directory, state_dict=state_dict, **kwargs)
        finally:
            self.config.backbone = backbone

    def load_saved(self, folder):
        """Load what `save_pretrained` wrote for this very configuration, in place and strictly.

        Args:
            folder: Local folder with `model.safetensors`.

        Raises:
            ValueError: tensors are missing, unknown or of another shape.
        """
        saved = load_file(Path(folder) / SAFE_WEIGHTS_NAME)
        own = self.state_dict()
        expected = set(own) if self.config.save_backbone else self.tuned_names()
        shapes = [
            f"{name} {tuple(saved[name].shape)} instead of {tuple(own[name].shape)}"
            for name in set(saved) & set(own)
            if saved[name].shape != own[name].shape
        ]
        _refuse_differences(expected - set(saved), set(saved) - set(own), folder, shapes)
        self.load_state_dict(saved, strict=False)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, backbone=None, **kwargs):
        """Load tuned weights and put them on the backbone that they name.

        Args:
            pretrained_model_name_or_path: Hub name or local folder of a saved model.
            config: Configuration to use instead of the saved one.
            backbone: Hub name or folder of the backbone's weights, where they are not where the configuration says.
            **kwargs: As for `PreTrainedModel.from_pretrained`.

        Raises:
            OSError: a file is not to be had.
            ValueError: the checkpoint has missing or unknown tensors, or the backbone is another than that tuned with.
        """
        if pretrained_model_name_or_path is None:
            return super().from_pretrained(None, *model_args, config=config, **kwargs)
        hub_kwargs = {key: kwargs.pop(key) for key in HUB_ARGUMENTS if key in kwargs}
        revision = kwargs.pop("revision", None) or "main"
        return_info = kwargs.pop("output_loading_info", False)
        kwargs = {key: value for key, value in kwargs.items() if key not in ("trust_remote_code", "adapter_kwargs")}
        if config is None:
            config = cls.config_class.from_pretrained(pretrained_model_name_or_path, revision=revision, **hub_kwargs)
        known = {field.name for field in fields(config)}
        for key in [key for key in kwargs if key in known and key != "dtype"]:
            setattr(config, key, kwargs.pop(key))
        config.validate_fields()
        weights = cached_file(pretrained_model_name_or_path, SAFE_WEIGHTS_NAME, revision=revision, **hub_kwargs)
        state_dict = load_file(weights)
        from_retriever = not any(name.startswith("vptsp.") for name in state_dict)
        state_dict = cls._named_as_here(state_dict, from_retriever)
        if not config.save_backbone:
            if backbone is not None:
                config.backbone, config.backbone_revision = str(backbone), None
            folder = pretrained_model_name_or_path if Path(pretrained_model_name_or_path).is_dir() else None
            backbone_kwargs = {key: value for key, value in hub_kwargs.items() if key != "subfolder"}
            frozen = load_backbone(config, folder=folder, **backbone_kwargs).state_dict()
            prefix = "backbone." if issubclass(cls, VPTSPModel) else "vptsp.backbone."
            state_dict = {prefix + name: tensor for name, tensor in frozen.items()} | state_dict
        model, info = super().from_pretrained(
            None, *model_args, config=config, state_dict=state_dict, output_loading_info=True, **kwargs
        )
        missing, unknown = set(info["missing_keys"]), set(info["unexpected_keys"])
        if from_retriever:  # proxies and the like start anew
            missing = {name for name in missing if model is model.retriever or name.startswith("vptsp.")}
        _refuse_differences(missing, unknown, pretrained_model_name_or_path)
        model.freeze_backbone()
        return (model, info) if return_info else model

    @classmethod
    def _named_as_here(cls, state_dict, from_retriever):
        """Tensors of a retriever or of a training model, under the names that they have in this class."""
        if issubclass(cls, VPTSPModel) and not from_retriever:
            return {name[6:]: tensor for name, tensor in state_dict.items() if name.startswith("vptsp.")}
        if not issubclass(cls, VPTSPModel) and from_retriever:
            return {f"vptsp.{name}": tensor for name, tensor in state_dict.items()}
        return state_dict


class VPTSPModel(VPTSPPreTrainedModel):
    """Retriever: images to L2-normalised embeddings, by a frozen vision transformer with tuned prompts.

    Method of Ren et al., ICLR 2024, section 3.1; the prompts run as in VPT-deep (Jia et al., ECCV 2022).
    """

    def __init__(self, config: VPTSPConfig):
        super().__init__(config)
        if config.backbone_config is None:
            raise ValueError("backbone_config must be set to build a model, got None; see from_backbone")
        self.family = family_of(config.backbone_config)
        self.backbone = self.family.build(config.backbone_config)
        self.prompts = Prompts(config.prompt_lengths, config.num_prompts, config.backbone_config.hidden_size)
        self.head = EmbeddingHead(config.pooled_dim, config.embedding_dim)
        self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        add_tuning(self)
        self._kept_prompts = None
        self.post_init()
        self.freeze_backbone()

    def forward(self, pixel_values, interpolate_pos_encoding=False, return_dict=None, **kwargs):
        """Embed images.

        Args:
            pixel_values: `(B, 3, height, width)` float, normalised as the backbone expects.
            interpolate_pos_encoding: Take images of another size than the backbone's, with its position embeddings
                interpolated.
            return_dict: False gives a tuple.

        Returns:
            [`VPTSPModelOutput`].

        Raises:
            ValueError: `pixel_values` is missing, of a wrong shape or not floating point.
        """
        tokens = self.embed_patches(pixel_values, interpolate_pos_encoding)
        embeddings = self.embedding_dropout(self.head(self.encode(tokens, self.prompts_for_inference())))
        output = VPTSPModelOutput(embeddings=embeddings, pooler_output=embeddings)
        return output if return_dict is not False else output.to_tuple()

    def embed_patches(self, pixel_values, interpolate_pos_encoding=False):
        """`(B, 3, height, width)` -> tokens that every pass starts from, `(B, N, D)`."""
        if pixel_values is None or pixel_values.dim() != 4:
            shape = None if pixel_values is None else tuple(pixel_values.shape)
            raise ValueError(f"pixel_values must have shape (B, 3, height, width), got {shape}")
        if not pixel_values.is_floating_point():
            raise ValueError(f"pixel_values must be normalised floats, got {pixel_values.dtype}")
        return self.family.embed(self.backbone, pixel_values, interpolate_pos_encoding)

    def prompts_for_inference(self):
        """The shared prompts: tokens while they are tuned, else their keys and values, computed once and kept.

        Kept until a weight that they come from, its dtype or its device changes.
        """
        tokens = self.prompts()
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or not tokens:
            return tokens
        layers = self.family.layers(self.backbone)[: len(tokens)]
        # a tuning method may act on prompts too: all that is tuned beside the backbone counts
        sources = [p for name, part in self.named_children() if name != "backbone" for p in part.parameters()]
        sources += [p for layer in layers for m in self.family.key_value_modules(layer) for p in m.parameters()]
        if any(source.is_inference() for source in sources):  # has no version to tell a change by
            return tokens
        device = tokens[0].device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        state = [autocast, *((p.data_ptr(), p._version, p.dtype, p.device) for p in sources)]
        if self._kept_prompts is None or self._kept_prompts[0] != state:
            kept = [
                project_prompts(self.family, layer, layer_tokens)
                for layer, layer_tokens in zip(layers, tokens, strict=True)
            ]
            self._kept_prompts = (state, kept)
        return self._kept_prompts[1]

    def _apply(self, fn, recurse=True):
        self._kept_prompts = None  # a change of dtype or device moves weights without a new version
        return super()._apply(fn, recurse)

    def project_first_layer(self, tokens):
        """What every pass over the same tokens computes in the first layer, to be given to `encode`.

        None where it is not worth keeping: with gradient checkpointing, or only one layer.
        """
        first, *others = self.family.layers(self.backbone)
        if not others or getattr(first, "gradient_checkpointing", False):
            return None
        return project_tokens(self.family, first, tokens)

    def encode(self, tokens, prompts=(), prompt_rows=None, first_layer=None):
        """Tokens `(B, N, D)` through the prompted layers, pooled: `(B, pooled_dim)`. See `prompted_forward`."""
        prefix_only = self.config.pooling == "cls"
        hidden = prompted_forward(self.family, self.backbone, tokens, prompts, prompt_rows, prefix_only, first_layer)
        cls_token = hidden[:, 0]
        if prefix_only:
            return cls_token
        mean = hidden[:, self.family.num_prefix_tokens :].mean(dim=1)
        return mean if self.config.pooling == "mean" else torch.cat([cls_token, mean], dim=-1)

    def embed_with_backbone(self, pixel_values, interpolate_pos_encoding=False):
        """Embeddings of the backbone alone, without prompts or head: the line to beat. `(B, pooled_dim)`, normalised.

        With BitFit the backbone's biases are tuned, so this is the frozen backbone only before training.
        """
        pooled = self.encode(self.embed_patches(pixel_values, interpolate_pos_encoding))
        return F.normalize(at_least_float32(pooled), dim=-1)


VPTSPModel.register_for_auto_class("AutoModel")

__all__ = ["VPTSPModel", "VPTSPModelOutput", "VPTSPPreTrainedModel"]
