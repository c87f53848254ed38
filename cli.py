"""The command `vptsp`: one name for everything that is done from a shell.

    vptsp train folder --data_dir photos --backbone facebook/dinov2-small
    vptsp index --model runs/folder --images photos --index catalogue
    vptsp search --index catalogue --image photo.jpg
    vptsp app --index catalogue

`vptsp COMMAND --help` lists a command's options. Nothing is imported that the command does not need.
"""

from __future__ import annotations

import importlib
import sys

from vptsp.names.registry import nearest


# Command: where its `main(words)` is, whether that is given the command's name as well, and what it does.
COMMANDS = {
    "train": ("vptsp.train", False, "tune a retriever on a data set"),
    "check": ("vptsp.data_scripts.command_check", False, "check a data set: counts, class sizes, one image of each"),
    "embed": ("vptsp.search.commands", True, "write the embeddings of images to a store"),
    "index": ("vptsp.search.commands", True, "build an index of embeddings, or bring it in step with its images"),
    "search": ("vptsp.search.commands", True, "find the items of an index that are most similar to images or items"),
    "evaluate": ("vptsp.search.commands", True, "score a model or stored embeddings"),
    "compare": ("vptsp.search.commands", True, "score two models on the same images, with a paired test"),
    "app": ("vptsp.deploy.search_page", False, "serve a search page for an index"),
    "export": ("vptsp.deploy.export", False, "export a retriever to ONNX or torch.export"),
}


def help_text() -> str:
    """What `vptsp --help` prints."""
    lines = [f"  {name:10} {text}" for name, (_, _, text) in COMMANDS.items()]
    return "usage: vptsp COMMAND ...\n\n" + __doc__.partition("\n\n")[0] + "\n\n" + "\n".join(lines) + "\n"


def main(words=None):
    """Entry point of the console script.

    Args:
        words: The command line after `vptsp`; None takes that of the process.

    Returns:
        Exit status: that of the command, or 2 where there is no such command.
    """
    words = sys.argv[1:] if words is None else list(words)
    if words[:1] in ([], ["-h"], ["--help"]):
        print(help_text(), end="", file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    name, *rest = words
    if name not in COMMANDS:
        known = ", ".join(COMMANDS)
        print(f"vptsp: error: COMMAND must be one of {known}, got {name!r}{nearest(name, COMMANDS)}", file=sys.stderr)
        return 2
    module, takes_name, _ = COMMANDS[name]
    return importlib.import_module(module).main(words if takes_name else rest)


if __name__ == "__main__":
    sys.exit(main())
