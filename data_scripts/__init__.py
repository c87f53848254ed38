"""Data: the data sets, the transforms, the batch sampler.

    from vptsp.data_scripts import load_splits

    splits = load_splits("folder", "flowers", class_split="alternate")  # a DatasetDict: train, test

Each data set is one module with one builder class; `registry.DATASETS` lists them. To add one: make its
`SplitListing` in a subclass of `ImageDatasetBuilder`, and enter it there. Names are imported on first use, so that
importing the package loads neither torch nor `datasets`.
"""

import importlib


_EXPORTS = {
    "CUB200": "cub",
    "Cars196": "cars",
    "ClassBalancedBatchSampler": "sampler",
    "DATASETS": "registry",
    "DataArguments": "arguments",
    "DataError": "errors",
    "Digits": "digits",
    "EvalTransform": "transforms",
    "HubImages": "hub",
    "INaturalist2018": "inaturalist",
    "ImageDataset": "torch_dataset",
    "ImageError": "errors",
    "ImageFolders": "folder",
    "InShop": "inshop",
    "SampleKey": "sampler",
    "StanfordOnlineProducts": "sop",
    "StreamedImages": "streaming",
    "TrainTransform": "transforms",
    "check_data_arguments": "arguments",
    "check_output_apart": "arguments",
    "check_labels": "labels",
    "collate_images": "torch_dataset",
    "list_images": "image_files",
    "load_splits": "registry",
    "make_transforms": "transforms",
    "open_image": "images",
}


def __getattr__(name):
    if name in _EXPORTS:
        return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_EXPORTS])


__all__ = list(_EXPORTS)
