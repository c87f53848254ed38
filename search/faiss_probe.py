"""Whether faiss can open a file and search in it, tried in a process of its own.

faiss trusts what it reads: of a damaged file it may crash, hang or ask for all memory, which no `except` catches. The
process of its own maps what faiss can map, so that it reads little of a large file.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import faiss
import numpy as np
import psutil


_SECONDS, _BYTES_PER_SECOND, _MORE_MEMORY = 60, 20 << 20, 1 << 30


def check_with_faiss(path, flags):
    """A ValueError, which says why, unless faiss can open a file and search in it.

    Args:
        path: The file.
        flags: Of `faiss.read_index`.
    """
    path = Path(path)
    command = [sys.executable, "-P", __file__, str(path), str(flags)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    seconds = _SECONDS + path.stat().st_size / _BYTES_PER_SECOND
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment)
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"faiss can't read {path} in {seconds:.0f} s: it is damaged") from error
    if done.returncode:
        reason = f"it stopped with status {done.returncode}" if done.returncode < 0 else done.stderr.strip()[-500:]
        raise ValueError(f"faiss can't read {path}, which is damaged: {reason}")


def _try(path, flags):
    _bound_memory(2 * Path(path).stat().st_size + _MORE_MEMORY)
    index = faiss.read_index(path, flags)
    _check_parts(index)
    if index.ntotal:
        index.search(np.full((1, index.d), index.d**-0.5, np.float32), min(10, index.ntotal))


def _bound_memory(more):
    """Refuse to this process all memory beyond what it has and so many bytes, where that can be done."""
    try:
        import resource  # there is none on Windows

        resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + more,) * 2)
    except (ImportError, OSError, ValueError):
        return


def _check_parts(index):
    """A ValueError unless the parts of an index fit together, which faiss doesn't look at."""
    index = faiss.downcast_index(index)
    inner = []
    if isinstance(index, faiss.IndexIDMap):
        _require("keys", faiss.vector_to_array(index.id_map).size, index.ntotal)
        inner = [index.index]
    elif isinstance(index, faiss.IndexPreTransform):
        width = index.d
        for number in range(index.chain.size()):
            transform = faiss.downcast_VectorTransform(index.chain.at(number))
            _require("width of a projection", transform.d_in, width)
            width = transform.d_out
        _require("width below the projection", index.index.d, width)
        _require("vectors below the projection", index.index.ntotal, index.ntotal)
    elif isinstance(index, faiss.IndexRefine):
        inner = [index.base_index, index.refine_index]
    elif isinstance(index, faiss.IndexIVF):
        lists = index.invlists
        _require("vectors in lists", sum(lists.list_size(number) for number in range(lists.nlist)), index.ntotal)
        _require("lists", lists.nlist, index.quantizer.ntotal)
        _require("width of the centroids", index.quantizer.d, index.d)
    if isinstance(index, faiss.IndexFlatCodes):
        _require("bytes of vectors", index.codes.size(), index.ntotal * index.code_size)
    for part in inner:
        _require("vectors of a part", part.ntotal, index.ntotal)
        _require("width of a part", part.d, index.d)
    for part in [index.index] if isinstance(index, faiss.IndexPreTransform) else inner:
        _check_parts(part)


def _require(what, found, expected):
    if found != expected:
        raise ValueError(f"{what}: {found}, expected {expected}")


if __name__ == "__main__":
    try:
        _try(sys.argv[1], int(sys.argv[2]))
    except (Exception, MemoryError) as problem:
        sys.exit(" ".join(str(problem).split()) or type(problem).__name__)


__all__ = ["check_with_faiss"]
