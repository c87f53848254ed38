"""Environment variables that can't be followed are named in one line, by every command, before PyTorch is imported."""

import sys

import pytest

from vptsp import cli
from vptsp.backbones_vptsp import linear_products
from vptsp.names.environment import LINEAR_LIBRARIES, environment_error
from vptsp.training.command_line import check_early
from vptsp.training.run_errors import ConfigError


def test_what_can_be_set(monkeypatch):
    assert set(linear_products.available) < set(LINEAR_LIBRARIES)
    for library in LINEAR_LIBRARIES:
        monkeypatch.setenv("VPTSP_LINEAR", library)
        assert environment_error() is None
    monkeypatch.delenv("VPTSP_LINEAR")
    assert environment_error() is None


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_names_the_variable(monkeypatch, capsys, command):
    monkeypatch.setenv("VPTSP_LINEAR", "onednm")
    monkeypatch.setattr(sys, "argv", ["vptsp", command])
    assert cli.main() == 2
    expected = "must be one of measured, torch, onednn, got 'onednm'; did you mean 'onednn'?"
    assert capsys.readouterr().err == f"vptsp {command}: error: the environment variable VPTSP_LINEAR {expected}\n"


def test_the_launched_script_names_it_too(monkeypatch):
    monkeypatch.setenv("VPTSP_LINEAR", "mkl")
    with pytest.raises(ConfigError, match="VPTSP_LINEAR must be one of measured, torch, onednn, got 'mkl'"):
        check_early([])
