"""The package's own environment variables, looked at before anything slow is imported."""

from __future__ import annotations

import os

from .registry import nearest


LINEAR_LIBRARIES = ("measured", "torch", "onednn")


def environment_error() -> str | None:
    """What is wrong with the variables, in one line; None if nothing is."""
    library = os.environ.get("VPTSP_LINEAR", "measured")
    if library in LINEAR_LIBRARIES:
        return None
    known = ", ".join(LINEAR_LIBRARIES)
    near = nearest(library, LINEAR_LIBRARIES)
    return f"the environment variable VPTSP_LINEAR must be one of {known}, got {library!r}{near}"


__all__ = ["environment_error"]
