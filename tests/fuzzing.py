"""Mutations of valid files, and how many of them are tried: the same few in every run, many others by `make fuzz`."""

import contextlib
import os
import resource
import time

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st


FACTOR = int(os.environ.get("FUZZ_FACTOR", "1"))
MAX_BYTES = 1 << 30
MAX_SECONDS = 20
# What length fields, offsets and counts are made of.
_WORDS = [
    b"\x00",
    b"\xff",
    b"\x7f\xff\xff\xff",
    b"\xff" * 4,
    b"\xff" * 8,
    b"\x00" * 8,
    b"\x80" + b"\x00" * 7,
    b"9",
    b"[",
]
_edits = st.lists(
    st.tuples(
        st.sampled_from(["put", "insert", "delete", "repeat", "cut"]),
        st.floats(0, 1, exclude_max=True),
        st.sampled_from(_WORDS) | st.binary(min_size=1, max_size=6),
    ),
    min_size=1,
    max_size=4,
)


def examples(number):
    """Settings of a fuzzing test that tries so many examples, and `FUZZ_FACTOR` times as many if that is set."""
    return settings(
        max_examples=number * FACTOR, deadline=None, derandomize=FACTOR == 1, suppress_health_check=list(HealthCheck)
    )


def mutated(contents):
    """Strategy of damaged files: one of `contents` (name -> bytes), changed in up to four places.

    Yields:
        Name and bytes.
    """
    return st.tuples(st.sampled_from(sorted(contents)), _edits).map(
        lambda drawn: (drawn[0], _mutate(contents[drawn[0]], drawn[1]))
    )


def _mutate(content, edits):
    for kind, place, word in edits:
        at = int(place * (len(content) + 1))
        if kind == "put":
            content = content[:at] + word + content[at + len(word) :]
        elif kind == "insert":
            content = content[:at] + word + content[at:]
        elif kind == "delete":
            content = content[:at] + content[at + 8 * len(word) :]
        elif kind == "repeat":
            content = content[:at] + content[max(at - 8 * len(word), 0) :]
        else:
            content = content[:at]
    return content


@contextlib.contextmanager
def bounded():
    """A block that takes neither long, of this process's own time, nor much memory."""
    before, start = _peak_bytes(), time.process_time()
    yield
    assert time.process_time() - start < MAX_SECONDS
    assert _peak_bytes() - before < MAX_BYTES


def _peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
