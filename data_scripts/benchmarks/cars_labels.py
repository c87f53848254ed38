"""The annotations of Cars-196, which are MATLAB files.

Nothing here imports torch or `datasets`.
"""

import io

import numpy as np

from ..data_errors import DataError
from .cars_names import CAR_NAMES, car_number


__all__ = ["read_annotations"]

_PATH_FIELDS = ("relative_im_path", "fname")


def read_annotations(content: bytes, where: str) -> list[tuple[int, str, str]]:
    """Read `cars_annos.mat`, `cars_train_annos.mat` or `cars_test_annos_withlabels.mat`.

    Args:
        content: The file (numbers and strings only are read from it; nothing in it is executed).
        where: Its name, for errors.

    Returns:
        Per image, the class's position in the official order (from 0), the path, and file and row for errors.

    Raises:
        DataError: it is not such a file, or a class is none of the official ones.
    """
    from scipy.io import loadmat

    try:
        content = loadmat(io.BytesIO(content), simplify_cells=True)
        annotations = content["annotations"]
        annotations = [annotations] if isinstance(annotations, dict) else list(annotations)
        fields = set(annotations[0])
    except Exception as error:  # scipy raises nearly anything on bytes that it doesn't understand
        raise DataError(
            f"{where}: expected a MATLAB file with 'annotations' ({type(error).__name__}: {error})"
        ) from error
    path_field = next((field for field in _PATH_FIELDS if field in fields), None)
    if path_field is None:
        raise DataError(f"{where}: its annotations have no {' or '.join(_PATH_FIELDS)}, but {', '.join(fields)}")
    if "class" not in fields:
        raise DataError(f"{where}: its annotations have no classes; is this cars_test_annos.mat, without labels?")
    numbers = _official_numbers(content.get("class_names"), where)
    rows = []
    for position, row in enumerate(annotations, 1):
        number = row["class"]
        if not isinstance(number, (int, np.integer)) or not 1 <= number <= len(numbers):
            raise DataError(f"{where}: row {position} has the class {number!r}; expected 1 to {len(numbers)}")
        rows.append((numbers[int(number) - 1], str(row[path_field]), f"{where}: row {position}"))
    return rows


def _official_numbers(class_names, where: str) -> list[int]:
    """Per class of a file, its position in the official order. Without names, they are in it."""
    if class_names is None:
        return list(range(len(CAR_NAMES)))
    numbers = []
    for name in np.atleast_1d(class_names):
        number = car_number(str(name))
        if number is None:
            raise DataError(f"{where}: {str(name)!r} is none of the 196 official classes, such as {CAR_NAMES[0]!r}")
        numbers.append(number)
    return numbers
