"""Every bad value gets one line that names field, value and what was expected: from YAML, command line and Python."""

import dataclasses
import json
import math
import subprocess
import sys

import pytest
import yaml
from conftest import tiny_vit_config
from fuzzing import examples
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainingArguments

from vptsp import DataArguments, VPTSPConfig, VPTSPTrainingArguments, train
from vptsp.training.argument_values import TRAINING_BOUNDS, TRAINING_CHOICES, training_hints
from vptsp.training.command_line import RunArguments, all_names
from vptsp.training.run_arguments import model_arguments_class, parse_arguments
from vptsp.training.run_errors import ConfigError
from vptsp.training.unsupported_arguments import REFUSED_FIELDS


NAN, INF = math.nan, math.inf
# Field, value, the words of the refusal after the field's name.
VALUES = [
    ("seed", -1, "must be an integer in [0, 4294967295], got -1"),
    ("seed", True, "must be an integer in [0, 4294967295], got True"),
    ("seed", 1.7, "must be an integer in [0, 4294967295], got 1.7"),
    ("seed", None, "must be an integer in [0, 4294967295], got None"),
    ("seed", 2**32, "must be an integer in [0, 4294967295], got 4294967296"),
    ("data_seed", -1, "must be an integer in [0, 4294967295], got -1"),
    ("learning_rate", NAN, "must be >= 0, got nan"),
    ("learning_rate", -1.0, "must be >= 0, got -1.0"),
    ("learning_rate", "fast", "must be >= 0, got 'fast'"),
    ("proxy_learning_rate", INF, "must be >= 0, got inf"),
    ("weight_decay", -0.1, "must be >= 0, got -0.1"),
    ("adam_beta1", 1.5, "must be in [0, 1), got 1.5"),
    ("adam_beta2", 1.0, "must be in [0, 1), got 1.0"),
    ("adam_epsilon", -1e-8, "must be >= 0, got -1e-08"),
    ("sgd_momentum", 7, "must be in [0, 1), got 7"),
    ("num_train_epochs", [3], "must be > 0, got [3]"),
    ("num_train_epochs", True, "must be > 0, got True"),
    ("max_steps", 2.5, "must be an integer, got 2.5"),
    ("per_device_eval_batch_size", 0, "must be an integer >= 1, got 0"),
    ("per_device_train_batch_size", 4.0, "must be an integer >= 1, got 4.0"),
    ("gradient_accumulation_steps", 0, "must be an integer >= 1, got 0"),
    ("images_per_class", 2.0, "must be an integer >= 1, got 2.0"),
    ("dataloader_num_workers", -1, "must be an integer >= 0, got -1"),
    ("dataloader_num_workers", 1.5, "must be an integer >= 0, got 1.5"),
    ("dataloader_prefetch_factor", 0, "must be an integer >= 1, got 0"),
    ("dataloader_multiprocessing_context", "spwan", "must be one of"),
    ("recall_at", 1, "must be a list of integers >= 1, got 1"),
    ("recall_at", [0], "must be a list of integers >= 1, got [0]"),
    ("recall_at", [1, 2.0], "must be a list of integers >= 1, got [1, 2.0]"),
    ("recall_at", [], "must hold integers >= 1, got none"),
    ("warmup_steps", -1, "must be >= 0, got -1"),
    ("eval_delay", -1, "must be >= 0, got -1"),
    ("logging_steps", NAN, "must be a number, got nan"),
    ("save_total_limit", -1, "must be an integer >= 0, got -1"),
    ("bootstrap_samples", -1, "must be an integer >= 0, got -1"),
    ("stream_buffer_size", 0, "must be an integer >= 1, got 0"),
    ("min_learning_rate", -1, "must be >= 0, got -1"),
    ("max_grad_norm", NAN, "must be >= 0, got nan"),
    ("ddp_timeout", 0, "must be an integer >= 1, got 0"),
    ("ddp_backend", "glo", "must be one of nccl, gloo"),
    ("log_level", "loud", "must be one of detail, debug"),
    ("eval_metrics", "al", "must be one of retrieval, all, got 'al'; did you mean 'all'?"),
    ("eval_strategy", "epochs", "must be one of no, steps, epoch, got 'epochs'; did you mean 'epoch'?"),
    ("lr_scheduler_type", "cosin", "got 'cosin'; did you mean 'cosine'?"),
    ("optim", "adamw", "must be one of adamw_torch,"),
    ("hub_strategy", "checkpoint", "must be end or every_save, got 'checkpoint'"),
    ("output_dir", 7, "must be text, got the number 7: put it in quotes"),
    ("output_dir", "", "must be a path: the path is empty"),
    ("class_prompt_folder", "", "must be a path: the path is empty"),
    ("resume_from_checkpoint", "a\0", "holds a NUL character, which no file name can"),
    ("lr_scheduler_kwargs", "{", "must be a mapping (as text, one in JSON), got '{'"),
    ("lr_scheduler_kwargs", [], "must be a mapping or text, got []"),
    ("bf16", "maybe", "must be true or false, got 'maybe'"),
    ("neftune_noise_alpha", 0.1, "must be left out, got 0.1"),
    ("streaming", 3, "must be true or false, got 3"),
    ("skip_corrupt", 7, "must be true or false, got 7"),
    ("image_size", 32.0, "must be an integer, got 32.0"),
    ("image_size", 0, "must be >= 1, got 0"),
    ("max_image_pixels", "many", "must be an integer, got 'many'"),
    ("test_share", NAN, "must be a number, got nan"),
    ("crop_scale_min", True, "must be a number, got True"),
    ("split_seed", -1, "must be an integer in [0, 4294967295], got -1"),
    ("data_dir", 3, "must be text, got the number 3: put it in quotes"),
    ("train_classes", [1.5], "must be a list of text or integers or text, got [1.5]"),
    ("picture_queries", -1, "must be an integer >= 0, got -1"),
    ("picture_queries", 1.5, "must be an integer >= 0, got 1.5"),
    ("final_metrics", "everything", "must be one of retrieval, all, got 'everything'"),
    ("overwrite_output", "si", "must be true or false, got 'si'"),
]
CLASSES = (VPTSPTrainingArguments, DataArguments, RunArguments)


