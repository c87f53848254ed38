"""The data sets of a run, as `DataArguments` say: images, cut to size."""

import datasets

from .data_arguments import DataArguments
from .data_errors import DataError
from .given_splits import ColumnsConfig, named_columns, with_class_names
from .preprocessing import geometry_of
from .streaming import StreamedImages
from .torch_dataset import ImageDataset
from .transforms import EvalTransform, TrainTransform
from .unlabelled import ClusteredImages, group_numbers


__all__ = ["image_datasets", "images_of", "make_transforms"]


def make_transforms(args: DataArguments) -> tuple[TrainTransform, EvalTransform]:
    """The training and the evaluation transform that the arguments ask for."""
    train = TrainTransform(
        args.image_size, scale=(args.crop_scale_min, 1.0), horizontal_flip=0.5 if args.horizontal_flip else 0.0
    )
    return train, EvalTransform(args.resize_size, args.image_size)


def image_datasets(args: DataArguments) -> dict[str, ImageDataset | StreamedImages]:
    """All splits, with the transforms that the arguments ask for: that of training for `train`, which is a
    `ClusteredImages` where photos lack labels."""
    train_transform, eval_transform = make_transforms(args)
    dataset_class = StreamedImages if args.streaming else ImageDataset
    options = {"skip_corrupt": args.skip_corrupt, "max_image_pixels": args.max_image_pixels}
    splits = args.load_splits()
    images = {
        name: dataset_class(split, train_transform if name == "train" else eval_transform, **options)
        for name, split in splits.items()
        if name != "train" or args.labels == "given"
    }
    if args.labels == "given":
        return images
    groups = group_numbers(splits["train"], args.group_column, f"the data set {args.dataset_name!r}")
    return {"train": ClusteredImages(splits["train"], train_transform, eval_transform, groups, **options), **images}


def images_of(dataset, where: str, processor=None, image_size: int | None = None, training: bool = False):
    """A table of the library `datasets` as an `ImageDataset`; anything else as it is.

    Args:
        dataset: A `datasets.Dataset` has a column of images (`Image()`) and one of labels: `ClassLabel`, integers from
            0, or texts, whose classes are numbered in sorted order.
        where: What it is, for errors.
        processor: Image processor, which says how images are cut to size.
        image_size: Side in pixels of what the model sees, where the processor does not say it.
        training: Crop and flip at random.

    Raises:
        DataError: a column is not there or can't be told by its name, a label is empty, it is a stream, or nothing
            says how large images are to be.
    """
    if isinstance(dataset, datasets.IterableDataset):
        raise DataError(f"{where} is a stream of the library datasets: give StreamedImages({where}, transform)")
    if not isinstance(dataset, datasets.Dataset):
        return dataset
    size, resize = geometry_of(processor, image_size)
    if not isinstance(size, int):
        raise DataError(f"{where}: neither processing_class nor the backbone says how large images are to be")
    rows = with_class_names(named_columns(dataset, ColumnsConfig(), where), where)
    return ImageDataset(rows, TrainTransform(size) if training else EvalTransform(resize, size))
