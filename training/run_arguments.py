"""What a run is asked to do: the options of `train.py`, the YAML file they may come from, and what can't work."""

from __future__ import annotations

import json
from dataclasses import MISSING, field, fields, make_dataclass
from pathlib import Path
from typing import get_type_hints

import torch
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import PreTrainedConfig

from ..configuration_vptsp import RANGES, VPTSPConfig, check_field
from ..data_scripts.data_arguments import DataArguments, check_data_arguments, check_output_apart, data_hints
from ..files.json_files import without_duplicates
from ..loading_vptsp import find_backbone, resized_config
from ..losses.loss_registry import check_loss
from ..modeling_vptsp import VPTSPModel
from .argument_values import TRAINING_BOUNDS, TRAINING_CHOICES, training_hints
from .arguments import VPTSPTrainingArguments
from .command_help import USAGE, options_text
from .command_line import (
    BOUNDS,
    CHOICES,
    OptionParser,
    RunArguments,
    checked_values,
    refuse_unread,
    split_command_line,
)
from .head_start import check_head_init
from .output_folder import check_output_folder
from .run_errors import ConfigError
from .unsupported_arguments import NOT_OFFERED


# Fields of VPTSPConfig that follow from the data or the backbone and so are nobody's to set.
DERIVED = ("num_classes", "backbone_fingerprint", "format_version")
# Mappings, which the command line gives as JSON.
_MAPPINGS = ("backbone_config", "loss_kwargs", "miner_kwargs", "tuning_kwargs", "peft_config")


def model_arguments_class():
    """A dataclass of the fields of `VPTSPConfig` that a user may set, for `HfArgumentParser`."""
    inherited = {item.name for item in fields(PreTrainedConfig)} | set(DERIVED)
    own = [item for item in fields(VPTSPConfig) if item.name not in inherited]
    help_texts = documented_fields(VPTSPConfig.__doc__)
    columns = []
    for item in own:
        kind = "str | None" if item.name in _MAPPINGS else item.type
        default = None if item.default is MISSING else item.default
        text = help_texts[item.name].replace("%", "%%")
        columns.append((item.name, kind, field(default=default, metadata={"help": text})))
    return make_dataclass("ModelArguments", columns)


def documented_fields(docstring) -> dict[str, str]:
    """Field -> text, from the `Args` section of a class's docstring."""
    texts, name = {}, None
    for line in docstring.partition("Args:")[2].partition("Raises:")[0].splitlines():
        if line.startswith(" " * 8) and not line.startswith(" " * 9):
            name, _, text = line.strip().partition(": ")
            texts[name] = text
        elif name is not None and line.strip():
            texts[name] += " " + line.strip()
    return texts


def all_options_text(prog) -> str:
    """What `--help-all` prints: every option that is not refused in any case, by where it comes from."""
    offered = [item for item in fields(VPTSPTrainingArguments) if item.init and item.name not in NOT_OFFERED]
    own = [item for item in offered if item.name in VPTSPTrainingArguments.__annotations__]
    others = [item for item in offered if item not in own]
    model = model_arguments_class()
    groups = {
        "the model": fields(model),
        "the data": fields(DataArguments),
        "the run": [*own, *fields(RunArguments)],
        "the run, from transformers.TrainingArguments": others,
    }
    # As they are written: a parser that was made before has simplified the fields' own types.
    classes = (model, *DataArguments.__mro__, *VPTSPTrainingArguments.__mro__, RunArguments)
    kinds = {}
    for cls in classes:
        kinds = {**vars(cls).get("__annotations__", {}), **kinds}
    return options_text(prog, groups, kinds)


def parse_arguments(argv, prog="train.py"):
    """Command line after `prog` -> (model fields that were given, training, data and run arguments).

    Raises:
        ConfigError: the YAML file can't be read, or it or the command line holds something unknown or out of range.
    """
    classes = (model_arguments_class(), VPTSPTrainingArguments, DataArguments, RunArguments)
    parser = OptionParser(classes, prog=prog, usage=USAGE)
    path, values, argv = split_command_line(argv)
    hints = {**get_type_hints(classes[0]), **dict.fromkeys(_MAPPINGS, dict | str | None)}
    hints |= {**data_hints(), **get_type_hints(RunArguments), **training_hints(VPTSPTrainingArguments)}
    known = {item.name for cls in classes for item in fields(cls) if item.init}
    bounds, choices = {**TRAINING_BOUNDS, **BOUNDS}, {**TRAINING_CHOICES, **CHOICES}
    values = checked_values(path, values, known, hints, bounds, choices)
    _check_model_fields(path, values)
    parser.set_defaults(**values)
    try:
        model_args, training_args, data_args, run_args, left = parser.parse_args_into_dataclasses(
            argv, look_for_args_file=False, return_remaining_strings=True
        )
        refuse_unread(left, known)
    except (ValueError, ImportError) as error:
        raise ConfigError(str(error)) from error
    model_fields = vars(model_args)
    for name in _MAPPINGS:
        is_path = name == "peft_config" and not str(model_fields[name]).lstrip().startswith("{")
        if isinstance(model_fields[name], str) and not is_path:
            try:
                model_fields[name] = json.loads(
                    model_fields[name], object_pairs_hook=without_duplicates, parse_constant=_no_number
                )
            except (ValueError, RecursionError) as error:
                holds = "JSON with a model_type" if name == "backbone_config" else "a JSON mapping"
                raise ConfigError(f"{name} must be {holds}: {error}") from error
    return model_fields, training_args, data_args, run_args


