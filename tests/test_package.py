"""What the package offers by name, and the command `vptsp`."""

import ast
import contextlib
import graphlib
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import vptsp
from vptsp import cli


def test_every_public_name_exists():
    assert all(getattr(vptsp, name) is not None for name in vptsp.__all__)
    assert set(vptsp.__all__) <= set(dir(vptsp))
    assert len(vptsp.__all__) == len(set(vptsp.__all__))
    with pytest.raises(AttributeError, match="no attribute 'map_at_q'"):
        vptsp.map_at_q  # noqa: B018


def test_every_public_name_is_public_where_it_comes_from():
    for name, module in vptsp._EXPORTS.items():
        assert name in importlib.import_module(f"vptsp.{module}").__all__, (name, module)


def test_every_module_offers_what_it_says():
    modules = [info.name for info in pkgutil.walk_packages(vptsp.__path__, "vptsp.") if not info.ispkg]
    assert len(modules) > 100 and "vptsp.data_scripts.benchmarks.cub" in modules
    for module in map(importlib.import_module, modules):
        names = getattr(module, "__all__", [])
        assert len(names) == len(set(names)), module.__name__
        assert [name for name in names if not hasattr(module, name)] == [], module.__name__


def test_no_files_import_each_other_in_circles():
    """Imports anywhere in a file count, but those of the package itself, which is lazy."""
    root = Path(vptsp.__path__[0])
    imports = {}
    for module in (info.name for info in pkgutil.walk_packages(vptsp.__path__, "vptsp.") if not info.ispkg):
        tree = ast.parse((root / f"{module.removeprefix('vptsp.').replace('.', '/')}.py").read_text(encoding="utf-8"))
        imports[module] = found = set()
        for node in (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)):
            above = module.rsplit(".", node.level)[0] if node.level else ""
            place = ".".join(filter(None, (above, node.module)))
            found |= {place, *(f"{place}.{alias.name}" for alias in node.names)}
    ordered = list(
        graphlib.TopologicalSorter({name: found & imports.keys() for name, found in imports.items()}).static_order()
    )
    assert ordered.index("vptsp.losses.pml_losses") < ordered.index("vptsp.losses.loss_registry")


def test_importing_costs_nothing():
    code = (
        "import sys, vptsp, vptsp.cli; print([n for n in ('torch', 'transformers', 'datasets') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_command_lists_commands(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in cli.COMMANDS)
    assert cli.main([]) == 2
    assert capsys.readouterr().err == out


@pytest.mark.parametrize("name", ["trian", "", "eval"])
def test_unknown_commands_are_named(name, capsys):
    assert cli.main([name, "--index", "x"]) == 2
    err = capsys.readouterr().err
    assert (
        err.count("\n") == 1
        and "COMMAND must be one of train, check, embed, index, search, evaluate, compare, app, serve, export, got "
        f"{name!r}"
        in err
    )
    assert ("did you mean 'train'" in err) == (name == "trian")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(name, capsys):
    try:
        status = cli.main([name, "--help"])
    except SystemExit as error:
        status = error.code
    assert not status
    out = capsys.readouterr().out
    assert "--" in out
    assert out.startswith(f"usage: vptsp {name} ")


def help_of(capsys, name, option):
    with contextlib.suppress(SystemExit):
        cli.main([name, option])
    return capsys.readouterr().out


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_is_a_screen_and_help_all_has_the_rest(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    short, whole = (help_of(capsys, name, option) for option in ("--help", "--help-all"))
    shown, known = (set(re.findall(r"--\w+", text)) for text in (short, whole))
    assert len(short.splitlines()) <= 52 and len(shown) <= 45
    assert shown - {"--help"} <= known
    assert not re.search(r"<class|typing\.|functools", whole)
    if name not in ("train", "export"):
        assert known - shown  # and what is left out is taken all the same


def test_training_is_called_what_was_typed(capsys):
    for words in (["train", "--no_such_option", "1"], ["train", "nowhere.yaml"]):
        with pytest.raises(SystemExit):
            cli.main(words)
        assert "vptsp train: error: " in capsys.readouterr().err
    cli.main(["train", "--help-all"])
    assert capsys.readouterr().out.startswith("usage: vptsp train [")
