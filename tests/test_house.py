"""The rooms: what CONTRIBUTING.md and its picture say of them is so."""

import ast
import re
from collections import Counter

import pytest
from project_files import ROOT, SHIPPED, product_modules, project_files

import vptsp


PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
PICTURE = (ROOT / "docs" / "images" / "house.svg").read_text(encoding="utf-8")
HOPS = sorted(set(re.findall(r"`([\w/]+\.py):([\w.]+)`", PAGE)))

# From the cellar to the roof, as in the picture.
FLOORS = (
    {"files", "names"},
    {"data_scripts", "shipped"},
    {"eval", "losses"},
    {"search", "training"},
    {"deploy", "examples"},
    {"cli", "train", "configs"},
)
# What needs less than the floors allow.
NEEDS_AT_MOST = {"eval": {"files", "names", "shipped"}, "losses": {"files", "names", "shipped"}}


@pytest.mark.parametrize("file,name", HOPS, ids=":".join)
def test_every_hop_is_there(file, name):
    node = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    for part in name.split("."):
        named = [item for item in node.body if getattr(item, "name", None) == part]
        assert named, f"{file} has no {name}"
        node = named[-1]


def test_the_way_has_its_hops():
    way = PAGE.partition("## The way")[2].partition("\n## ")[0]
    assert len(re.findall(r"^\d+\. ", way, re.MULTILINE)) >= 12
    assert len(re.findall(r"`[\w/]+\.py:[\w.]+`", way)) >= 15


def room(path):
    if path.name in SHIPPED:
        return "shipped"
    return path.parts[0] if len(path.parts) > 1 else path.stem


def test_the_picture_has_every_room():
    rooms = {path.parts[0] for path in product_modules() if len(path.parts) > 1}
    shown = set(re.findall(r"(\w+)/", "".join(re.findall(r">([^<>]*)<", PICTURE))))
    assert rooms <= shown
    assert all((ROOT / name).is_dir() for name in shown)
    assert all(name in PICTURE for name in SHIPPED)
    assert rooms | {"shipped", "cli", "train"} == set().union(*FLOORS)


def imported_rooms(path):
    """Rooms that a file imports from, as a set; what is in a function counts too."""
    package = ["vptsp", *path.parts[:-1]]
    modules = []
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules += [item.name for item in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module or "").split(".")] if node.module else base
            modules += [".".join([*base, item.name]) for item in node.names]
    found = {name.split(".")[1] for name in modules if name.startswith("vptsp.")}
    found = {vptsp._EXPORTS.get(name, name).partition(".")[0] for name in found}
    return {"shipped" if f"{name}.py" in SHIPPED else name for name in found} - {"_version", "__version__"}


def test_imports_run_downwards():
    floor = {name: number for number, rooms in enumerate(FLOORS) for name in rooms}
    above, between = set(), set()
    for path in product_modules():
        if path.name in ("__init__.py", "_version.py"):
            continue
        own = room(path)
        for other in imported_rooms(path) - {own}:
            if floor[other] > floor[own]:
                above.add((path.as_posix(), other))
            elif floor[other] == floor[own]:
                between.add((own, other))
            if other not in NEEDS_AT_MOST.get(own, floor):
                above.add((path.as_posix(), other))
    assert not above
    assert not {(b, a) for a, b in between} & between  # beside each other, one way at most
    assert len({name for path in product_modules() for name in imported_rooms(path)}) >= 8  # the search finds them


def test_what_travels_imports_nothing_else_of_the_package():
    for name in SHIPPED:
        nodes = list(ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))))
        relative = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.level]
        assert all(node.level == 1 and f"{node.module}.py" in SHIPPED for node in relative), name
        absolute = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
        assert not any(module.partition(".")[0] == "vptsp" for module in absolute), name


def test_names_of_files():
    benchmarks = [path for path in project_files() if path.parts[0] == "benchmarks" and path.suffix == ".py"]
    assert benchmarks
    names = Counter(path.name for path in product_modules() + benchmarks if path.name != "__init__.py")
    assert not [name for name, count in names.items() if count > 1]
    assert {name for name in names if name.endswith("_vptsp.py")} == set(SHIPPED)


def test_type_checkers_are_shown_what_is_exported():
    nodes = ast.parse((ROOT / "__init__.pyi").read_text(encoding="utf-8")).body
    aliases = [alias for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert len(aliases) == len(nodes) - 1  # under the docstring, one a line
    assert all(alias.asname == alias.name for alias in aliases)  # or they would not be exported
    assert {alias.name for alias in aliases} == set(vptsp.__all__)
