"""What brings a browser to continuous integration never ends it, and says what came of it."""

import os
import subprocess

import pytest
from project_files import ROOT


SCRIPT = ROOT / ".ci" / "browser"
BASE = ("bash", "id", "timeout", "sh", "env", "sleep")
if os.name != "posix":
    pytest.skip("for a shell", allow_module_level=True)


def browser(tmp_path, seconds=5, **programs):
    """Exit status and output where there are these programs, as lines of shell, and the base of a system."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in set(BASE) - set(programs):  # what is written below must be no link to the system's own
        place = next(p for p in (f"/usr/bin/{name}", f"/bin/{name}") if os.path.exists(p))  # noqa: PTH110
        (folder / name).symlink_to(place)
    for name, text in programs.items():
        with (folder / name.replace("_", "-")).open("x") as file:
            file.write(f"#!/bin/sh\n{text}\n")
        (folder / name.replace("_", "-")).chmod(0o755)
    words = [str(SCRIPT), str(folder / "python"), str(seconds)]
    environment = {"PATH": str(folder), "PLACE": str(folder)}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=60, check=False)
    return done.returncode, done.stdout + done.stderr


SKIPPED = "browser: no Chromium is to be had here, the tests of the search page in a browser are skipped\n"
MADE = "echo > $PLACE/chromium; /bin/chmod 755 $PLACE/chromium"
FAILS, HANGS = "exit 1", "exec sleep 100"


@pytest.mark.parametrize(
    "programs, said",
    [
        ({"chromium": "exit 0", "python": FAILS}, ""),
        ({"id": "echo 0", "apt_get": MADE, "python": FAILS}, "browser: Chromium from the system's packages\n"),
        ({"id": "echo 0", "apt_get": FAILS, "python": "exit 0"}, "browser: Chromium from Playwright\n"),
        ({"id": "echo 1000", "apt_get": MADE, "python": FAILS}, SKIPPED),  # only root installs
        ({"id": "echo 0", "apt_get": FAILS, "python": FAILS}, SKIPPED),
        ({"id": "echo 0", "apt_get": HANGS, "python": HANGS}, SKIPPED),
        ({}, SKIPPED),
    ],
)
def test_a_browser_or_a_line(tmp_path, programs, said):
    assert browser(tmp_path, seconds=1, **programs) == (0, said)


def test_it_goes_before_the_tests():
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert lines.index(".ci/browser .venv/bin/python") < lines.index("make test") < lines.index("make test-docs")
