"""What data a run uses, as one dataclass for `HfArgumentParser`. Importing this is cheap."""

import os
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from ..names.field_values import SEED, check_fields
from .archives import archive_kind
from .class_folders import LAYOUTS, detect_layout, everything_trains, existing_folder
from .class_split import check_class_split, class_list_file
from .data_errors import DataError
from .dataset_options import LABELS, DatasetOptions, LabelOptions, option_names
from .dataset_registry import DATASETS, find_dataset, load_splits, refuse_unknown_options
from .hub_places import hub_places
from .image_formats import MAX_IMAGE_PIXELS, check_pixel_limit
from .paths import check_folder_to_write, usable_path
from .sources import locate
from .table_files import refuse_table, table_kind


__all__ = [
    "BUILDER_OPTIONS",
    "DATA_BOUNDS",
    "DataArguments",
    "check_data_arguments",
    "check_output_apart",
    "data_hints",
]

BUILDER_OPTIONS = option_names(DatasetOptions)
DATA_BOUNDS = {"split_seed": SEED}
_CLASS_LISTS = ("train_classes", "test_classes")


@dataclass
class DatasetPlace:
    """Which data set, and where."""

    dataset_name: str = field(default="folder", metadata={"help": f"Data set: {', '.join(DATASETS)}."})
    data_dir: str | None = field(
        default=None, metadata={"help": "Folder of the data set, its table, or (for the benchmarks) its archive."}
    )
    data_cache_dir: str | None = field(
        default=None, metadata={"help": "Where prepared tables go; by default where `datasets` keeps them."}
    )


@dataclass
class DataArguments(DatasetOptions, DatasetPlace):
    """Which data, how it is split, and how images are cut to size.

    Attributes:
        resize_size: None stands for `round(image_size * 256 / 224)`, and is replaced by it.

    Raises:
        ValueError: a value is out of range; the message names the field.
    """

    validation_share: float = field(
        default=0.0,
        metadata={
            "help": "Share of the training classes that don't train and choose the best epoch; 0: test images do."
        },
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read the data as a stream and write no tables; see docs/streaming.md."}
    )
    skip_corrupt: bool = field(
        default=False, metadata={"help": "Leave out images that can't be read, and list them, instead of stopping."}
    )
    group_column: str | None = field(
        default=None,
        metadata={"help": "Column of a table without labels: photos of one value (a listing, a video) stay together."},
    )
    image_size: int = field(default=224, metadata={"help": "Side in pixels of what the model sees."})
    resize_size: int | None = field(
        default=None,
        metadata={"help": "Short side before the centre crop in evaluation; by default image_size * 256 / 224."},
    )
    max_image_pixels: int = field(
        default=MAX_IMAGE_PIXELS,
        metadata={"help": "Pixels of an image at most; one of more can't be read. It is looked at before decoding."},
    )
    crop_scale_min: float = field(
        default=0.08, metadata={"help": "Smallest share of an image's area that a training crop covers."}
    )
    horizontal_flip: bool = field(default=True, metadata={"help": "Mirror half of the training images."})

    def __post_init__(self) -> None:
        for name in _CLASS_LISTS:
            value = getattr(self, name)
            if isinstance(value, str):
                setattr(self, name, [value] if value.endswith(".txt") else _refuse_name(name, value))
        try:
            check_fields(vars(self), data_hints(), DATA_BOUNDS)
        except ValueError as error:
            raise DataError(str(error)) from error
        for name in _CLASS_LISTS:
            if getattr(self, name) is not None:  # YAML reads the names of digits as numbers
                setattr(self, name, [str(item) for item in getattr(self, name)])
        if not 0 <= self.validation_share < 1:
            raise DataError(f"validation_share must be between 0 and 1 (1 excluded), got {self.validation_share}")
        reasons = {
            "a stream has no table of them": self.streaming,
            "with class_split 'seen' all train and test": self.class_split == "seen",
            f"with labels {self.labels!r} they are clusters": self.labels != "given",
        }
        if self.validation_share and (other := next((text for text, holds in reasons.items() if holds), None)):
            raise DataError(f"validation_share keeps training classes apart, but {other}: give one of them")
        if self.layout not in LAYOUTS:
            raise DataError(f"layout must be one of {', '.join(LAYOUTS)}, got {self.layout!r}")
        check_class_split(self.train_classes, self.test_classes, self.test_share, self.class_split, self.split_seed)
        lists = "train_classes" if self.train_classes is not None else "test_classes"
        if self.class_split != "first" and not self.validation_share and getattr(self, lists) is not None:
            raise DataError(
                f"{lists} says which classes are on which side, and so does class_split {self.class_split!r}: give one"
            )
        self._check_labels()
        if self.digit_size < 8:
            raise DataError(f"digit_size must be >= 8, got {self.digit_size}")
        if self.image_size < 1:
            raise DataError(f"image_size must be >= 1, got {self.image_size}")
        if self.resize_size is None:
            self.resize_size = round(self.image_size * 256 / 224)
        if self.resize_size < self.image_size:
            raise DataError(f"resize_size must be >= image_size {self.image_size}, got {self.resize_size}")
        check_pixel_limit(self.max_image_pixels)
        if not 0 < self.crop_scale_min <= 1:
            raise DataError(f"crop_scale_min must be above 0 and at most 1, got {self.crop_scale_min}")

    def _check_labels(self) -> None:
        if self.labels not in LABELS:
            raise DataError(f"labels must be one of {', '.join(LABELS)}, got {self.labels!r}")
        if self.labels == "given" and self.group_column is not None:
            raise DataError(f"group_column is of training without labels, got {self.group_column!r} with labels given")
        if self.test_labels and self.labels != "none":
            raise DataError(f"test_labels goes with labels none, got labels {self.labels}")
        if self.labels != "given" and self.streaming:
            raise DataError(
                f"labels {self.labels} reads photos by row, several times, which a stream can't: leave streaming out"
            )

    def builder_options(self) -> dict[str, Any]:
        """The options for `load_splits`: those that differ from their defaults.

        An option that the data set does not take is in it too, so that it is refused and not silently ignored.
        """
        defaults = {item.name: item.default for item in fields(self) if item.default is not MISSING}
        given = {name: getattr(self, name) for name in BUILDER_OPTIONS if getattr(self, name) != defaults[name]}
        takes_labels = set(option_names(LabelOptions)) <= set(find_dataset(self.dataset_name).options)
        if self.labels == "none" and not takes_labels:  # every image has one, which `load_splits` puts away
            del given["labels"]
        return given

    def load_splits(self):
        """`load_splits` with these arguments, see there; with a `validation_share` also the split `validation`.

        With `labels` `none`, those of `train` are put away.
        """
        splits = load_splits(
            self.dataset_name, self.data_dir, self.data_cache_dir, streaming=self.streaming, **self.builder_options()
        )
        if self.labels == "none":
            from .unlabelled_tables import without_labels  # slow to load

            splits["train"] = without_labels(splits["train"])
        if not self.validation_share:
            return splits
        from .validation_split import split_off_validation  # slow to load

        return split_off_validation(splits, self.validation_share, self.class_split, self.split_seed)


