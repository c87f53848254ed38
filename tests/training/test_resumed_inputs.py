"""Whatever a trainer is given that changes what is trained: another one is refused when a run goes on."""

import enum
import functools

import pytest
import torch
from noise_runs import Images, make_args, make_model, make_trainer
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR, StepLR

from vptsp import VPTSPTrainer
from vptsp.training.descriptions import describe
from vptsp.training.run_errors import CheckpointError
from vptsp.training.run_record import run_differences


SHORT = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "load_best_model_at_end": False}


def collate(examples, brightness=0.0):
    pixels = torch.stack([example["pixel_values"] for example in examples]) + brightness
    return {"pixel_values": pixels, "labels": torch.tensor([example["labels"] for example in examples])}


def other_collate(examples):
    return collate(examples, 0.5)


class Collator:
    def __init__(self, brightness):
        self.brightness = brightness

    def __call__(self, examples):
        return collate(examples, self.brightness)


def lambda_of(brightness):
    return lambda examples: collate(examples, brightness)


def collate_by_keyword(brightness):
    def collate_images(examples, *, by=brightness):
        return collate(examples, by)

    return collate_images


class OfSlots:
    __slots__ = ("__brightness", "unset")

    def __init__(self, brightness):
        self.__brightness = brightness

    def __call__(self, examples):
        return collate(examples, self.__brightness)


def of_class(brightness):
    """An object whose setting is its class's, as if the source had been changed between two runs."""

    class OfClass:
        by = brightness

        def __call__(self, examples):
            return collate(examples, self.by)

    return OfClass()


def of_call(brightness):
    class OfCall:
        def __call__(self, examples, by=brightness):
            return collate(examples, by)

    return OfCall()


def of_attribute(brightness):
    def collate_images(examples):
        return collate(examples, collate_images.by)

    collate_images.by = brightness
    return collate_images


COLLATORS = {
    "another function": (lambda: collate, lambda: other_collate),
    "the package's own": (lambda: None, lambda: collate),
    "another setting": (lambda: Collator(0.25), lambda: Collator(0.5)),
    "another argument": (
        lambda: functools.partial(collate, brightness=0.25),
        lambda: functools.partial(collate, brightness=0.5),
    ),
    "another constant": (
        lambda: lambda examples: collate(examples, 0.25),
        lambda: lambda examples: collate(examples, 0.5),
    ),
    "another closure": (lambda: lambda_of(0.25), lambda: lambda_of(0.5)),
    "another keyword": (lambda: collate_by_keyword(0.25), lambda: collate_by_keyword(0.5)),
    "another slot": (lambda: OfSlots(0.25), lambda: OfSlots(0.5)),
    "another class attribute": (lambda: of_class(0.25), lambda: of_class(0.5)),
    "another default of the call": (lambda: of_call(0.25), lambda: of_call(0.5)),
    "another attribute": (lambda: of_attribute(0.25), lambda: of_attribute(0.5)),
    "an argument more": (lambda: functools.partial(collate), lambda: functools.partial(collate, brightness=0.5)),
    "another method": (lambda: Collator(0.25).__call__, lambda: Collator(0.5).__call__),
}


def resumed(first, second):
    """Train with what `first` gives, and go on with what it gives again and with what `second` does."""
    first().train()
    assert first().checkpoint_to_resume(True)
    with pytest.raises(CheckpointError, match="is of another run") as error:
        second().train(resume_from_checkpoint=True)
    return str(error.value)


@pytest.mark.parametrize("given", COLLATORS.values(), ids=COLLATORS)
def test_another_collator_is_refused(backbone_folder, tmp_path, given):
    def trainer(make):
        collator = make()
        options = {} if collator is None else {"data_collator": collator}
        return make_trainer(make_model(backbone_folder), tmp_path, options, **SHORT)

    message = resumed(*(functools.partial(trainer, make) for make in given))
    assert "  data_collator" in message and "0x" not in message


def pair(make_schedule, rates=(0.25, 0.5), turned=False):
    """Own optimiser and schedule of a model."""

    def make(model):
        tuned = [parameter for parameter in model.parameters() if parameter.requires_grad]
        tuned = tuned[::-1] if turned else tuned
        optimizer = torch.optim.SGD([{"params": tuned[:3], "lr": rates[0]}, {"params": tuned[3:], "lr": rates[1]}])
        return optimizer, make_schedule and make_schedule(optimizer)

    return make


def step(optimizer, gamma=0.5):
    return StepLR(optimizer, step_size=1, gamma=gamma)


def falling(by):
    return lambda optimizer: LambdaLR(optimizer, lambda done: by**done)


class Falling:
    def __init__(self, by):
        self.by = by

    def __call__(self, done):
        return self.by**done


def falling_by_keyword(by):
    def factor(done, *, by=by):
        return by**done

    return factor


class Slots:
    __slots__ = ("by",)


class FallingSlots(Slots):
    def __init__(self, by):
        self.by = by

    def __call__(self, done):
        return self.by**done