def make(name, value):
    """The class that has a field, with that value."""
    (cls,) = (cls for cls in CLASSES if name in {item.name for item in dataclasses.fields(cls)})
    return cls(**({"use_cpu": True} if cls is VPTSPTrainingArguments else {}), **{name: value})


@pytest.mark.parametrize("name, value, words", VALUES)
def test_in_python(name, value, words):
    with pytest.raises(ValueError) as caught:
        make(name, value)
    assert f"{name} must" in str(caught.value) and words in str(caught.value) and "\n" not in str(caught.value)


def refused(argv, capsys):
    with pytest.raises(SystemExit, match="2"):
        train.main(list(map(str, argv)))
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("train.py: error: ")
    return line.removeprefix("train.py: error: ")


@pytest.fixture
def photos(tmp_path):
    for name in "ab":
        (tmp_path / "photos" / name).mkdir(parents=True)
    return tmp_path / "photos"


@pytest.mark.parametrize("name, value, words", [case for case in VALUES if case[1] not in (NAN, INF)])
def test_in_a_file(name, value, words, tmp_path, photos, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"backbone": "ann/backbone", "data_dir": str(photos), name: value}))
    line = refused([file], capsys)
    assert f"{name} must" in line and words in line


@pytest.mark.parametrize(
    "name, value, words",
    [case for case in VALUES if isinstance(case[1], (int, float)) and not isinstance(case[1], bool) and case[1] != 7],
)
def test_on_the_command_line(name, value, words, photos, capsys):
    if name in ("recall_at", "streaming") or name.endswith("_dir"):
        pytest.skip("is what it must be, there")
    line = refused(["--backbone", "ann/backbone", "--data_dir", photos, f"--{name}={value}"], capsys)
    assert name in line and str(value) in line


# ---- Files as such, options, packages, devices


