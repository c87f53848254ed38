"""What retriever and training model share: building on a backbone, freezing it, saving and loading only what is tuned.

Part of what a shared retriever needs, like `modeling_vptsp.py`.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import tempfile
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import hf_api

from .configuration_vptsp import VPTSPConfig
from .lora_vptsp import LORA_INSTEAD, is_lora, names_with_lora, refuse_other_adapters
from .open_backbone_vptsp import (
    backbone_fingerprint,
    load_backbone,
    name_before,
    name_today,
    open_config,
    pinned_revision,
    read_weights,
    refuse_local_backbone,
    relative_to,
)


# Arguments of `from_pretrained` that say where files are, and so go to every look-up on the Hub.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "token", "subfolder")


@contextmanager
def _written_aside(folder):
    """A folder to write files to, each of which then replaces that of its name in `folder` in one step.

    If the block raises, nothing is replaced. The configuration, which makes a folder a model, comes last.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as aside:
        yield Path(aside)
        for path in sorted(Path(aside).iterdir(), key=lambda path: path.name == CONFIG_NAME):
            with path.open("rb+") as stream:  # what is renamed must be on the disk before its name is
                os.fsync(stream.fileno())
            path.replace(folder / path.name)


def _safetensors_file(name, revision, **hub_kwargs):
    file = cached_file(
        name, SAFE_WEIGHTS_NAME, revision=revision, _raise_exceptions_for_missing_entries=False, **hub_kwargs
    )
    if file is None:
        raise OSError(
            f"{str(name)!r} holds no {SAFE_WEIGHTS_NAME}: retrievers are read from safetensors alone, never from "
            "pickled files such as pytorch_model.bin"
        )
    return file


def _listed(names, at_most=8):
    names = sorted(names)
    return ", ".join(names[:at_most]) + (f" and {len(names) - at_most} more" if len(names) > at_most else "")


def _refuse_differences(missing, unknown, source, others=()):
    """Raise if a checkpoint holds other tensors than the model."""
    problems = (("lacks", missing), ("has unknown", unknown), ("has", others))
    found = [f"{verb} {_listed(names)}" for verb, names in problems if names]
    if found:
        raise ValueError(f"the checkpoint {str(source)!r} {' and '.join(found)}")


def _others(saved, own, may_round):
    """Tensors of a checkpoint that are not what the model has under their names, described.

    Args:
        saved: Name -> tensor of the checkpoint.
        own: Name -> tensor of the model.
        may_round: Whether values may lose digits, since somebody asked for the model's dtype.
    """
    found = []
    for name in sorted(set(saved) & set(own)):
        tensor, expected = saved[name], own[name]
        if tensor.shape != expected.shape:
            found.append(f"{name} {tuple(tensor.shape)} instead of {tuple(expected.shape)}")
        elif tensor.is_floating_point() != expected.is_floating_point() or not (
            may_round or torch.promote_types(tensor.dtype, expected.dtype) == expected.dtype
        ):
            found.append(f"{name} in {tensor.dtype} instead of {expected.dtype}")
    return found


def _widest_dtype(state_dict):
    """The floating-point dtype that holds all values of a checkpoint, None where it has none."""
    dtypes = {tensor.dtype for tensor in state_dict.values() if tensor.is_floating_point()}
    return functools.reduce(torch.promote_types, dtypes) if dtypes else None


def _named_as_in(frozen, saved, model_type):
    """Saved tensors under the names that the backbone's have in this version of transformers.

    A second one for the same name keeps its own, and so is unknown.
    """
    renamed = {name: tensor for name, tensor in saved.items() if name in frozen}
    for name in saved.keys() - renamed.keys():
        names = (name_today(name, model_type), name_before(name, model_type))
        renamed[next((n for n in names if n in frozen and n not in renamed), name)] = saved[name]
    return renamed


