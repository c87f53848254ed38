"""Which classes train and which test, when one set of classes holds both; or which images, where classes are the same.

Nothing here imports torch or `datasets`.
"""

import math
import random
import unicodedata
from collections.abc import Sequence
from fractions import Fraction

from ..names.registry import near_values
from .data_errors import DataError, some
from .paths import usable_path


__all__ = ["CLASS_SPLITS", "asked_images", "check_class_split", "class_list_file", "read_class_list", "split_classes"]

CLASS_SPLITS = ("first", "alternate", "random", "seen")
_DRAWN = ("random", "seen")
_DEFAULT_SHARE = 0.5


def class_list_file(value: str | Sequence[str] | None) -> str | None:
    """The text file that a `train_classes` / `test_classes` value stands for, or None if it holds the names.

    Args:
        value: A string is the path of a text file; so is a list of one name that ends in `.txt`
            (which is what the command line gives).

    Returns:
        The path, or None.
    """
    if isinstance(value, str):
        return value
    if value is not None and len(value) == 1 and str(value[0]).endswith(".txt"):
        return str(value[0])
    return None


def read_class_list(value: str | Sequence[str], option: str) -> list[str]:
    """Class names from a list, or from a text file with one name per line (blank lines don't count).

    Args:
        value: As `class_list_file` takes it.
        option: Name of the option, for errors.

    Returns:
        The names in their order.

    Raises:
        DataError: the file can't be read, there is no name, or a name occurs twice.
    """
    path = class_list_file(value)
    where = option
    if path is None:
        names = [str(name) for name in value]
    else:
        where = f"{option} file {path}"
        try:
            text = usable_path(path).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"{option}: expected a text file with one class name per line at {path}: {error}"
            ) from error
        names = [line.strip() for line in text.splitlines() if line.strip()]
    if not names:
        raise DataError(f"{where} names no class")
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise DataError(f"{where} names {some(twice)} more than once")
    return names


def check_class_split(
    train_classes: str | Sequence[str] | None = None,
    test_classes: str | Sequence[str] | None = None,
    test_share: float = _DEFAULT_SHARE,
    class_split: str = "first",
    split_seed: int = 0,
) -> None:
    """Check the options that say how to split.

    Raises:
        DataError: one is out of range, lists of classes come with an option that leaves nothing to list or would say
            the same otherwise, or there is a seed and nothing is drawn.
    """
    if not 0 <= test_share < 1:
        raise DataError(f"test_share must be between 0 and 1 (0: no test; 1 excluded), got {test_share}")
    if class_split not in CLASS_SPLITS:
        raise DataError(f"class_split must be one of {', '.join(CLASS_SPLITS)}, got {class_split!r}")
    given = "test_classes" if train_classes is None else "train_classes"
    if (train_classes, test_classes) != (None, None) and (test_share == 0 or class_split == "seen"):
        other = (
            "test_share 0 lets all classes train" if test_share == 0 else "class_split 'seen' lets all train and test"
        )
        raise DataError(f"{given} says which classes are on which side, but {other}: give one of them")
    if (train_classes, test_classes) != (None, None) and test_share != _DEFAULT_SHARE:
        raise DataError(f"{given} says which classes are on which side, and so does test_share {test_share}: give one")
    if split_seed and class_split not in _DRAWN:
        raise DataError(
            f"split_seed {split_seed} is for class_split {' and '.join(_DRAWN)}: class_split {class_split!r} draws "
            "nothing"
        )


def asked_images(count: int, class_name: str, test_share: float, split_seed: int = 0) -> list[int]:
    """Which images of a class are the queries of `class_split` `seen`, where all classes train and are asked for.

    Args:
        count: Images of the class.
        class_name: Its name; with the seed it decides which, whatever other classes there are.
        test_share: Of the images, 0 < share < 1.
        split_seed: Another seed, other images.

    Returns:
        `floor(count * test_share)` positions, sorted, but at least one of two images and none of a single one.
    """
    asked = min(max(math.floor(count * Fraction(str(test_share))), 1), count - 1)
    return sorted(random.Random(f"{split_seed} {class_name}").sample(range(count), max(asked, 0)))