@pytest.mark.parametrize(
    "content, words",
    [
        (b"seed: \xff\n", "run.yaml is not YAML: 'utf-8' codec can't decode"),
        (b"output_dir: 2020-01-01\n", "quote it: '2020-01-01'"),
        (b"seed: 010\n", "quote it: '010'"),
        (b"layout: no\n", "quote it: 'no'"),
        (b"layout: on\n", "quote it: 'on'"),
        (b"seed: 1\nseed: 2\n", "'seed' is there twice"),
        (b"", "must hold 'field: value' lines, got NoneType"),
        (b"- seed\n", "must hold 'field: value' lines, got list"),
        (b"[1]: 2\n", "run.yaml is not YAML: "),
        (b"num_prompt: 3\n", "run.yaml: there is no field 'num_prompt'; did you mean 'num_prompts'?"),
        (b"backbone_config: [1]\n", "run.yaml: backbone_config must be a mapping or text, got [1]"),
        (b"backbone_config: 3\n", "run.yaml: backbone_config must be a mapping or text, got 3"),
        (b"backbone_config: {model_type: bert}\n", "backbone model type must be one of"),
        (b"backbone_config: {model_type: vit, num_hidden_layers: 0}\n", "num_hidden_layers must be an integer >= 1"),
        (b"backbone_config: '[1]'\n", "backbone_config must be None or a configuration"),
        (b"loss_kwargs: '{\"alpha\": NaN}'\n", "loss_kwargs must be a JSON mapping: NaN is no number"),
        (b"num_prompts: true\n", "run.yaml: num_prompts must be an integer, got True"),
        (b"pooling: max\n", "run.yaml: pooling must be one of cls, mean, cls+mean, head, got 'max'"),
    ],
)
def test_files(content, words, tmp_path, photos, capsys):
    (tmp_path / "run.yaml").write_bytes(content)
    line = refused([tmp_path / "run.yaml", "--data_dir", photos], capsys)
    assert words in line


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--skip_corrupt", "maybe"], "argument --skip_corrupt/--skip-corrupt: expected true or false, got 'maybe'"),
        (["--bf16=maybe"], "argument --bf16: expected true or false, got 'maybe'"),
        (["--bitfit", "perhaps"], "argument --bitfit: expected true or false, got 'perhaps'"),
        (["--hub_tokn", "hf_SECRET"], "there is no option --hub_tokn; did you mean --hub_token?"),
        (["--hub_tokn=hf_SECRET"], "there is no option --hub_tokn; did you mean --hub_token?"),
        (["--hub-tokn=hf_SECRET"], "there is no option --hub-tokn; did you mean --hub_token?"),
        (["--seed", "1", "hf_SECRET"], "1 words of the command line belong to no option"),
        (["--seed"], "argument --seed: expected one argument"),
        (["--loss_kwargs", "[1"], "loss_kwargs must be a JSON mapping"),
        (["--fp16"], "fp16 must be false on a CPU, which has no float16 training, got True; bf16 works there"),
        (["--optim", "adamw_bnb_8bit"], "optim adamw_bnb_8bit is not to be had here: "),
        (["--report_to", "wandbb"], "report_to must be of none, all, azure_ml"),
        (["--report_to", "comet_ml"], "report_to: the package of 'comet_ml' is not installed"),
    ],
)
def test_options(argv, words, photos, capsys):
    line = refused(["--backbone", "ann/backbone", "--data_dir", photos, "--use_cpu", *argv], capsys)
    assert words in line and "SECRET" not in line


EARLY = """
import sys
from vptsp.train import main
try:
    main(sys.argv[1:])
except SystemExit as error:
    print(error.code, [name for name in ("torch", "datasets") if name in sys.modules])
"""


def test_nothing_waits_for_pytorch(tmp_path):
    bad = tmp_path / "bad.yaml"
    bad.write_text("seed: 010\n")
    for argv in (
        [str(bad)],
        ["absent.yaml"],
        ["--data_dir", "absent"],
        ["--image_size", "0"],
        ["--picture_queries", "-1"],
        ["--streaming", "maybe"],
        ["--num_promts", "3", "--data_dri", "photos"],
    ):
        done = subprocess.run([sys.executable, "-c", EARLY, *argv], capture_output=True, text=True, cwd=tmp_path)
        assert done.stdout.strip() == "2 []", (argv, done.stdout, done.stderr)


# ---- All fields, whatever they are


