"""The command `vptsp`: one name for everything that is done from a shell.

    vptsp train folder --data_dir photos --backbone facebook/dinov2-small
    vptsp index --model runs/folder --images photos --index catalogue
    vptsp search --index catalogue --image photo.jpg
    vptsp app --index catalogue

`vptsp COMMAND --help` lists a command's options. Nothing slow is imported that the command does not need.
"""

from __future__ import annotations

import importlib
import sys

from vptsp.files.closed_pipes import ended_by_closed_pipes
from vptsp.names.environment import environment_error
from vptsp.names.registry import nearest
from vptsp.search import commands as search


# Command: where its `main(words)` is, and what it does. The words of the commands of `search` begin with the name.
COMMANDS = {
    "train": ("vptsp.train", "tune a retriever on a data set"),
    "check": ("vptsp.data_scripts.command_check", "check a data set: counts, class sizes, one image of each"),
    **{name: ("vptsp.search.commands", text) for name, text in search.COMMANDS.items()},
    "app": ("vptsp.deploy.search_page", "serve a search page for an index"),
    "serve": ("vptsp.deploy.service.command", "serve an index over HTTP, to search and to change"),
    "export": ("vptsp.deploy.export", "export a retriever to ONNX or torch.export"),
}


def help_text() -> str:
    """What `vptsp --help` prints."""
    lines = [f"  {name:10} {text}" for name, (_, text) in COMMANDS.items()]
    return "usage: vptsp COMMAND ...\n\n" + __doc__.partition("\n\n")[0] + "\n\n" + "\n".join(lines) + "\n"


def main(words=None):
    """Entry point of the console script.

    Args:
        words: The command line after `vptsp`; None takes that of the process.

    Returns:
        Exit status: that of the command, or 2 where there is no such command.
    """
    with ended_by_closed_pipes():
        return _run(words)


def _run(words):
    words = sys.argv[1:] if words is None else list(words)
    if words[:1] in ([], ["-h"], ["--help"]):
        print(help_text(), end="", file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    name, *rest = words
    if name not in COMMANDS:
        known = ", ".join(COMMANDS)
        print(f"vptsp: error: COMMAND must be one of {known}, got {name!r}{nearest(name, COMMANDS)}", file=sys.stderr)
        return 2
    if error := environment_error():
        print(f"vptsp {name}: error: {error}", file=sys.stderr)
        return 2
    run = importlib.import_module(COMMANDS[name][0]).main
    if name == "train":
        return run(rest, prog="vptsp train")
    return run(words if name in search.COMMANDS else rest)


if __name__ == "__main__":
    sys.exit(main())