def _check_model_fields(path, values):
    """A ConfigError that names the file if it has a field of the model that is out of its range."""
    for name, value in values.items():
        if name in VPTSPConfig.__annotations__ and name not in _MAPPINGS:
            try:
                check_field(name, value, VPTSPConfig.__annotations__[name], RANGES.get(name))
            except ValueError as error:
                raise ConfigError(f"{path}: {error}") from error


def _no_number(text):
    """JSON has no NaN and no infinities, but Python reads them."""
    raise ValueError(f"{text} is no number")


def check_run(model_fields, training_args, data_args, run_args):
    """Refuse what can't work, before anything heavy is loaded.

    Raises:
        ConfigError, DataError or OutputFolderError: with the field or folder, and what was expected.
    """
    check_data_arguments(data_args)
    check_output_apart(data_args, training_args.output_dir)
    backbone = model_fields["backbone"]
    if backbone is not None and model_fields["backbone_config"] is not None:
        raise ConfigError(
            f"backbone_config is for a random backbone, but backbone is {backbone}, which has a configuration of its "
            "own: give one of them"
        )
    if model_fields["backbone_revision"] is not None and (backbone is None or Path(backbone).is_dir()):
        raise ConfigError(
            f"backbone_revision is of a backbone on the Hub, got {model_fields['backbone_revision']!r} with "
            f"{'a random one' if backbone is None else f'the folder {backbone}'}"
        )
    if backbone is None and model_fields["backbone_config"] is None:
        raise ConfigError("backbone must be the Hub name or the folder of a vision transformer, got None")
    if backbone is not None:
        _check_backbone_name(str(backbone))
    own = None
    if backbone is not None and Path(backbone).is_dir():
        try:
            own = find_backbone(backbone).config
        except (ValueError, OSError) as error:
            raise ConfigError(str(error)) from error
    check_model(model_fields, training_args, data_args, own)
    if training_args.push_to_hub and not model_fields["save_backbone"] and backbone and Path(backbone).is_dir():
        raise ConfigError(
            f"push_to_hub: the backbone is the local folder {backbone}, which others don't have. Give --backbone its "
            "name on the Hub, or --save_backbone true to push it along"
        )
    check_output_folder(
        training_args.output_dir, backbone, training_args.resume_from_checkpoint, run_args.overwrite_output
    )


def check_model(model_fields, training_args, data_args, backbone_config=None):
    """Refuse a model that can't be, as far as it is known: all but its weights, where its backbone's configuration is.

    Args:
        model_fields, training_args, data_args: What the run is asked to do.
        backbone_config: That of the pretrained backbone; None: that of `model_fields`, if it has one.

    Raises:
        ConfigError: with the field, and what was expected.
    """
    own = model_fields["backbone_config"] if backbone_config is None else backbone_config
    try:
        config = VPTSPConfig(**{**model_fields, "backbone_config": own})
        check_loss(config)
        if config.backbone_config is not None:
            config.backbone_config = resized_config(config.backbone_config, data_args.image_size)
            check_head_init(training_args.head_init, config)
            with torch.random.fork_rng(devices=[]), torch.device("meta"):  # which layers are tuned, without weights
                VPTSPModel(config)
    except (ValueError, ImportError) as error:
        raise ConfigError(str(error)) from error


def check_model_on_hub(model_fields, training_args, data_args):
    """[`check_model`] of a run whose backbone's configuration is on the Hub, which is asked for it.

    Raises:
        ConfigError: as there, or there is no such backbone.
    """
    backbone = model_fields["backbone"]
    if backbone is None or Path(backbone).is_dir():
        return
    try:
        found = find_backbone(backbone, model_fields["backbone_revision"], token=training_args.hub_token)
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error
    check_model(model_fields, training_args, data_args, found.config)


def _check_backbone_name(backbone):
    folder = Path(backbone)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"backbone: the folder {backbone} holds no config.json")
        return
    if folder.is_absolute() or backbone.startswith(".") or backbone.count("/") > 1:
        raise ConfigError(f"backbone: there is no folder {backbone}")
    try:
        validate_repo_id(backbone)
    except HFValidationError as error:
        raise ConfigError(f"backbone is neither a folder nor a Hub name: {backbone!r}") from error


__all__ = [
    "ConfigError",
    "RunArguments",
    "check_model",
    "check_model_on_hub",
    "check_run",
    "model_arguments_class",
    "parse_arguments",
]