@cache
def data_hints() -> dict[str, Any]:
    """Name -> annotation of every field, as a file may give it."""
    return {**get_type_hints(DataArguments), **dict.fromkeys(_CLASS_LISTS, list[str | int] | str | None)}


def _refuse_name(name: str, value: str) -> list[str]:
    raise DataError(f"{name} must be a list of names or the path of a .txt file, got {value!r}")


def check_data_arguments(args: DataArguments) -> None:
    """Check paths and options without listing the images or importing anything heavy (milliseconds).

    It finds a wrong name, option or folder before a run loads anything; what only a listing can tell comes from
    `load_splits`.

    Args:
        args: The arguments.

    Raises:
        DataError: unknown data set, an option that it does not take, `data_dir` missing or plainly not of this data
            set, or a class list file that is not there.
    """
    entry = find_dataset(args.dataset_name)
    refuse_unknown_options(args.dataset_name, args.builder_options())
    if args.data_cache_dir is not None:
        check_folder_to_write(args.data_cache_dir, "data_cache_dir")
    for name in ("train_classes", "test_classes"):
        path = class_list_file(getattr(args, name))
        if path == "" or (path is not None and not usable_path(path).is_file()):
            raise DataError(f"{name}: expected a text file with one class name per line at {path}, there is none")
    if args.dataset_name == "hub":
        hub_places(args, args.data_dir)
    if entry.data_dir == "table":
        table_kind(args.data_dir)
        return
    if args.data_dir is None and entry.data_dir.endswith("none"):
        return
    if entry.data_dir == "none":
        raise DataError(f"the data set {args.dataset_name!r} has no data_dir, got {args.data_dir!r}")
    if args.data_dir is None:
        holds = "that holds its images" + (", or its archive" if "archive" in entry.data_dir else "")
        raise DataError(f"data_dir is missing: the data set {args.dataset_name!r} needs the folder {holds}")
    if args.dataset_name == "folder":
        refuse_table(args.data_dir)
    if entry.any_of:
        _check_place(args, entry.any_of)
    else:
        root = existing_folder(args.data_dir)
        if args.dataset_name == "folder" and not everything_trains(root, args):
            detect_layout(root, args.layout)


def _check_place(args: DataArguments, any_of: tuple[str, ...]) -> None:
    patterns = [name for name in any_of if "*" in name]
    if any(any(Path(args.data_dir).expanduser().glob(name)) for name in patterns):
        return
    names = [name for name in any_of if name not in patterns]  # a pattern would take the folder above for the data set
    shown = [name for name in names if not name.endswith((".tar", ".tar.gz"))]
    locate(
        args.data_dir,
        lambda folder: next((name for name in names if (folder / name).exists()), None),
        archive_kind,
        f"{', '.join(shown[:-1])} or {shown[-1]} (the data set {args.dataset_name!r})",
    )


def check_output_apart(args: DataArguments, output_dir: str | Path) -> None:
    """Check that a run does not write its pictures to where its images are read from.

    Args:
        args: The arguments.
        output_dir: Folder of the run.

    Raises:
        DataError: it lies in `data_dir`, all of whose folders are read.
    """
    if args.data_dir is None or find_dataset(args.dataset_name).any_of:  # a benchmark has folders of its own
        return
    root, output = (Path(os.path.realpath(usable_path(place))) for place in (args.data_dir, output_dir))
    if root == output or root in output.parents:
        raise DataError(
            f"output_dir {output} lies in data_dir {root}, where pictures of this run would be taken for data by the "
            "next: give an output_dir elsewhere"
        )
