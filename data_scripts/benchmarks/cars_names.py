"""The 196 classes of Cars-196 in the official order, as `cars_meta.mat` and `cars_annos.mat` have it.

It is nearly the alphabetical one, but not quite. The first 98 train, the last 98 test.
"""

from pathlib import Path


__all__ = ["CAR_NAMES", "car_number"]

CAR_NAMES = tuple(Path(__file__).with_suffix(".txt").read_text(encoding="utf-8").splitlines())
_NUMBERS = {name.replace("/", "-"): number for number, name in enumerate(CAR_NAMES)}


def car_number(name: str) -> int | None:
    """Position of a class in the official order, from 0; None if there is no such class.

    Args:
        name: Official name, or the name of a class folder (where "/" is "-").
    """
    return _NUMBERS.get(name.strip().replace("/", "-"))
