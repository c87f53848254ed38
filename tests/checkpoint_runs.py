"""Training runs to be killed: a process that has imported everything, and forks a child for each run it is asked for.

    python checkpoint_runs.py DATA BACKBONE CACHE

takes requests on stdin, one JSON object a line, and answers with the exit statuses of the run's processes, as
`subprocess` gives them. A request says

    output          folder of the run
    ranks           number of processes
    model, training fields of `VPTSPConfig` and `VPTSPTrainingArguments`
    stream          rows that the stream is said to have (0: their number is not known); train on a stream
    patience        stop early after so many evaluations that are no better
    resume          what `resume_from_checkpoint` is
    die             [what, n]: be killed at the n-th "batch", "step" or "file" (something done to a file of the run)
    signals         {step: names}: send yourself signals in a step; 0.1 or 1.2 waits so many seconds in between

and for all of them `rank`, the process that dies or sends. A run that ends by itself writes `final-RANK.safetensors`,
`log.json` and `counts.json`, how often each of the three happened.
"""

import gc
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import EarlyStoppingCallback, TrainerCallback

from vptsp import (
    EvalTransform,
    ImageDataset,
    StreamedImages,
    TrainTransform,
    VPTSPForMetricLearning,
    VPTSPTrainer,
    VPTSPTrainingArguments,
    load_splits,
)


FIELDS = {"num_classes": 5, "embedding_dim": 12, "num_prompts": 3, "num_class_prompts": 2, "rnn_dropout": 0.2}
ARGUMENTS = {
    "images_per_class": 2,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 5,
    "num_train_epochs": 2,
    "learning_rate": 1e-2,
    "proxy_learning_rate": 1e-1,
    "logging_steps": 2,
    "eval_strategy": "no",
    "save_strategy": "steps",
    "save_total_limit": None,
    "use_cpu": True,
    "disable_tqdm": True,
}


class Fate:
    """Counts what happens, and kills this process when its moment has come."""

    def __init__(self, output, die):
        self.output = str(output)
        self.counts = {"batch": 0, "step": 0, "file": 0}
        self.what, self.moment = die or (None, 0)

    def happens(self, what):
        self.counts[what] += 1
        if what == self.what and self.counts[what] == self.moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(self, event, arguments):
        writes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
        writes |= event == "open" and isinstance(arguments[1], str) and arguments[1] != "r"
        if writes and str(arguments[0]).startswith(self.output):
            self.happens("file")


class Watch(TrainerCallback):
    """Tells fate of every step, and sends this process signals."""

    def __init__(self, fate, signals):
        self.fate, self.signals = fate, signals

    def on_step_begin(self, args, state, control, **kwargs):
        self.fate.happens("step")
        for item in self.signals.get(str(state.global_step), ()):
            if isinstance(item, float):
                time.sleep(item)
            else:
                os.kill(os.getpid(), signal.Signals[item])


def write_colours(root):
    """Eight classes of six noisy colours, as a folder of images."""
    rng = np.random.default_rng(0)
    for label in range(8):
        (root / f"class{label}").mkdir(parents=True)
        colour = rng.integers(40, 216, 3)
        for i in range(6):
            pixels = np.clip(colour + rng.normal(0, 15, (20, 20, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / f"class{label}" / f"{i}.png")
    return root


def make_splits(data, cache):
    """Five classes to train on, and the others."""
    return load_splits("folder", data, cache_dir=cache, train_classes=[f"class{c}" for c in range(5)])


def build_trainer(splits, backbone, request, fate=None):
    """The trainer that a request asks for."""
    training = {**ARGUMENTS, **request.get("training", {}), "output_dir": request["output"]}
    args = VPTSPTrainingArguments(**training)
    if request.get("stream") is None:
        train = ImageDataset(splits["train"], TrainTransform(16))
    else:
        stream = splits["train"].to_iterable_dataset(num_shards=3)
        train = StreamedImages(stream, TrainTransform(16), num_rows=request["stream"] or None)
    torch.manual_seed(0)
    model = VPTSPForMetricLearning.from_backbone(backbone, **{**FIELDS, **request.get("model", {})})
    callbacks = [] if fate is None else [Watch(fate, request.get("signals", {}))]
    if "patience" in request:
        callbacks.append(EarlyStoppingCallback(request["patience"]))
    test = ImageDataset(splits["test"], EvalTransform(18, 16))
    settings = request.get("data_settings")
    return VPTSPTrainer(model, args, train, test, data_settings=settings, callbacks=callbacks)


def run(splits, backbone, request, rank):
    """A whole run in this process."""
    output = Path(request["output"])
    mine = rank == request.get("rank", 0)
    fate = Fate(output, request.get("die") if mine else None)
    request = {**request, "signals": request.get("signals", {}) if mine else {}}
    trainer = build_trainer(splits, backbone, request, fate)
    training_step = trainer.training_step

    def counted(*arguments):
        fate.happens("batch")
        return training_step(*arguments)

    trainer.training_step = counted
    sys.addaudithook(fate.audit)
    trainer.train(resume_from_checkpoint=request.get("resume"))
    counts = dict(fate.counts)
    embeddings, _ = trainer.embed(trainer.eval_dataset)
    tensors = {name: tensor.contiguous() for name, tensor in trainer.model.state_dict().items()}
    save_file({**tensors, "embeddings": embeddings}, output / f"final-{rank}.safetensors")
    if rank == 0:
        (output / "log.json").write_text(json.dumps(trainer.state.log_history))
        (output / "counts.json").write_text(json.dumps(counts))


def fork(splits, backbone, request, rank, port):
    """Start a child; its process id. What it prints goes to `printed-RANK.txt` of its run."""
    pid = os.fork()
    if pid:
        return pid
    ranks = request.get("ranks", 1)
    if ranks > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    Path(request["output"]).mkdir(parents=True, exist_ok=True)
    printed = os.open(Path(request["output"]) / f"printed-{rank}.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    status = 0
    try:
        run(splits, backbone, request, rank)
    except SystemExit as error:
        status = error.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def serve(data, backbone, cache):
    """Answer requests until stdin ends."""
    torch.set_num_threads(1)
    splits = make_splits(data, cache)
    VPTSPForMetricLearning.from_backbone(backbone, **FIELDS)  # imports the rest, once for all
    gc.freeze()  # children need not look through what they share
    for line in sys.stdin:
        request = json.loads(line)
        port = free_port()
        children = [fork(splits, backbone, request, rank, port) for rank in range(request.get("ranks", 1))]
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print("answer", json.dumps(statuses), flush=True)
    os._exit(0)  # at once


if __name__ == "__main__":
    serve(*sys.argv[1:4])
