"""The data sets of a run, as `DataArguments` say: images, cut to size."""

from .data_arguments import DataArguments
from .streaming import StreamedImages
from .torch_dataset import ImageDataset
from .transforms import EvalTransform, TrainTransform


__all__ = ["image_datasets", "make_transforms"]


def make_transforms(args: DataArguments) -> tuple[TrainTransform, EvalTransform]:
    """The training and the evaluation transform that the arguments ask for."""
    train = TrainTransform(
        args.image_size, scale=(args.crop_scale_min, 1.0), horizontal_flip=0.5 if args.horizontal_flip else 0.0
    )
    return train, EvalTransform(args.resize_size, args.image_size)


def image_datasets(args: DataArguments) -> dict[str, ImageDataset | StreamedImages]:
    """All splits, with the transforms that the arguments ask for: that of training for `train`."""
    train_transform, eval_transform = make_transforms(args)
    dataset_class = StreamedImages if args.streaming else ImageDataset
    return {
        name: dataset_class(
            split,
            train_transform if name == "train" else eval_transform,
            skip_corrupt=args.skip_corrupt,
            max_image_pixels=args.max_image_pixels,
        )
        for name, split in args.load_splits().items()
    }
