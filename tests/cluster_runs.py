"""Runs on photos without labels, in one process and in two, that must come out the same.

    python cluster_runs.py OUTPUT 1 2 -- ARGUMENTS OF train.py

writes to OUTPUT/1 and OUTPUT/2; what went wrong is in `error-RANK.txt` there.
"""

import os
import sys
import traceback
from pathlib import Path

import torch
from checkpoint_runs import free_port

from vptsp import train


GLOBAL_BATCH = 4


def fork(rank, processes, port, output, arguments):
    pid = os.fork()
    if pid:
        return pid
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        batch = str(GLOBAL_BATCH // processes)
        train.main([*arguments, "--output_dir", str(output), "--per_device_train_batch_size", batch])
    except BaseException:
        (output.parent / f"error-{processes}-{rank}.txt").write_text(traceback.format_exc())
    os._exit(0)


def main(words):
    torch.set_num_threads(1)
    split = words.index("--")
    output, numbers, arguments = Path(words[0]), map(int, words[1:split]), words[split + 1 :]
    for processes in numbers:
        port = free_port()
        children = [fork(rank, processes, port, output / str(processes), arguments) for rank in range(processes)]
        for child in children:
            os.waitpid(child, 0)


if __name__ == "__main__":
    main(sys.argv[1:])
