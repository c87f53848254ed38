"""The options that data sets take: each stands here once, with its default and its description.

A builder's configuration inherits the options of its data set, `DataArguments` those of all data sets, and the
registry takes their names from here. Nothing here imports torch or `datasets`.
"""

from dataclasses import dataclass, field, fields

from .class_folders import LAYOUTS
from .class_split import CLASS_SPLITS


__all__ = [
    "LABELS",
    "BenchmarkOptions",
    "ClassSplitOptions",
    "ColumnOptions",
    "DatasetOptions",
    "DigitsOptions",
    "HubOptions",
    "LabelOptions",
    "LayoutOptions",
    "TableOptions",
    "option_names",
]


LABELS = ("given", "none", "partial")


@dataclass
class ClassSplitOptions:
    """Options of data sets whose classes are split here; see `class_split.split_classes`.

    Attributes:
        train_classes: Also one string: the path of a text file.
        test_classes: The same.
    """

    train_classes: list[str] | None = field(
        default=None, metadata={"help": "Names of the training classes, or a .txt file with one per line."}
    )
    test_classes: list[str] | None = field(
        default=None, metadata={"help": "Names of the test classes, or a .txt file with one per line."}
    )
    test_share: float = field(
        default=0.5,
        metadata={"help": "Share of the classes that test, without class lists; 0: all train, nothing is tested."},
    )
    class_split: str = field(
        default="first",
        metadata={"help": f"Which classes train, without class lists: {', '.join(CLASS_SPLITS)} (all do)."},
    )
    split_seed: int = field(default=0, metadata={"help": "Seed of class_split random."})


@dataclass
class LayoutOptions(ClassSplitOptions):
    """Options of data sets that may come with splits of their own.

    Attributes:
        layout: `auto`, `classes`, `train_test` or `query_gallery`.
    """

    layout: str = field(
        default="auto",
        metadata={"help": f"Layout of class folders, or splits of a table: {', '.join(LAYOUTS)}."},
    )


@dataclass
class LabelOptions:
    """Options of data sets whose training images may lack labels.

    Attributes:
        labels: `given`; `none`: folders or columns say nothing of the classes of training images, which may lack them;
            `partial`: rows with an empty cell, and images beside class folders, have no class.
        test_labels: Without training labels, split classes off as with them, and test on these.
    """

    labels: str = field(
        default="given",
        metadata={"help": f"Labels of training images: {', '.join(LABELS)} (cells or folders lack)."},
    )
    test_labels: bool = field(
        default=False,
        metadata={"help": "With labels none, still split classes off (test_share, ...) to score on their labels."},
    )


@dataclass
class DigitsOptions(ClassSplitOptions):
    """Options of `Digits`.

    Attributes:
        digit_size: At 8 they are the scans themselves, above they are enlarged (bicubic).
    """

    digit_size: int = field(default=32, metadata={"help": "Side in pixels that the digits are enlarged to."})


@dataclass
class BenchmarkOptions:
    """Options of the data sets that have a published split."""

    verify_counts: bool = field(
        default=True, metadata={"help": "Whether a benchmark must have the published numbers of images and classes."}
    )


@dataclass
class ColumnOptions(LayoutOptions):
    """Options of data sets that are tables.

    Attributes:
        label_column: `ClassLabel`, integers or strings.
        train_split: Whose classes are split, where they are; None for `train`, or the only split there is.
        test_split: Of the layout `train_test`; None for `test`.
        query_split: Of the layout `query_gallery`; None for `query`.
        gallery_split: Of the layout `query_gallery`; None for `gallery`.
    """

    image_column: str | None = field(
        default=None, metadata={"help": "Column of images, or of their paths; by default found by its name."}
    )
    label_column: str | None = field(
        default=None, metadata={"help": "Column of classes; by default found by its name."}
    )
    train_split: str | None = field(
        default=None, metadata={"help": "Split of a table that trains, or several as in train+validation."}
    )
    test_split: str | None = field(default=None, metadata={"help": "Split of a table that tests, or several."})
    query_split: str | None = field(default=None, metadata={"help": "Split of a table that asks, or several."})
    gallery_split: str | None = field(
        default=None, metadata={"help": "Split of a table that is searched by query_split, or several."}
    )


@dataclass
class TableOptions(ColumnOptions, LabelOptions):
    """Options of `TableImages`."""

    split_column: str | None = field(
        default=None, metadata={"help": "Column that says train, test, query, ...; by default one called split."}
    )
    image_root: str | None = field(
        default=None, metadata={"help": "Folder that a table's paths are relative to; by default that of the table."}
    )


@dataclass
class HubOptions(ColumnOptions):
    """Options of `HubImages`.

    Attributes:
        dataset_revision: A commit pins the data.
        test_repo: Also a retrieval set (corpus, query, qrels), see `retrieval_sets`; or a local folder, if it begins
            with `/`, `.` or `~`.
        query_repo, gallery_repo: Likewise, both or neither; no retrieval sets.
    """

    dataset_repo: str | None = field(default=None, metadata={"help": "Data set repository on the Hub, as owner/name."})
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration, if it has several."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Its branch, tag or commit."})
    test_repo: str | None = field(
        default=None,
        metadata={
            "help": "Repository whose images test, as owner/name or owner/name@revision; also corpus and qrels."
        },
    )
    query_repo: str | None = field(default=None, metadata={"help": "Repository of queries, with gallery_repo."})
    gallery_repo: str | None = field(default=None, metadata={"help": "Repository of the gallery, with query_repo."})


@dataclass
class DatasetOptions(HubOptions, TableOptions, BenchmarkOptions, DigitsOptions):
    """The options of all data sets of this package."""


def option_names(options: type) -> tuple[str, ...]:
    """The names of the options that one of these classes holds."""
    return tuple(item.name for item in fields(options))