class VPTSPPreTrainedModel(PreTrainedModel):
    """What retriever and training model share: building on a backbone, freezing, saving only what is tuned."""

    config_class = VPTSPConfig
    base_model_prefix = "vptsp"
    # Where the retriever's tensors lie in `state_dict()`; empty for the retriever itself.
    retriever_prefix = "vptsp."
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = tuple(
        f"{family}{part}" for family in ("ViT", "DeiT", "Dinov2") for part in ("Embeddings", "Layer")
    )
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
        """Names in `state_dict()` of everything but the frozen part of the backbone."""
        config = self.config
        return {
            name
            for name in self.state_dict()
            if config.tune_backbone
            or "backbone" not in name.split(".")
            or (config.bitfit and name.endswith(".bias"))
            or (config.lora_rank and is_lora(name))
        }

    def train(self, mode: bool = True):
        """Set the training mode; a backbone that is not tuned as a whole always computes as in evaluation."""
        super().train(mode)
        self.retriever.backbone.train(mode and self.config.tune_backbone)
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
    def from_backbone(cls, backbone, revision=None, dtype=None, image_size=None, **kwargs):
        """A new model on a pretrained backbone, with untrained prompts and heads.

        Args:
            backbone: Hub name or local folder of a vision transformer, in transformers' or timm's format.
            revision: Commit, tag or branch on the Hub; the configuration gets the commit.
            dtype: Of the weights; None for float32.
            image_size: Side of the images in pixels, a multiple of the patch size. Where the backbone was trained with
                another, its position embeddings are interpolated, once. None: the backbone's.
            **kwargs: Fields of `VPTSPConfig`, and `cache_dir`, `token`, `local_files_only` and the like for the Hub.

        Raises:
            ValueError: an argument is no field of `VPTSPConfig`, or the backbone is not supported or not for images
                of this size.
        """
        hub_kwargs = {key: kwargs.pop(key) for key in HUB_ARGUMENTS if key in kwargs}
        known = {field.name for field in fields(VPTSPConfig)}
        if unknown := set(kwargs) - known:
            raise ValueError(f"VPTSPConfig has no field {_listed(unknown)}")
        revision = pinned_revision(backbone, revision, **hub_kwargs)
        backbone_config = open_config(backbone, revision, image_size, **hub_kwargs)
        config = VPTSPConfig(
            backbone_config=backbone_config, backbone=str(backbone), backbone_revision=revision, **kwargs
        )
        weights = load_backbone(config, **hub_kwargs)
        model = cls(config)
        backbone = model.retriever.backbone
        new = {name: tensor for name, tensor in backbone.state_dict().items() if is_lora(name)}
        backbone.load_state_dict(names_with_lora(weights, config) | new, strict=True)
        return model.to(dtype or torch.float32)

    def add_adapter(self, *args, **kwargs):
        """Refused: adapters of PEFT are not saved with a retriever. LoRA is `lora_rank` of [`VPTSPConfig`].

        Raises:
            ValueError: always.
        """
        raise ValueError(f"{type(self).__name__} takes no adapters of PEFT, which would not be saved: {LORA_INSTEAD}")

    load_adapter = add_adapter

    @property
    def retriever(self):
        """The [`VPTSPModel`]: the part that embeds images and is shared."""
        return self.vptsp if self.retriever_prefix else self

    def save_pretrained(self, save_directory, state_dict=None, save_backbone=None, place=None, **kwargs):
        """Save what is tuned; the frozen backbone is only named, unless `save_backbone`.

        Files are written aside and then renamed, so that none is ever half of what it was or is to be.

        Args:
            save_directory: Folder to write to.
            state_dict: Weights to save instead of the model's own.
            save_backbone: Save the backbone too; None for what the configuration says. A backbone that has no name is
              place: Folder that the caller will move the files to, as seen from which a local backbone is named; None
                for `save_directory`.
            **kwargs: As for `PreTrainedModel.save_pretrained`.

        Raises:
            ValueError: `push_to_hub` was asked for, use the method of that name; `max_shard_size`, since it is all one
                file; `save_backbone=False`, but all of the backbone is tuned; or PEFT has changed the model.
        """
        if kwargs.get("push_to_hub"):
            raise ValueError("save_pretrained does not push: use model.push_to_hub(repo_id)")
        if kwargs.get("max_shard_size") is not None:
            raise ValueError(f"save_pretrained writes one {SAFE_WEIGHTS_NAME}: leave max_shard_size out")
        refuse_other_adapters(self)
        if save_backbone is False and self.config.tune_backbone:
            raise ValueError("save_backbone must be true with tune_backbone, got False: all of the backbone is tuned")
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
            self.config.backbone = relative_to(backbone, save_directory if place is None else place)
            if self.config.save_backbone and backbone is not None and Path(backbone).is_dir():
                self.config.backbone = None  # saved along: where it came from says nothing elsewhere
            writes = kwargs.get("is_main_process", True)
            with _written_aside(Path(save_directory)) if writes else nullcontext(save_directory) as aside:
                super().save_pretrained(aside, state_dict=state_dict, **kwargs)
        finally:
            self.config.backbone = backbone

    def push_to_hub(
        self,
        repo_id,
        *,
        commit_message="Upload retriever",
        commit_description=None,
        private=None,
        token=None,
        revision=None,
        create_pr=False,
        save_backbone=None,
    ):
        """Upload what `save_pretrained` saves, with a model card if the repository has none yet.

        `VPTSPTrainer.push_to_hub` uploads more: the image processor, scores, the picture.

        Args:
            repo_id: Repository on the Hub, `owner/name`; made if there is none.
            commit_message: Of the commit.
            commit_description: Of the commit.
            private: Whether a new repository is private; None for the owner's default.
            token: Token of the Hub; None for the one that `hf auth login` keeps.
            revision: Branch; made if there is none.
            create_pr: Open a pull request instead.
            save_backbone: As for `save_pretrained`.

        Returns:
            `huggingface_hub.CommitInfo`.

        Raises:
            ValueError: the backbone is a folder of this machine, which nobody else has.
        """
        self.require_shareable(save_backbone)
        api = hf_api()
        repo_id = api.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, token=token, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.retriever.save_pretrained(folder, save_backbone=save_backbone)
            # Code that came along with a shared retriever has no writer of cards.
            has_writer = importlib.util.find_spec(".model_card_vptsp", __package__) is not None
            if has_writer and not api.file_exists(repo_id, "README.md", revision=revision, token=token):
                writer = importlib.import_module(".model_card_vptsp", __package__)
                writer.retriever_card(self, repo_id).save(Path(folder) / "README.md")
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message,
                commit_description=commit_description,
                token=token,
                revision=revision,
                create_pr=create_pr,
            )

    def require_shareable(self, save_backbone=None):
        """Raise a `ValueError` if others could not load the retriever, since its backbone is a folder of this machine
        or since PEFT has changed it.

        Args:
            save_backbone: As for `save_pretrained`.
        """
        refuse_other_adapters(self)
        backbone = self.config.backbone
        saved_along = self.config.save_backbone if save_backbone is None else save_backbone
        if backbone is not None and not saved_along and Path(backbone).is_dir():
            raise ValueError(
                f"the backbone is the local folder {backbone!r}, which others don't have: push with "
                "save_backbone=True, or name the same weights on the Hub with model.config.backbone = 'owner/name'"
            )

    def load_saved(self, folder):
        """Load what `save_pretrained` wrote for this very configuration, in place and strictly.

        Args:
            folder: Local folder with `model.safetensors`.

        Raises:
            ValueError: tensors are missing, unknown, of another shape or a wider dtype, or the file is damaged.
        """
        saved = read_weights(Path(folder) / SAFE_WEIGHTS_NAME)
        own = self.state_dict()
        expected = set(own) if self.config.save_backbone else self.tuned_names()
        others = _others(saved, own, may_round=False)
        _refuse_differences(expected - set(saved), set(saved) - expected, folder, others)
        self.load_state_dict(saved, strict=False)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, backbone=None, **kwargs):
        """Load tuned weights and put them on the backbone that they name.

        Without `dtype`, weights are loaded in the one that they were saved in (the widest, of several).

        Args:
            pretrained_model_name_or_path: Hub name or local folder of a saved model.
            config: Configuration to use instead of the saved one.
            backbone: Hub name or folder of the backbone's weights, where they are not where the configuration says.
            **kwargs: As for `PreTrainedModel.from_pretrained`, but for `variant` and `ignore_mismatched_sizes`.

        Raises:
            OSError: a file is not to be had, or the weights are not in safetensors.
            ValueError: the checkpoint has missing or unknown tensors, or some of another shape or kind of numbers; the
                backbone is another than that tuned with; a file is damaged; a retriever from the Hub names a backbone
                that is not on the Hub; or an argument is refused.
        """
        if pretrained_model_name_or_path is None:
            return super().from_pretrained(None, *model_args, config=config, **kwargs)
        for name in ("variant", "ignore_mismatched_sizes"):
            if kwargs.pop(name, None):
                raise ValueError(f"{name} is not for {cls.__name__}: there is one {SAFE_WEIGHTS_NAME}, read as it is")
        hub_kwargs = {key: kwargs.pop(key) for key in HUB_ARGUMENTS if key in kwargs}
        revision = kwargs.pop("revision", None) or "main"
        return_info = kwargs.pop("output_loading_info", False)
        kwargs = {key: value for key, value in kwargs.items() if key not in ("trust_remote_code", "adapter_kwargs")}
        dtype_given = any(kwargs.get(name) not in (None, "auto") for name in ("dtype", "torch_dtype"))
        if config is None:
            config = cls.config_class.from_pretrained(pretrained_model_name_or_path, revision=revision, **hub_kwargs)
        else:  # `AutoModel` has put backbone=... and dtype=... into the configuration
            saved, _ = config.get_config_dict(pretrained_model_name_or_path, revision=revision, **hub_kwargs)
            if backbone is None and config.backbone != saved.get("backbone"):
                backbone = config.backbone
            given, stored = (str(dtype).removeprefix("torch.") for dtype in (config.dtype, saved.get("dtype")))
            dtype_given = dtype_given or given not in ("None", stored)
        known = {field.name for field in fields(config)}
        for key in [key for key in kwargs if key in known and key != "dtype"]:
            setattr(config, key, kwargs.pop(key))
        config.validate_fields()
        saved = read_weights(_safetensors_file(pretrained_model_name_or_path, revision, **hub_kwargs))
        from_retriever = not any(name.startswith("vptsp.") for name in saved)
        saved = cls._named_as_here(saved, from_retriever)
        if not dtype_given:
            kwargs["dtype"] = _widest_dtype(saved) or config.dtype
        frozen = {}
        if not config.save_backbone:
            frozen = cls._frozen_weights(config, pretrained_model_name_or_path, backbone, hub_kwargs)
            saved = _named_as_in(frozen, saved, config.backbone_config.model_type)
        # Tensors read from a file lie at odd addresses, from which some kernels round otherwise; copies are aligned.
        state_dict = {name: tensor.clone() for name, tensor in (frozen | saved).items()}
        model, info = super().from_pretrained(
            None,
            *model_args,
            config=config,
            state_dict=state_dict,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            **kwargs,
        )
        model._refuse_incomplete(saved, info, from_retriever, pretrained_model_name_or_path)
        model.freeze_backbone()
        if not from_retriever:
            model.load_beside(
                lambda name: cached_file(pretrained_model_name_or_path, name, revision=revision, **hub_kwargs)
            )
        return (model, info) if return_info else model

    @classmethod
    def _frozen_weights(cls, config, source, backbone, hub_kwargs):
        """The backbone's own weights under the names that they have in this class.

        Args:
            config: The configuration; it gets the place of the backbone, as from `load_backbone`.
            source: Hub name or local folder of the retriever.
            backbone: Where the weights are, None for what the configuration says.
            hub_kwargs: `HUB_ARGUMENTS` with which the retriever is loaded.
        """
        if backbone is not None:
            config.backbone, config.backbone_revision = str(backbone), None
        folder = None
        if Path(source).is_dir():
            folder = Path(source, hub_kwargs.get("subfolder") or "")
        elif backbone is None:
            refuse_local_backbone(config.backbone, source)
        hub_kwargs = {key: value for key, value in hub_kwargs.items() if key != "subfolder"}
        weights = names_with_lora(load_backbone(config, folder=folder, **hub_kwargs), config)
        return {f"{cls.retriever_prefix}backbone.{name}": tensor for name, tensor in weights.items()}

    def _refuse_incomplete(self, saved, info, from_retriever, source):
        """Raise a `ValueError` unless all that this model should have come from its checkpoint did.

        What the backbone would fill in as well counts too: a tuned bias must not become the pretrained one.

        Args:
            saved: Name -> tensor of the checkpoint.
            info: What transformers reports of the loading.
            from_retriever: Whether the checkpoint is a retriever's; in a training model, the rest starts anew.
            source: The checkpoint's name.
        """
        missing, unknown = set(info["missing_keys"]), set(info["unexpected_keys"])
        if not self.config.save_backbone:
            tuned = self.tuned_names()
            missing, unknown = missing | (tuned - set(saved)), unknown | (set(saved) - tuned)
        if from_retriever:
            missing = {name for name in missing if name.startswith(self.retriever_prefix)}
        _refuse_differences(missing, unknown, source, _others(saved, self.state_dict(), may_round=True))

    def load_beside(self, find):
        """Load what a subclass saves in files of its own.

        Args:
            find: Gives the local path of a file of the checkpoint, by its name.
        """

    @classmethod
    def _named_as_here(cls, state_dict, from_retriever):
        """Tensors of a retriever or of a training model, under the names that they have in this class."""
        if not cls.retriever_prefix and not from_retriever:
            return {name[6:]: tensor for name, tensor in state_dict.items() if name.startswith("vptsp.")}
        if cls.retriever_prefix and from_retriever:
            return {f"vptsp.{name}": tensor for name, tensor in state_dict.items()}
        return state_dict


__all__ = ["VPTSPPreTrainedModel", "backbone_fingerprint", "load_backbone", "pinned_revision"]
