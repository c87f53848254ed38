"""The files of the project as a checkout has them, without what builds, runs and tools leave there."""

from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ("backbones_vptsp.py", "configuration_vptsp.py", "loading_vptsp.py", "modeling_vptsp.py")
"""What is copied into every retriever."""
LEFT_BEHIND = ("build", "dist", "runs", "__pycache__")
NOT_PACKAGED = ("benchmarks", "docs", "tests")


def project_files() -> list[Path]:
    """Paths relative to the root, sorted."""
    found, folders = [], [ROOT]
    while folders:
        for path in folders.pop().iterdir():
            if path.name.startswith(".") or path.name in LEFT_BEHIND or path.name.endswith(".egg-info"):
                continue
            (folders if path.is_dir() else found).append(path)
    return sorted(path.relative_to(ROOT) for path in found)


def product_files() -> list[Path]:
    """Those that are installed: modules and data of the package."""
    return [
        path
        for path in project_files()
        if path.parts[0] not in NOT_PACKAGED
        and path.parts[:2] != ("deploy", "docker")
        and (len(path.parts) > 1 or path.suffix in (".py", ".pyi", ".typed"))
    ]


def product_modules() -> list[Path]:
    return [path for path in product_files() if path.suffix == ".py"]
