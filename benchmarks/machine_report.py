"""What every benchmark writes: a table to read and JSON with where and with what it was measured."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

from vptsp.files.atomic import write_json


def environment(device) -> dict:
    """Hardware, versions, commit and command of this run."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit.stdout.strip() or None,
        "device": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "transformers")},
    }


def _processor():
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()} ({torch.backends.cpu.get_cpu_capability()})"


def peak_host_megabytes() -> float:
    """Largest resident memory that this process has had."""
    status = Path("/proc/self/status")
    if status.is_file():  # `getrusage` starts from the peak of the parent process
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1e3
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def table(rows) -> str:
    """Markdown table of dicts with the same keys; floats with three significant digits."""
    head = list(rows[0])
    cells = [[_shown(row[name]) for name in head] for row in rows]
    widths = [max(len(name), *(len(line[i]) for line in cells)) for i, name in enumerate(head)]
    lines = [head, ["-" * width for width in widths], *cells]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def _shown(value):
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return "" if value is None else str(value)


def write_report(rows, device, output=None, **more):
    """Print the table and, if `output` is given, write rows, environment and `more` there as JSON."""
    print(table(rows), flush=True)
    if output is not None:
        write_json(output, {**environment(device), "rows": rows, **more})