def split_classes(
    class_names: Sequence[str],
    train_classes: str | Sequence[str] | None = None,
    test_classes: str | Sequence[str] | None = None,
    test_share: float = _DEFAULT_SHARE,
    class_split: str = "first",
    split_seed: int = 0,
    keep_order: bool = False,
) -> tuple[list[str], list[str]]:
    """Split class names into training and test classes.

    With `train_classes` or `test_classes` the lists decide, and no `test_share` may be given: one list leaves the
    other side all the rest; with both, classes named in neither are left out. Without lists, the number of test
    classes is `floor(C * test_share)`, computed exactly in decimals, and `class_split` says which:

    - `first`: of the names in sorted order, the first ones train (the convention of CUB-200-2011);
    - `alternate`: position i is a test class where `floor((i + 1) * share) > floor(i * share)`, so a share of 0.5
      gives even positions to training and odd ones to test;
    - `random`: drawn with `split_seed`.

    A share of 0 lets all classes train. (`seen` is no split of classes: see `asked_images`.)

    Args:
        class_names: All C names.
        train_classes: Names, or the path of a text file with one per line.
        test_classes: The same.
        test_share: 0 <= share < 1.
        class_split: `first`, `alternate` or `random`.
        split_seed: For `random`.
        keep_order: Take the order of `class_names` instead of the sorted one.

    Returns:
        `(train, test)`, each in sorted order (code points; or that of `class_names`), each with at least one class,
        but for the test with a share of 0.

    Raises:
        DataError: an unknown or repeated name, a class in both lists, an option out of range, or a side left empty.
    """
    names = list(class_names) if keep_order else sorted(class_names)
    check_class_split(train_classes, test_classes, test_share, class_split, split_seed)
    if class_split == "seen":
        raise DataError("class_split 'seen' splits the images of each class, not the classes")
    if train_classes is not None or test_classes is not None:
        return _split_by_lists(names, train_classes, test_classes)
    if test_share == 0:
        return names, []
    share = Fraction(str(test_share))
    num_test = math.floor(len(names) * share)
    if num_test < 1 or num_test >= len(names):
        raise DataError(
            f"test_share {test_share} of {len(names)} classes gives {len(names) - num_test} training and {num_test} "
            "test classes; expected at least one of each, or test_share 0 for no test"
        )
    if class_split == "first":
        test = set(names[len(names) - num_test :])
    elif class_split == "alternate":
        test = {name for i, name in enumerate(names) if math.floor((i + 1) * share) > math.floor(i * share)}
    else:
        test = set(random.Random(split_seed).sample(names, num_test))
    return [name for name in names if name not in test], [name for name in names if name in test]


def _split_by_lists(names, train_classes, test_classes):
    train = None if train_classes is None else _find_names(names, train_classes, "train_classes")
    test = None if test_classes is None else _find_names(names, test_classes, "test_classes")
    if train is None:
        train = set(names) - test
    elif test is None:
        test = set(names) - train
    both = sorted(train & test)
    if both:
        raise DataError(
            f"{some(both)} {'is' if len(both) == 1 else 'are'} in both train_classes and test_classes; "
            "training and test classes must be disjoint"
        )
    for side, chosen, other in (("training", train, "test_classes"), ("test", test, "train_classes")):
        if not chosen:
            raise DataError(f"{other} names all {len(names)} classes, so no {side} class is left")
    return [name for name in names if name in train], [name for name in names if name in test]


def _find_names(names: list[str], value: str | Sequence[str], option: str) -> set[str]:
    known = {unicodedata.normalize("NFC", name): name for name in names}
    found, unknown = set(), []
    for name in read_class_list(value, option):
        match = known.get(unicodedata.normalize("NFC", name))
        if match is None:
            unknown.append(name)
        else:
            found.add(match)
    if unknown:
        hints = []
        for name in unknown[:5]:
            near = near_values(name, names, likeness=0.5)
            hints.append(f"{name!r}" + (f" (near: {', '.join(map(repr, near))})" if near else ""))
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise DataError(
            f"{option} names unknown classes: {', '.join(hints)}{more}; the {len(names)} classes are {some(names)}"
        )
    return found
