"""A stream that can't be evaluated is refused before a model is loaded, having read no more of it than that takes."""

import datasets
import pytest
from data_fixtures import jpeg_bytes

from vptsp import DataError, EvalTransform, StreamedImages, VPTSPTrainingArguments
from vptsp.training.evaluation_checks import _check_answerable
from vptsp.training.fitting import fit_to_data
from vptsp.training.run_errors import ConfigError


FEATURES = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.ClassLabel(num_classes=50)})


class Rows:
    """Rows of given labels, as a stream; counts those that were read."""

    def __init__(self, labels, first=None):
        self.labels, self.first, self.read = labels, first, 0

    def images(self, **options):
        stream = datasets.IterableDataset.from_generator(self.rows, features=FEATURES)
        return StreamedImages(stream, EvalTransform(18, 16), **options)

    def rows(self):
        for place, label in enumerate(self.labels):
            self.read += 1
            content = self.first if place == 0 and self.first is not None else jpeg_bytes(place % 5)
            yield {"image": {"bytes": content, "path": f"{place}.jpg"}, "label": label}


TRAIN = [0, 1, 2, 3]
CASES = {
    "one image a class": ({"test": range(50)}, "no test class has two"),
    "nothing": ({"test": []}, "no test class has two"),
    "one class alone": ({"test": [7, 7, 8]}, "at least two test classes .* got 1"),
    "a gallery of others": ({"query": [1, 2], "gallery": [3, 4]}, "no test image can be found by another one"),
    "a gallery of one": ({"query": [1, 2], "gallery": [3, 1]}, "at least two test classes .* got 1"),
}


def fit(tmp_path, **parts):
    args = VPTSPTrainingArguments(str(tmp_path), use_cpu=True, per_device_train_batch_size=2, images_per_class=2)
    return fit_to_data(args, {"train": Rows(TRAIN).images(), **parts})


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused(case, tmp_path):
    parts, message = CASES[case]
    with pytest.raises(ConfigError, match=message):
        fit(tmp_path, **{name: Rows(list(labels)).images() for name, labels in parts.items()})


def test_an_image_that_can_not_be_read(tmp_path):
    with pytest.raises(DataError, match=r"0\.jpg"):
        fit(tmp_path, test=Rows([1, 1, 2, 2], first=b"no image").images())
    fit(tmp_path, test=Rows([1, 1, 2, 2], first=b"no image").images(skip_corrupt=True))


def test_no_more_is_read_than_tells(tmp_path):
    rows = Rows([1, 2, 2, 1] + [3] * 500)
    fit(tmp_path, test=rows.images())
    assert rows.read <= 5


def test_the_trainer_looks_too():
    for part in (
        Rows([1, 2, 3]).images(),
        {"query": Rows([1]).images(), "gallery": Rows([2]).images()},
    ):
        with pytest.raises(ConfigError, match=r"eval_dataset: no class .*, so no query can be answered"):
            _check_answerable(part, "eval_dataset")
    _check_answerable({"query": Rows([1]).images(), "gallery": Rows([2, 1]).images()}, "eval_dataset")
