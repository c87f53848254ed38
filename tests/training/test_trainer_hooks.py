"""Private parts of `transformers.Trainer`: hooked into in one file, which says so where they are not there."""

import ast
import inspect
from pathlib import Path

import pytest
import transformers
from transformers import Trainer, TrainingArguments

from vptsp import VPTSPTrainer
from vptsp.training.trainer_hooks import PRIVATE_ATTRIBUTES, HookedTrainer, check_private_parts


ROOT = Path(__file__).resolve().parents[2]


def test_this_version_has_all_of_them():
    check_private_parts(Trainer)


def test_a_method_that_is_gone_or_takes_other_arguments_is_named():
    class Other(Trainer):
        _save_checkpoint = None

        def _clip_grad_norm(self, model, norm):
            pass

    for name, function in vars(Trainer).items():
        if inspect.isfunction(function) and name not in vars(Other):
            setattr(Other, name, function)
    with pytest.raises(ImportError) as error:
        check_private_parts(Other)
    expected = f"Trainer of transformers {transformers.__version__} lacks _save_checkpoint(self, model, trial), "
    assert str(error.value).startswith(expected + "_clip_grad_norm(self, model), which VPTSPTrainer hooks into")


def test_an_attribute_that_is_gone_is_named():
    class Other(Trainer):
        """Its methods are inherited, so none of its own uses an attribute."""

    with pytest.raises(ImportError, match="lacks _created_lr_scheduler, _globalstep_last_logged, _n_gpu, "):
        check_private_parts(Other)


def private_parts():
    """Names with an underscore that Trainer or its arguments have or use for themselves."""
    functions = [f for cls in (Trainer, TrainingArguments) for f in vars(cls).values() if inspect.isfunction(f)]
    used = {name for function in functions for name in function.__code__.co_names}
    names = used | set(dir(Trainer)) | set(dir(TrainingArguments))
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


def test_no_other_file_touches_them():
    private = private_parts()
    assert set(PRIVATE_ATTRIBUTES) <= private
    assert len(vars(HookedTrainer).keys() & private) == 9  # the methods that are overridden
    classes = VPTSPTrainer.__mro__[: VPTSPTrainer.__mro__.index(HookedTrainer)]
    assert [vars(cls).keys() & private for cls in classes] == [set()] * len(classes)
    for path in [ROOT / "train.py", *(ROOT / "training").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert used & private == set() or path.name == "trainer_hooks.py", path
