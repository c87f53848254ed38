"""Runs that are killed, interrupted or refused; and what a checkpoint is made of."""

import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from checkpoint_runs import write_colours
from safetensors.torch import load_file

from vptsp import train
from vptsp.training.interruption import InterruptionCallback


HERE = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module", autouse=True)
def heed_ctrl_c():
    """In a shell's background job Ctrl-C is ignored, here and in all processes that are started from here."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_colours(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def start(images, backbone_folder, tmp_path_factory):
    """A function that does a run in processes of its own, as `checkpoint_runs.py` says, and gives their statuses."""
    command = [sys.executable, HERE / "checkpoint_runs.py", images, backbone_folder, tmp_path_factory.mktemp("cache")]
    # otherwise accelerate gives each rank several threads, which wait for each other
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, env=environment) as server:

        def ask(output, **request):
            print(json.dumps({"output": str(output), **request}), file=server.stdin, flush=True)
            line = next(line for line in server.stdout if line.startswith("answer "))
            return json.loads(line.removeprefix("answer "))

        yield ask
        server.stdin.close()


def printed(output, rank=0):
    return (output / f"printed-{rank}.txt").read_text()


def outcome(output, rank=0):
    """Final tensors, and the log without times."""
    log = json.loads((output / "log.json").read_text())
    times = ("runtime", "per_second")
    return load_file(output / f"final-{rank}.safetensors"), [
        {name: value for name, value in entry.items() if not name.endswith(times)} for entry in log
    ]


def assert_same_outcome(actual, expected, ranks=1):
    for rank in range(ranks):
        tensors, log = outcome(actual, rank)
        expected_tensors, expected_log = outcome(expected, rank)
        assert log == expected_log
        assert set(tensors) == set(expected_tensors)
        for name, tensor in expected_tensors.items():
            assert torch.equal(tensors[name], tensor), name


RUNS = {
    # 7 batches an epoch, so 4 steps, the last of one batch
    "accumulation": {
        "training": {
            "num_train_epochs": 3,
            "gradient_accumulation_steps": 2,
            "save_steps": 3,
            "logging_steps": 5,  # never when a checkpoint is saved
            "eval_strategy": "steps",
            "eval_steps": 3,
            "save_total_limit": 1,
            "metric_for_best_model": "map_at_r",
        },
    },
    "evaluation": {
        "training": {"save_steps": 2, "eval_strategy": "epoch", "logging_strategy": "epoch"}
        | {"load_best_model_at_end": False, "optim": "sgd", "learning_rate": 1e-3},
    },
    "epochs": {"training": {"num_train_epochs": 3, "save_strategy": "epoch", "eval_strategy": "epoch"}},
    "stream": {"stream": 30, "training": {"save_steps": 3, "dataloader_num_workers": 2, "logging_steps": 5}},
    "endless": {
        "stream": 0,
        "training": {"max_steps": 16, "save_steps": 3, "eval_strategy": "epoch"}
        | {"lr_scheduler_type": "constant", "load_best_model_at_end": False},
    },
    "stopping": {
        "patience": 2,
        "training": {"num_train_epochs": 6, "save_strategy": "epoch", "eval_strategy": "epoch", "learning_rate": 0.0}
        | {"proxy_learning_rate": 0.0},
    },
    "ranks": {
        "ranks": 2,
        "training": {"per_device_train_batch_size": 2, "save_steps": 3, "eval_strategy": "steps", "eval_steps": 3},
    },
}


def kill_and_go_on(start, output, request, counts, seed):
    """Kill a run in its middle, then twice what goes on from it, at random moments; let the rest come to its end."""
    rng = random.Random(seed)
    kinds = ["batch", "file", rng.choice(["batch", "file"])]
    for kind, low, high in zip(kinds, (0.4, 0.0, 0.0), (0.8, 0.3, 0.3), strict=True):
        moment = 1 + int(rng.uniform(low, high) * counts[kind])
        resume = any(output.glob("checkpoint-*"))
        statuses = start(output, **request, die=[kind, moment], resume=resume)
        assert statuses[0] == -signal.SIGKILL, (kind, moment, printed(output)[-3000:])
    assert resume
    statuses = start(output, **request, resume=True)
    assert statuses == [0] * len(statuses), printed(output)[-3000:]


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """A function that gives the folder of a run that nothing interrupted."""

    @functools.cache
    def run(name):
        output = tmp_path_factory.mktemp("whole") / name
        assert start(output, **RUNS[name]) == [0] * RUNS[name].get("ranks", 1), printed(output)[-3000:]
        return output

    return run


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.distributed if "ranks" in RUNS[name] else ()) for name in RUNS]
)
def test_killed_at_any_moment_a_run_ends_as_if_it_had_not_been(start, whole, tmp_path, name):
    counts = json.loads((whole(name) / "counts.json").read_text())
    kill_and_go_on(start, tmp_path, RUNS[name], counts, seed=name)
    assert_same_outcome(tmp_path, whole(name), RUNS[name].get("ranks", 1))
    assert not list(tmp_path.glob(".checkpoint-*"))
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {
        path.name for path in whole(name).glob("checkpoint-*")
    }


@pytest.mark.parametrize(
    "name, sent, status, saved",
    [
        ("accumulation", {"4": ["SIGINT", "SIGINT"]}, 130, 5),  # in the middle of an epoch; the second is an echo
        ("evaluation", {"6": ["SIGTERM"]}, 143, 7),  # at the end of one
        ("stream", {"13": ["SIGINT"]}, 130, 14),  # at the end of the run
        pytest.param("ranks", {"7": ["SIGTERM"]}, 143, 9, marks=pytest.mark.distributed),  # agreed a step later
    ],
)
def test_interrupted_it_saves_says_how_to_go_on_and_goes_on(start, whole, tmp_path, name, sent, status, saved):
    request = RUNS[name]
    ranks = request.get("ranks", 1)
    assert start(tmp_path, **request, signals=sent, rank=ranks - 1) == [status] * ranks, printed(tmp_path)[-3000:]
    said = printed(tmp_path)
    assert "Traceback" not in said
    assert (
        f"after step {saved}: saved checkpoint-{saved} in {tmp_path}. Go on with --resume_from_checkpoint true" in said
    )
    assert (tmp_path / f"checkpoint-{saved}").is_dir()
    assert start(tmp_path, **request, resume=True) == [0] * ranks
    assert_same_outcome(tmp_path, whole(name), ranks)


def test_an_interrupted_run_saves_whatever_it_was_told_to_save(start, tmp_path):
    for name, fields in {"none": {"save_strategy": "no"}, "model": {"save_only_model": True}}.items():
        request = {"training": {**fields, "num_train_epochs": 1}}
        assert start(tmp_path / name, **request, signals={"2": ["SIGINT"]}) == [130], printed(tmp_path / name)
        assert start(tmp_path / name, **request, resume=True) == [0], printed(tmp_path / name)


def test_a_second_signal_stops_at_once(start, tmp_path):
    request = {**RUNS["epochs"], "signals": {"2": ["SIGINT", 1.2, "SIGINT"]}}
    assert start(tmp_path, **request) == [1]
    assert printed(tmp_path).rstrip().endswith("KeyboardInterrupt")
    assert not list(tmp_path.glob("*checkpoint*"))


def test_a_signal_that_comes_too_late_is_passed_on_and_handlers_are_put_back():
    callback = InterruptionCallback()
    before = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt), callback.watching():
        signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)] == before
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as for the background jobs of a shell
    try:
        with callback.watching():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before[0])


@pytest.mark.distributed
def test_a_run_goes_on_with_another_number_of_processes(start, whole, tmp_path):
    request = {"training": {**RUNS["ranks"]["training"], "per_device_train_batch_size": 4}}
    checkpoint = whole("ranks") / "checkpoint-12"
    assert start(tmp_path, **request, resume=str(checkpoint)) == [0], printed(tmp_path)[-3000:]
    (tensors, log), (expected, expected_log) = outcome(tmp_path), outcome(whole("ranks"))
    assert [entry["step"] for entry in log] == [entry["step"] for entry in expected_log]
    torch.testing.assert_close(
        tensors["proxies.original_proxies"], expected["proxies.original_proxies"], rtol=0, atol=0.1
    )


def train_command(images, backbone, output, **options):
    options = {
        "backbone": backbone,
        "data_dir": images,
        "data_cache_dir": output.parent / "cache",
        "output_dir": output,
        "image_size": 16,
        "embedding_dim": 12,
        "num_prompts": 3,
        "num_class_prompts": 2,
        "num_train_epochs": 8,
        "optim": "sgd",
        "learning_rate": 1e-3,
        "per_device_eval_batch_size": 5,
        "skip_corrupt": "true",
        "picture_queries": 2,
        "disable_tqdm": "true",
        "use_cpu": "true",
        **options,
    }
    return [str(item) for name, value in options.items() for item in (f"--{name}", value)]


@pytest.mark.distributed
def test_two_processes_of_train_py_are_interrupted_go_on_and_equal_one(images, backbone_folder, tmp_path):
    """With 23 images that can be read for evaluation, in 5 batches, of which one process gets 3 and the other 2."""
    images = shutil.copytree(images, tmp_path / "images")
    for name in ("class0/2.png", "class6/4.png"):  # one to train on, one to evaluate
        (images / name).write_bytes(b"no picture")
    train.main(train_command(images, backbone_folder, tmp_path / "one", per_device_train_batch_size=4))
    expected = json.loads((tmp_path / "one" / "all_results.json").read_text())
    assert (expected["final_num_queries"], expected["final_num_unreadable"], expected["steps"]) == (23, 1, 8 * 6)
    assert len(expected["dataset"]["skipped_images"]) == 2

    output = tmp_path / "two"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command = [*torchrun, str(Path(train.__file__)), *train_command(images, backbone_folder, output)]
    command += ["--per_device_train_batch_size", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as running:
        while running.poll() is None and not list(output.glob("checkpoint-*")):
            time.sleep(0.1)
        running.send_signal(signal.SIGINT)  # torchrun passes it on
        said = running.communicate(timeout=120)[0]
    assert "Go on with --resume_from_checkpoint true" in said, said[-3000:]
    assert not (output / "all_results.json").exists()

    finished = subprocess.run([*command, "--resume_from_checkpoint", "true"], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert finished.stdout.count("tuned ") == 2  # said once: what is tuned, and the score
    results = json.loads((output / "all_results.json").read_text())
    assert (output / "pictures" / "neighbours.png").is_file()
    assert results["dataset"] == expected["dataset"]
    same = [name for name in expected if name.startswith(("final_", "frozen_")) or name in ("steps", "train_loss")]
    same = [name for name in same if not name.endswith(("runtime", "per_second"))]
    assert len(same) > 10
    assert [results[name] for name in same] == pytest.approx([expected[name] for name in same], abs=1e-5)


def test_train_py_refuses_in_one_line(images, backbone_folder, tmp_path, capsys):
    options = {"per_device_train_batch_size": 4, "resume_from_checkpoint": "true"}
    with pytest.raises(SystemExit) as end:
        train.main(train_command(images, backbone_folder, tmp_path / "run", **options))
    message = f"train.py: error: resume_from_checkpoint: output_dir {tmp_path / 'run'} holds no checkpoint"
    assert end.value.code == 2
    assert message in capsys.readouterr().err
