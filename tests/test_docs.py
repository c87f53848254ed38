"""What README, docs, docstrings and comments name is there: files, imports, modules, commands, options, links."""

import ast
import importlib
import re
from pathlib import Path

import pytest
from documented_commands import commands_in, options_of, parse
from project_files import ROOT, project_files

from vptsp import cli


TEXTS = {
    path: (ROOT / path).read_text(encoding="utf-8")
    for path in project_files()
    if path.suffix in (".md", ".py", ".yaml") and "fixtures" not in path.parts
}
OUTSIDE_TESTS = {path: text for path, text in TEXTS.items() if path.parts[0] != "tests"}
PAGES = {path: text for path, text in TEXTS.items() if path.suffix == ".md"}
NAMES = {path.name for path in project_files()}
ROOMS = {path.parts[0] for path in project_files() if len(path.parts) > 1}

WRITTEN = {  # by commands, by a Space, or by the reader
    "app.py",
    "comparison.md",
    "dependence.md",
    "peers.md",
    "metrics.md",
    "my_run.py",
    "my_run.yaml",
    "rates.md",
    "rates.yaml",
    "requirements.txt",
}
OF_OTHERS = {"--shutdown-timeout", "--nproc_per_node", "--num_processes", "--multi_gpu", "--cpu", "--help"}
OF_OTHERS |= {"--nnodes", "--node_rank", "--master_addr", "--master_port"}  # torchrun
OF_OTHERS |= {"--editable", "--force-reinstall", "--no-deps", "--repo-type"}  # pip, hf
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def spans(path, text):
    """Text in backticks; of a page, outside blocks of code."""
    if path.suffix == ".md":
        text = FENCE.sub("", text)
    return [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", text) if span.count("\n") < 2]


def shell(path, text):
    """Lines that may be commands: blocks of pages, indented lines of docstrings."""
    if path.suffix == ".md":
        blocks = [body for language, body in FENCE.findall(text) if language in ("", "bash", "sh")]
        indented = re.findall(r"^ {4}(.*)$", FENCE.sub("", text), re.MULTILINE)
        return "\n".join([*blocks, *indented])
    if path.suffix != ".py":
        return ""
    nodes = [n for n in ast.walk(ast.parse(text)) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef))]
    documented = "\n".join(ast.get_docstring(node) or "" for node in nodes)
    return "\n".join(re.findall(r"^ {4,}(.*)$", documented, re.MULTILINE))


def named_files(path, text):
    """Words that look like files or folders of the project."""
    for span in spans(path, text):
        for word in span.split():
            word = word.strip(".,:;()'\"").partition(":")[0]
            if not re.fullmatch(r"[\w.*{},/-]+", word):
                continue
            in_room = "/" in word and word.partition("/")[0] in ROOMS
            alone = "/" not in word and re.fullmatch(r"\w+\.(py|md|yaml|toml|cfg)", word) and word not in WRITTEN
            packaged = word.startswith("vptsp/") and word.endswith((".py", ".yaml", ".md"))
            if in_room or alone or packaged:
                yield word


def is_there(word, path):
    if "/" not in word:
        return word in NAMES
    folders = (ROOT, ROOT / path.parent)
    return any(any(folder.glob(word.rstrip("/"))) for folder in folders)


def test_files_that_are_named_exist():
    named = {(path, word) for path, text in TEXTS.items() for word in named_files(path, text)}
    assert len(named) > 100
    assert not sorted(f"{path}: {word}" for path, word in named if not is_there(word, path))


def test_modules_that_are_named_exist():
    missing = []
    for path, text in OUTSIDE_TESTS.items():
        for span in spans(path, text):
            named = re.findall(r"(?<![\w./])vptsp(?:\.\w+)+", span)
            missing += [f"{path}: {name}" for name in named if not resolves(name)]
    assert not missing


def resolves(name):
    """Whether a dotted name is a module, or something in one."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def imports_in(path, text):
    """Statements that import from the package: of Python blocks of pages, and of examples in docstrings."""
    if path.suffix == ".md":
        for language, body in FENCE.findall(text):
            if language == "python":
                yield from (ast.unparse(node) for node in ast.walk(ast.parse(body)) if is_import_of_ours(node))
    else:
        yield from re.findall(r"^\s*>>> ((?:from|import) vptsp.*)$", text, re.MULTILINE)


def is_import_of_ours(node):
    if isinstance(node, ast.ImportFrom):
        return (node.module or "").partition(".")[0] == "vptsp"
    return isinstance(node, ast.Import) and any(item.name.partition(".")[0] == "vptsp" for item in node.names)


STATEMENTS = sorted({statement for path, text in TEXTS.items() for statement in imports_in(path, text)})


@pytest.mark.parametrize("statement", STATEMENTS)
def test_imports_work(statement):
    exec(statement, {})


def test_public_names_are_imported_from_the_package():
    import vptsp

    deep = [statement for statement in STATEMENTS if statement.startswith("from vptsp.")]
    taken = {alias.name for statement in deep for alias in ast.parse(statement).body[0].names}
    assert not taken & set(vptsp.__all__)


COMMANDS = [c for path, text in OUTSIDE_TESTS.items() for c in commands_in(str(path), shell(path, text))]
SPANS = [(str(path), span) for path, text in OUTSIDE_TESTS.items() for span in spans(path, text)]
INLINE = [command for place, span in SPANS for command in commands_in(place, span)]


def is_whole(command):
    """Whether it can be given as it stands."""
    return not any(word.startswith("...") or word == "--help" or "FOLDER" in word for word in command.words)


def test_commands_can_be_given_as_they_stand():
    assert len(COMMANDS) > 80
    assert {command.program for command in COMMANDS} >= {f"vptsp {name}" for name in cli.COMMANDS}
    wrong = []
    for command in filter(is_whole, COMMANDS):
        try:
            parse(command)
        except ValueError as error:
            wrong.append(f"{command}: {error}")
    assert not wrong


def test_options_of_commands_exist():
    wrong = []
    for command in COMMANDS + INLINE:
        try:
            known = options_of(command.program) | {"--help"}
        except ValueError as error:
            wrong.append(f"{command}: {error}")
            continue
        given = {word.partition("=")[0] for word in command.words if word.startswith("--")}
        wrong += [f"{command}: {option}" for option in sorted(given - known)]
    assert not wrong


def test_options_that_are_named_exist():
    programs = {command.program for command in COMMANDS}
    known = OF_OTHERS.union({"--help", "--help-all"}, *map(options_of, programs))
    wrong = []
    for path, text in PAGES.items():
        for span in spans(path, text):
            named = re.findall(r"(?<![\w-])--\w[\w-]*", span)
            wrong += [f"{path}: {option}" for option in named if option not in known]
    assert not wrong


def anchor(heading):
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def test_links_lead_somewhere():
    anchors = {
        path: {anchor(heading) for heading in re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)}
        for path, text in PAGES.items()
    }
    wrong = []
    for path, text in PAGES.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text)):
            if target.startswith(("http:", "https:")):
                continue
            name, _, heading = target.partition("#")
            file = (ROOT / path.parent / name).resolve().relative_to(ROOT) if name else path
            if not (ROOT / file).exists() or (heading and heading not in anchors.get(file, ())):
                wrong.append(f"{path}: {target}")
    assert not wrong


def test_every_page_is_in_the_index():
    index = TEXTS[Path("docs/README.md")]
    pages = {path.name for path in PAGES if path.parent == Path("docs")} - {"README.md"}
    assert pages == set(re.findall(r"\]\((\w+\.md)", index))
