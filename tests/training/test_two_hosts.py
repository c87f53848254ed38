"""Two hosts on one machine: network namespaces joined by a cable, each with its own `torchrun`."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from data_fixtures import write_classes
from test_checkpoints import train_command

from vptsp import EmbeddingStore, train
from vptsp.search.commands import main as search


ADDRESSES = ("10.213.47.1", "10.213.47.2")


def _ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True).returncode == 0


@pytest.fixture
def hosts():
    """Names of two network namespaces that see each other and nothing else."""
    names, cables = [f"vptsp-{os.getpid()}-{i}" for i in (0, 1)], [f"vpt{os.getpid()}{end}" for end in "ab"]
    with ExitStack() as stack:
        for name in names:
            if shutil.which("ip") is None or not _ip("netns", "add", name):
                pytest.skip("no permission to make network namespaces")
            stack.callback(_ip, "netns", "del", name)
        assert _ip("link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
        for name, cable, address in zip(names, cables, ADDRESSES, strict=True):
            assert _ip("link", "set", cable, "netns", name)
            assert _ip("-n", name, "address", "add", f"{address}/24", "dev", cable)
            assert _ip("-n", name, "link", "set", cable, "up")
            assert _ip("-n", name, "link", "set", "lo", "up")
        yield list(zip(names, cables, strict=True))


def run_on(hosts, words, own_disk=None):
    """Run a command under `torchrun` on two hosts; the second may have a folder on a disk of its own."""
    running = []
    for rank, (name, cable) in enumerate(hosts):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
        torchrun += ["--node_rank", str(rank), "--master_addr", ADDRESSES[0], "--master_port", "29511"]
        command = ["ip", "netns", "exec", name]
        if own_disk is not None and rank == 1:
            script = f'mount -t tmpfs none "{own_disk}" && exec "$@"'
            command += ["unshare", "--mount", "sh", "-c", script, "sh"]
        command += [*torchrun, *map(str, words)]
        environment = os.environ | {"GLOO_SOCKET_IFNAME": cable, "OMP_NUM_THREADS": "1"}
        running.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    try:
        return [(process.communicate(timeout=400)[0], process.returncode) for process in running]
    finally:
        for process in running:
            process.kill()


@pytest.fixture
def command(backbone_folder, tmp_path):
    """Function of folder and batch size: a command line of training."""
    images = write_classes(tmp_path / "images", {f"class{i}": 6 for i in range(8)})

    def words(output, batch_size):
        options = {"num_train_epochs": 2, "skip_corrupt": "false", "per_device_train_batch_size": batch_size}
        return train_command(images, backbone_folder, output, **options)

    return words


@pytest.mark.slow
@pytest.mark.distributed
def test_training_on_two_hosts_is_that_of_one(hosts, command, tmp_path):
    train.main(command(tmp_path / "one", 4))
    outcomes = run_on(hosts, [Path(train.__file__), *command(tmp_path / "two", 2)])
    assert [status for _, status in outcomes] == [0, 0], "\n".join(said[-3000:] for said, _ in outcomes)
    expected, found = (json.loads((tmp_path / name / "all_results.json").read_text()) for name in ("one", "two"))
    names = [name for name in expected if name.startswith("final_") and not name.endswith(("runtime", "per_second"))]
    assert len(names) > 5
    assert [found[name] for name in names] == pytest.approx([expected[name] for name in names], abs=1e-5)


@pytest.mark.slow
@pytest.mark.distributed
def test_without_a_common_disk_the_checkpoint_is_missed(hosts, command, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    outcomes = run_on(hosts, [Path(train.__file__), *command(disk / "two", 2)], own_disk=disk)
    assert [status for _, status in outcomes] == [1, 1]
    assert "train.py: error: there is no checkpoint folder" in outcomes[1][0]


@pytest.mark.slow
@pytest.mark.distributed
def test_embedding_on_two_hosts_with_a_common_disk(hosts, backbone_folder, tmp_path):
    photos = write_classes(tmp_path / "photos", {"a": 9, "b": 8})
    words = ["embed", "--model", backbone_folder, "--images", photos, "--shard_size", 4, "--batch_size", 4]
    assert search([*map(str, words), "--output", str(tmp_path / "one")]) == 0
    outcomes = run_on(hosts, ["-m", "vptsp.cli", *words, "--output", tmp_path / "two"])
    assert [status for _, status in outcomes] == [0, 0], "\n".join(said[-3000:] for said, _ in outcomes)
    one, two = EmbeddingStore.open(tmp_path / "one"), EmbeddingStore.open(tmp_path / "two")
    assert (one.ids, one.info.files) == (two.ids, two.info.files)
