"""The package as it is installed: a wheel, built offline, and a checkout that is installed as editable."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from project_files import ROOT, SHIPPED, product_files, project_files

import vptsp


pytest.importorskip("setuptools", minversion="77")  # as pyproject.toml asks for; the build is not isolated

SAVE = """
import json, sys
from pathlib import Path
import vptsp
from transformers import ViTConfig

sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "image_size": 16}
config = vptsp.VPTSPConfig(backbone_config=ViTConfig(**sizes, patch_size=8), num_prompts=1, embedding_dim=4)
vptsp.VPTSPModel(config).save_pretrained("saved")
print(json.dumps({"file": vptsp.__file__, "saved": sorted(path.name for path in Path("saved").glob("**/*.py"))}))
"""


def run(*words, **options):
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the project, with a file that an earlier build has left."""
    folder = tmp_path_factory.mktemp("source")
    for path in project_files():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, folder / path)
    stale = folder / "build" / "lib" / "vptsp" / "losses" / "stale.py"
    stale.parent.mkdir(parents=True)
    stale.write_text("")
    return folder


@pytest.fixture(scope="module")
def wheel(source):
    installed = f"{sys.prefix}/.installed"
    run("make", "--old-file", installed, "wheel", f"VENV={sys.prefix}", cwd=source)
    (file,) = (source / "dist").iterdir()
    return file


class Environment:
    """A virtual environment of its own, which sees what this one has installed besides."""

    def __init__(self, folder, *install):
        run(sys.executable, "-m", "venv", "--without-pip", folder)
        self.scripts = folder / ("Scripts" if sys.platform == "win32" else "bin")
        self.python = self.scripts / "python"
        (self.packages,) = folder.glob("**/site-packages")
        (self.packages / "here.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
        # for building, setuptools must come before what Python itself brings along
        environment = {**os.environ, "PYTHONPATH": sysconfig.get_path("purelib")}
        options = ("--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed", "--no-compile")
        run(self.python, "-m", "pip", "install", *options, *install, env=environment)


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    return Environment(tmp_path_factory.mktemp("installed"), wheel)


def test_the_wheel_holds_the_product_and_nothing_else(wheel):
    names = {Path(name) for name in zipfile.ZipFile(wheel).namelist()}
    product = {path.relative_to("vptsp") for path in names if path.parts[0] == "vptsp"}
    assert product == set(product_files())
    assert {path.parts[0] for path in names} == {"vptsp", f"vptsp-{vptsp.__version__}.dist-info"}
    for part in (
        "py.typed",
        "configs/table1/lora.yaml",
        "eval/retrieval_metric/README.md",
        "cli.py",
        "data_scripts/benchmarks/cars_names.txt",
    ):
        assert Path(part) in product


def test_the_wheel_works(installed, tmp_path):
    assert "usage: vptsp COMMAND" in run(installed.scripts / "vptsp", "--help", cwd=tmp_path)
    found = json.loads(run(installed.python, "-c", SAVE, cwd=tmp_path))
    assert Path(found["file"]) == installed.packages / "vptsp" / "__init__.py"
    assert found["saved"] == sorted(SHIPPED)


def test_an_editable_install_works(source, tmp_path):
    editable = Environment(tmp_path / "environment", "--editable", source)
    code = (
        "import vptsp; from importlib.util import find_spec; from vptsp.losses import __file__ as losses;"
        "print(vptsp.__file__, losses, find_spec('vptsp.data_scripts.benchmarks.cub').origin)"
    )
    files = ("__init__.py", "losses/__init__.py", "data_scripts/benchmarks/cub.py")
    assert run(editable.python, "-c", code, cwd=tmp_path).split() == [str(source / file) for file in files]
    assert "usage: vptsp COMMAND" in run(editable.scripts / "vptsp", "--help", cwd=tmp_path)


SCRIPT = """
from vptsp import EmbeddingStore, RetrievalIndex, VPTSPConfig, retrieval_metrics

def largest(folder: str) -> int:
    return len(EmbeddingStore.open(folder))

config = VPTSPConfig(num_prompts=3)
reveal_type(config.num_prompts)
reveal_type(RetrievalIndex)
reveal_type(retrieval_metrics)
from vptsp import map_at_q
"""
SETTINGS = """
[mypy]
follow_imports = skip
ignore_missing_imports = True
[mypy-vptsp.*]
follow_imports = silent
"""


def test_type_checkers_see_the_public_names(installed, tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "mypy.ini").write_text(SETTINGS)
    words = [sys.executable, "-m", "mypy", "--python-executable", str(installed.python), "script.py"]
    said = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True).stdout.splitlines()
    notes = [line.partition("Revealed type is ")[2] for line in said if "Revealed type" in line]
    assert len(notes) == 3
    assert notes[0] == '"int"'
    assert "vptsp.search.index.RetrievalIndex" in notes[1]
    assert "query_embeddings" in notes[2]
    errors = [line for line in said if ": error:" in line]
    assert len(errors) == 1
    assert 'Module "vptsp" has no attribute "map_at_q"' in errors[0]
