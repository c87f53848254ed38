"""What a run is asked to do: the options of `train.py`, the YAML file they may come from, and what can't work."""

from __future__ import annotations

import json
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from pathlib import Path

from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import HfArgumentParser, PreTrainedConfig

from ..configuration_vptsp import VPTSPConfig
from ..data_scripts.data_arguments import DataArguments, check_data_arguments, check_output_apart
from ..files.yaml_files import YamlError, read_yaml
from ..loading_vptsp import find_backbone, resized_config
from ..losses.loss_registry import check_loss
from ..names.registry import nearest
from .arguments import EVAL_METRICS, VPTSPTrainingArguments
from .command_help import USAGE, options_text
from .output_folder import check_output_folder
from .run_errors import ConfigError
from .unsupported_arguments import NOT_OFFERED


# Fields of VPTSPConfig that follow from the data or the backbone and so are nobody's to set.
DERIVED = ("num_classes", "backbone_fingerprint", "format_version")
# Mappings, which the command line gives as JSON.
_MAPPINGS = ("backbone_config", "loss_kwargs", "miner_kwargs", "tuning_kwargs")


@dataclass
class RunArguments:
    """What is left: where results may go."""

    overwrite_output: bool = field(
        default=False, metadata={"help": "Write into an output_dir that holds an earlier run's results."}
    )
    picture_queries: int = field(
        default=8, metadata={"help": "Queries in the pictures of neighbours; 0 for no pictures at all."}
    )
    picture_proxies: bool = field(
        default=False, metadata={"help": "Draw the movement of the proxies too (proxies.png)."}
    )
    final_metrics: str = field(
        default="all", metadata={"help": "What the last evaluation computes; as eval_metrics of those before."}
    )


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


def all_options_text() -> str:
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
    return options_text(groups, kinds)


def parse_arguments(argv):
    """Command line -> (model fields that were given, training, data and run arguments).

    Raises:
        ConfigError: the YAML file can't be read, or it or the command line holds something unknown or out of range.
    """
    classes = (model_arguments_class(), VPTSPTrainingArguments, DataArguments, RunArguments)
    parser = HfArgumentParser(classes, prog="train.py", usage=USAGE)
    known = {item.name for cls in classes for item in fields(cls) if item.init}
    if argv and not argv[0].startswith("-"):
        values = read_config(argv[0], known)
        argv = argv[1:]
        parser.set_defaults(**values)
    try:
        model_args, training_args, data_args, run_args = parser.parse_args_into_dataclasses(
            argv, look_for_args_file=False
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    model_fields = vars(model_args)
    for name in _MAPPINGS:
        if isinstance(model_fields[name], str):
            try:
                model_fields[name] = json.loads(model_fields[name], object_pairs_hook=_without_duplicates)
            except ValueError as error:
                holds = "JSON with a model_type" if name == "backbone_config" else "a JSON mapping"
                raise ConfigError(f"{name} must be {holds}: {error}") from error
    return model_fields, training_args, data_args, run_args


def _without_duplicates(pairs):
    """A JSON object, unless a key is there twice, of which the last would win."""
    names = [name for name, _ in pairs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{twice[0]!r} is there twice")
    return dict(pairs)


def read_config(path, known):
    """Fields of a YAML file, or of one of the package's own `configs` by its name (`cub_vits16`, `table1/vpt`).

    Raises:
        ConfigError: no such file, not YAML, not a mapping, or a field that does not exist.
    """
    preset = Path(__file__).parent.parent / "configs" / f"{path}.yaml"
    file = preset if preset.is_file() and not Path(path).is_file() else Path(path)
    try:
        values = read_yaml(file)
    except OSError as error:
        raise ConfigError(f"the configuration {path} can't be read: {error.strerror}") from error
    except YamlError as error:
        raise ConfigError(f"the configuration {path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"the configuration {path} must hold 'field: value' lines, got {type(values).__name__}")
    for name in values:
        if name not in known:
            raise ConfigError(f"{path}: there is no field {name!r}{nearest(name, known, most=1)}")
    return values


def check_run(model_fields, training_args, data_args, run_args):
    """Refuse what can't work, before anything heavy is loaded.

    Raises:
        ConfigError, DataError or OutputFolderError: with the field or folder, and what was expected.
    """
    check_data_arguments(data_args)
    check_output_apart(data_args, training_args.output_dir)
    if run_args.final_metrics not in EVAL_METRICS:
        raise ConfigError(f"final_metrics must be one of {', '.join(EVAL_METRICS)}, got {run_args.final_metrics!r}")
    if not run_args.picture_queries >= 0:
        raise ConfigError(f"picture_queries must be >= 0, got {run_args.picture_queries}")
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
    try:
        if backbone is not None and Path(backbone).is_dir():
            model_fields = {**model_fields, "backbone_config": find_backbone(backbone).config}
        config = VPTSPConfig(**model_fields)
        if config.backbone_config is not None:
            resized_config(config.backbone_config, data_args.image_size)
        check_loss(config)
    except (ValueError, ImportError) as error:
        raise ConfigError(str(error)) from error
    if training_args.push_to_hub and not model_fields["save_backbone"] and backbone and Path(backbone).is_dir():
        raise ConfigError(
            f"push_to_hub: the backbone is the local folder {backbone}, which others don't have. Give --backbone its "
            "name on the Hub, or --save_backbone true to push it along"
        )
    check_output_folder(
        training_args.output_dir, backbone, training_args.resume_from_checkpoint, run_args.overwrite_output
    )


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


__all__ = ["ConfigError", "RunArguments", "check_run", "model_arguments_class", "parse_arguments", "read_config"]