def test_names_are_known_before_the_classes_are():
    known = {item.name for cls in CLASSES for item in dataclasses.fields(cls) if item.init}
    known |= {item.name for item in dataclasses.fields(model_arguments_class())}
    more = {"sub_configs", "num_classes", "backbone_fingerprint", "format_version"}
    assert known <= all_names() and {name for name in all_names() - known if not name.startswith("_")} == more


def test_tables_speak_of_fields():
    names = {item.name for item in dataclasses.fields(VPTSPTrainingArguments)}
    assert set(TRAINING_BOUNDS) | set(TRAINING_CHOICES) <= names
    inherited = {item.name for item in dataclasses.fields(TrainingArguments)}
    numbers = {name for name, hint in training_hints(VPTSPTrainingArguments).items() if hint in (int, float)}
    steps = {"logging_steps", "save_steps", "max_steps"}  # whose range is that of another field
    assert numbers - set(TRAINING_BOUNDS) == steps
    assert set(training_hints(VPTSPTrainingArguments)) >= inherited - set(REFUSED_FIELDS) - {
        *("ddp_broadcast_buffers", "deepspeed", "fsdp", "fsdp_config", "hub_strategy")
    }


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([0, -1, 1, 2, 0.5]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=3,
)
FIELDS = [(cls, item.name) for cls in (*CLASSES, VPTSPConfig) for item in dataclasses.fields(cls) if item.init]
OWN = set(VPTSPConfig.__annotations__)
FIELDS = [(cls, name) for cls, name in FIELDS if cls is not VPTSPConfig or name in OWN - {"sub_configs"}]


@pytest.mark.fuzz
@examples(150)
@given(st.sampled_from(FIELDS), anything)
def test_any_value_of_any_field(field, value):
    """It is taken, or refused by a `ValueError` of one line that names the field."""
    cls, name = field
    base = {
        VPTSPTrainingArguments: {"use_cpu": True, "output_dir": "unused"},
        VPTSPConfig: {"backbone_config": tiny_vit_config()},
    }.get(cls, {})
    try:
        cls(**{**base, name: value})
    except ValueError as error:
        assert name.removesuffix("_config") in str(error) and "\n" not in str(error), (name, value, error)


@pytest.mark.fuzz
@examples(150)
@given(st.dictionaries(st.sampled_from([name for _, name in FIELDS]), anything, max_size=3))
def test_any_file(tmp_path_factory, values):
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_text(yaml.safe_dump(values))
    try:
        parse_arguments([str(file), "--use_cpu", "true"])
    except ConfigError as error:
        assert "\n" not in str(error)


@pytest.mark.fuzz
@examples(100)
@given(st.binary(max_size=40) | st.text(alphabet="seed: []{}&*!?|>'\"#%@\n-1.,~", max_size=40).map(str.encode))
def test_any_bytes(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "bytes.yaml"
    file.write_bytes(content)
    try:
        parse_arguments([str(file), "--use_cpu", "true"])
    except ConfigError as error:
        assert "bytes.yaml" in str(error) and "\n" not in str(error)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("num_prompts", -1, "must be an integer >= 0, got -1"),
        ("embedding_dim", 0, "must be an integer >= 1, got 0"),
        ("embedding_dropout", 1.0, r"must be in \[0, 1\), got 1.0"),
        ("loss_alpha", 0, "must be > 0, got 0"),
    ],
)
def test_the_file_of_a_bad_field_of_the_model_is_named(name, value, expected, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(f"{name}: {value}\n")
    with pytest.raises(ConfigError, match=f"run.yaml: {name} {expected}"):
        parse_arguments([str(file), "--use_cpu", "true"])


def test_what_is_right_is_taken(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("learning_rate: 1e-4\nseed: '7'\nstreaming: 'true'\ntrain_classes: [1, 2]\nrecall_at: [1, 10]\n")
    fields, training, data, _ = parse_arguments([str(file), "--backbone_config", json.dumps({"model_type": "vit"})])
    assert (training.learning_rate, training.seed, training.recall_at) == (1e-4, 7, [1, 10])
    assert data.streaming is True and data.train_classes == ["1", "2"]
    assert fields["backbone_config"] == {"model_type": "vit"}
    assert DataArguments(data_dir=tmp_path).data_dir == tmp_path