def falling_by_class(by):
    return type("FallingByClass", (), {"by": by, "__call__": lambda self, done: self.by**done})()


OPTIMIZERS = {
    "class of the schedule": (pair(step), pair(lambda o: ExponentialLR(o, 0.5)), "lr_scheduler.class"),
    "setting of the schedule": (pair(step), pair(lambda o: step(o, 0.25)), "lr_scheduler.settings.gamma"),
    "function of the schedule": (pair(falling(0.5)), pair(falling(0.25)), "lr_scheduler.factors"),
    "object of the schedule": (
        pair(lambda o: LambdaLR(o, Falling(0.5))),
        pair(lambda o: LambdaLR(o, Falling(0.25))),
        "lr_scheduler.factors",
    ),
    **{
        f"{make.__name__} of the schedule": (
            pair(lambda o, make=make: LambdaLR(o, make(0.5))),
            pair(lambda o, make=make: LambdaLR(o, make(0.25))),
            "lr_scheduler.factors",
        )
        for make in (falling_by_keyword, FallingSlots, falling_by_class)
    },
    "no schedule": (pair(step), pair(None), "lr_scheduler"),
    "a schedule": (pair(None), pair(step), "lr_scheduler"),
    "rate of a group": (pair(None), pair(None, (0.25, 0.125)), "optimizer.groups"),
    "parameters of a group": (pair(None), pair(None, turned=True), "optimizer.groups"),
}


@pytest.mark.parametrize("first, second, line", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_another_optimiser_or_schedule_is_refused(backbone_folder, tmp_path, first, second, line):
    def trainer(make):
        model = make_model(backbone_folder)
        return make_trainer(model, tmp_path, {"optimizers": make(model)}, **SHORT)

    message = resumed(*(functools.partial(trainer, make) for make in (first, second)))
    assert f"  {line}" in message and "0x" not in message


def test_own_optimiser_and_schedule_go_on(backbone_folder, tmp_path):
    def trainer(folder, steps):
        model = make_model(backbone_folder)
        options = {"optimizers": pair(lambda optimizer: step(optimizer, 0.75), (0.01, 0.02))(model)}
        return make_trainer(model, folder, options, **SHORT | {"max_steps": 2, "save_steps": steps})

    whole, going_on = trainer(tmp_path, 1), trainer(tmp_path, 1)
    whole.train()
    going_on.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(going_on.model.state_dict()[name], tensor), name


class Brighter(Images):
    pass


def test_another_class_of_data_set_is_refused_and_unseen_images_are_said(backbone_folder, tmp_path, caplog):
    def trainer(data):
        return make_trainer(make_model(backbone_folder), tmp_path, {"train_dataset": data}, **SHORT)

    with caplog.at_level("WARNING"):
        message = resumed(lambda: trainer(Images()), lambda: trainer(Brighter()))
    assert "train_data.class" in message and "Brighter" in message
    said = "Images has no fingerprint(): whether it holds the images that the run began with can't be told"
    assert caplog.text.count(said) == 1


def brighter(by):
    return lambda image, rng: image + by


@pytest.mark.parametrize("by, lines", [(0, []), (1, ["train_data.transform_made_of.closure"])])
def test_a_transform_that_is_a_function_is_compared(backbone_folder, tmp_path, by, lines):
    first, second = Images(), Images()
    first.transform, second.transform = brighter(0), brighter(by)
    trainers = [
        make_trainer(make_model(backbone_folder), tmp_path, {"train_dataset": data}, **SHORT)
        for data in (first, second)
    ]
    found = run_differences(*(trainer._run_record() for trainer in trainers))
    assert [line.partition(":")[0] for line in found] == lines


def test_data_can_not_be_skipped_when_a_run_goes_on(tmp_path, backbone_folder):
    with pytest.raises(ValueError, match="ignore_data_skip must be false, got True: a run that goes on"):
        make_args(tmp_path, ignore_data_skip=True)
    args = make_args(tmp_path)
    args.ignore_data_skip = True
    with pytest.raises(ValueError, match="ignore_data_skip must be false"):
        VPTSPTrainer(make_model(backbone_folder), args, Images())


def test_descriptions_are_short_and_without_addresses():
    class Node:
        pass

    node = Node()
    node.itself = node
    node.tensor, node.kinds = torch.arange(3.0), {"b", "a"}
    text = repr(describe([node, object(), print, Node, torch.float32, functools.partial(print, end="")]))
    assert "0x" not in text and len(text) < 5000
    assert describe(torch.arange(3)) != describe(torch.arange(3) + 1)


def test_descriptions_of_enumerations_and_methods_say_no_more_than_settings():
    class Mode(enum.Enum):
        A = 1
        B = 2

    class Holder:
        cache = functools.lru_cache
        by = staticmethod(lambda image: image + 1)

        @property
        def shown(self):
            raise AssertionError("nobody asks")

        def method(self, image=3): ...

    assert "_member_map_" not in describe(Mode.A)["settings"]
    assert "by" in describe(Holder())["settings"] and not {"method", "shown"} & set(describe(Holder())["settings"])
