"""Several processes must do what one does with the same global batch."""

import os
import subprocess
import sys
from pathlib import Path

import distributed_runs
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file


HERE = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Twenty classes of 3 or 4 images, 29 of them in the test split: no number of ranks divides it."""
    root = tmp_path_factory.mktemp("data") / "images"
    rng = np.random.default_rng(0)
    for label in range(20):
        (root / f"class{label:02d}").mkdir(parents=True)
        colour = rng.integers(40, 216, 3)
        for i in range(3 + (label % 2) + (label == 19)):
            pixels = np.clip(colour + rng.normal(0, 15, (20, 20, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / f"class{label:02d}" / f"{i}.png")
    return root


def outputs_of(numbers, images, backbone_folder, output):
    """What so many processes have written, by their number."""
    command = [sys.executable, HERE / "distributed_runs.py", images, backbone_folder, output, *numbers]
    # otherwise accelerate gives each rank several threads, which wait for each other
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return {processes: output / str(processes) for processes in numbers}


@pytest.fixture(scope="module")
def outputs(images, backbone_folder, tmp_path_factory):
    """What one, two and three processes have written, by their number."""
    return outputs_of((1, 2, 3), images, backbone_folder, tmp_path_factory.mktemp("outputs"))


@pytest.mark.distributed
@pytest.mark.parametrize("processes", [2, 3])
def test_ranks_equal_one_process_and_each_other(processes, outputs):
    single, several = outputs[1], outputs[processes]
    for folder in (single, several):
        assert not [path.read_text() for path in folder.glob("error-*.txt")]
    for name in distributed_runs.runs_of(processes):
        expected = load_file(single / f"{name}-0.safetensors")
        first = load_file(several / f"{name}-0.safetensors")
        assert expected["embeddings"].shape == (29, 12)
        for key, tensor in expected.items():
            assert torch.allclose(first[key], tensor, rtol=1e-5, atol=1e-5), f"{name}: {key} is another"
        for rank in range(1, processes):
            other = load_file(several / f"{name}-{rank}.safetensors")
            shared = set(first) - set(other)  # states of a table in files, which rank 0 alone has
            assert not shared or (name == "offloaded_k1" and shared == {"class_prompts.momentum_buffer"})
            assert bool(shared) == ("class_prompt_folder" in distributed_runs.RUNS[name][1])
            for key, tensor in ((key, first[key]) for key in other):
                assert torch.equal(other[key], tensor), f"{name}: {key} of rank {rank}"


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_equal_one_process_with_every_family(images, backbone_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("EVERY_FAMILY", "1")
    assert set(distributed_runs.FAMILIES) < set(distributed_runs.runs_of(2))
    test_ranks_equal_one_process_and_each_other(2, outputs_of((1, 2), images, backbone_folder, tmp_path))
