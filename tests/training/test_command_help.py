"""The help page, read from sources, against the options that the parser really has."""

import subprocess
import sys
from dataclasses import fields

from vptsp import DataArguments, VPTSPTrainingArguments, train
from vptsp.training import run_arguments as run_arguments_vptsp
from vptsp.training.command_help import help_text, option_groups, options_in_source


GROUPS = option_groups(train.DERIVED, train.RunArguments)


def test_help_lists_every_option_once_with_a_text():
    names = [option.name for options in GROUPS.values() for option in options]
    classes = (run_arguments_vptsp.model_arguments_class(), VPTSPTrainingArguments, DataArguments, train.RunArguments)
    assert sorted(names) == sorted({item.name for cls in classes for item in fields(cls) if item.init})
    ours = [option for title, options in GROUPS.items() if "transformers" not in title for option in options]
    assert [option.name for option in ours if not option.text] == []


def test_defaults_and_texts_are_those_of_the_classes():
    shown = {option.name: option for options in GROUPS.values() for option in options}
    for item in fields(VPTSPTrainingArguments):
        if item.name == "learning_rate":
            assert shown["learning_rate"].default == repr(item.default)
            assert shown["learning_rate"].text == item.metadata["help"]
            break
    assert shown["save_total_limit"].default == "2"  # ours, not transformers'
    assert shown["resize_size"].default == "None"
    assert "VPTSP-G" in shown["proxy_update"].text


def test_help_comes_before_anything_heavy_is_imported():
    code = (
        "import sys; from vptsp.train import main; main(['--help']);"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "--num_prompts" in result.stdout
    assert "--per_device_train_batch_size" in result.stdout


def test_percent_signs_and_every_kind_of_field(tmp_path):
    source = tmp_path / "settings.py"
    source.write_text(
        "class Settings:\n"
        '    """Settings.\n\n    Args:\n        share: Of 100 %,\n            or more.\n    """\n\n'
        "    kind: ClassVar = 3\n"
        "    share: float = 0.5\n"
        '    names: list[str] = field(default_factory=lambda: ["a"], metadata={"help": "Some " "names."})\n'
        "    hidden: int = field(init=False, default=1)\n"
        "    needed: str\n"
    )
    options = options_in_source(source, "Settings")
    assert [(option.name, option.kind, option.default) for option in options] == [
        ("share", "float", "0.5"),
        ("names", "list[str]", "['a']"),
        ("needed", "str", ""),
    ]
    assert [option.text for option in options] == ["Of 100 %, or more.", "Some names.", ""]
    page = help_text("prog", "%(prog)s", "What it does.", {"all": options})
    assert "Of 100 %, or more. (float; default: 0.5)" in page
