"""A table of class prompts in files that the processes of one machine share, here threads with a stand-in for them."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from vptsp.training.class_prompts import OffloadedClassPrompts
from vptsp.training.local_processes import LocalProcesses


COUNT = 3


class Machine:
    """What `torch.distributed` does for the processes of a machine."""

    def __init__(self):
        self.barrier, self.values = threading.Barrier(COUNT, timeout=20), {}


class LocalThread:
    """[`LocalProcesses`] of a thread."""

    count = COUNT
    writing = LocalProcesses.writing

    def __init__(self, machine, number, sees_files=True):
        self.machine, self.number, self.is_owner, self.sees_files = machine, number, number == 0, sees_files

    def _exchange(self, value):
        self.machine.values[self.number] = value
        self._wait()
        values = [self.machine.values[number] for number in range(COUNT)]
        self._wait()
        return values

    def from_owner(self, value):
        return self._exchange(value)[0]

    def all_of(self, flag):
        return all(self._exchange(flag and self.sees_files))

    def _wait(self):
        self.machine.barrier.wait()


def together(function):
    """What a function gives in each of the threads, which are given their number."""
    with ThreadPoolExecutor(COUNT) as pool:
        return [future.result() for future in [pool.submit(function, number) for number in range(COUNT)]]


def make_store():
    store = OffloadedClassPrompts(num_classes=6, lengths=(2, 1), num_prompts=2, width=4)
    store.init_weights()
    return store


@pytest.fixture
def stores(tmp_path):
    """Stores of the threads, each drawn by itself, on one table."""
    machine, stores = Machine(), [make_store() for _ in range(COUNT)]
    first = stores[0].tokens.clone()
    together(lambda number: stores[number].place(tmp_path, 2, LocalThread(machine, number)))
    assert all(torch.equal(store.tokens, first) for store in stores)
    return stores


def test_one_table_and_states_of_the_owner_alone(stores, tmp_path):
    stores[2].tokens[3, 1, 2] = 7.0
    assert stores[0].tokens[3, 1, 2] == stores[1].tokens[3, 1, 2] == 7.0
    assert not list(tmp_path.iterdir())  # no names are left
    optimizer = torch.optim.AdamW([torch.zeros(1)], lr=0.1)
    expected = make_store()
    expected.tokens.copy_(stores[0].tokens)

    def step(store):
        classes = torch.tensor([1, 4])
        sum((part * (i + 1)).sum() for i, part in enumerate(store(classes))).backward()
        store.step(optimizer)

    for _ in range(2):
        step(expected)
        together(lambda number: step(stores[number]))
    for store in stores:
        assert torch.equal(store.tokens, expected.tokens)
    assert set(stores[0].states) == set(expected.states) == {"step", "exp_avg", "exp_avg_sq"}
    assert all(torch.equal(stores[0].states[name], state) for name, state in expected.states.items())
    assert not stores[1].states and not stores[2].states


def test_saved_table_and_states_come_back(stores, tmp_path):
    other = make_store()
    other.states = other.new_states(["momentum_buffer"])
    other.states["momentum_buffer"] += 2.0
    other.save(tmp_path / "table.safetensors")
    other.save_states(tmp_path / "states.safetensors")

    def load(number):
        stores[number].load(tmp_path / "table.safetensors")
        stores[number].load_states(tmp_path / "states.safetensors")

    together(load)
    assert all(torch.equal(store.tokens, other.tokens) for store in stores)
    assert torch.equal(stores[0].states["momentum_buffer"], other.states["momentum_buffer"])
    assert not stores[1].states


def test_who_does_not_see_the_files_has_its_own(tmp_path):
    machine, stores = Machine(), [make_store() for _ in range(COUNT)]
    drawn = [store.tokens.clone() for store in stores]
    together(lambda number: stores[number].place(tmp_path, 2, LocalThread(machine, number, number != 1)))
    assert all(torch.equal(store.tokens, own) for store, own in zip(stores, drawn, strict=True))
    assert all(store.sharers is None for store in stores)


def test_a_disk_that_is_full_is_said_by_all(tmp_path, monkeypatch):
    def full(descriptor, num_bytes):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vptsp.training.host_table._reserve", full)
    machine, errors = Machine(), []

    def place(number):
        try:
            make_store().place(tmp_path, 2, LocalThread(machine, number))
        except OSError as error:
            errors.append(str(error))

    together(place)
    assert len(errors) == COUNT and all("no room for class prompts" in error for error in errors)
    assert not list(tmp_path.iterdir())


def test_a_process_by_itself():
    local = LocalProcesses()
    assert local.is_owner and local.from_owner("name") == "name"
    assert local.all_of(True) and not local.all_of(False)
    with local.writing() as may_write:
        assert may_write
