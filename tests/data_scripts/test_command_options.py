"""Options that are true or false have one form in every command, that of training."""

import argparse
import re

import pytest
from documented_commands import parser_of

from vptsp import DataArguments, cli
from vptsp.data_scripts.command_options import CommandParser, add_data_options


COMMANDS = [f"vptsp {name}" for name in cli.COMMANDS if name != "train"]
WORDS = ["true", "True", "t", "yes", "y", "1"], ["false", "False", "f", "no", "n", "0"]


@pytest.fixture
def parser():
    parser = CommandParser(prog="x")
    parser.add_argument("place")
    parser.add_argument_group("how").add_argument("--skip_corrupt", action="store_true")
    add_data_options(parser, ["verify_counts", "test_share"])
    return parser


@pytest.mark.parametrize("program", COMMANDS)
def test_no_command_has_an_option_that_takes_no_value(program):
    kinds = {type(action).__name__ for action in parser_of(program)._actions if action.nargs == 0 and action.help}
    assert kinds <= {"_Help", "_StoreFalseAction"}
    assert not [a.dest for a in parser_of(program)._actions if isinstance(a, argparse._StoreTrueAction)]


@pytest.mark.parametrize("value, words", [(True, WORDS[0]), (False, WORDS[1])])
def test_flags_take_a_value_or_none(parser, value, words):
    for word in words:
        for given in (["--skip_corrupt", word, "a"], ["a", f"--skip_corrupt={word}"], ["--skip-corrupt", word, "a"]):
            assert vars(parser.parse_args(given)) == {"place": "a", "skip_corrupt": value}
    assert parser.parse_args(["a"]).skip_corrupt is False
    for given in (["--skip_corrupt", "a"], ["a", "--skip_corrupt"], ["--skip-corrupt", "a", "--test_share", "0.1"]):
        assert vars(parser.parse_args(given)).items() >= {"place": "a", "skip_corrupt": True}.items()


def test_fields_that_are_true_by_default_are_switched_off_as_in_training(parser):
    assert not hasattr(parser.parse_args(["a"]), "verify_counts")
    for given in (["--no_verify_counts"], ["--no-verify-counts"], ["--verify_counts", "false"]):
        assert parser.parse_args(["a", *given]).verify_counts is False
    assert parser.parse_args(["--verify_counts", "a"]).verify_counts is True


def test_other_words_are_refused(parser, capsys):
    for given in (["a", "--skip_corrupt=maybe"], ["a", "--skip_corrupt", "maybe"]):
        with pytest.raises(SystemExit):
            parser.parse_args(given)
    for line in capsys.readouterr().err.splitlines():
        assert line.startswith("error: argument --skip_corrupt: expected true or false, got 'maybe'")
    with pytest.raises(SystemExit):
        parser.parse_args(["a", "--skip_corrupt", "--test_shore", "0.5"])
    assert "unrecognized arguments: --test_shore 0.5; did you mean 'test_share'" in capsys.readouterr().err


def test_the_form_is_shown(parser):
    assert re.search(r"--skip_corrupt \[true\]", parser.format_help())
    assert "no_verify_counts" not in parser.format_help()
    assert DataArguments().verify_counts is True
