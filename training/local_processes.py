"""The processes of a run on one machine, which can share what lies in memory-mapped files."""

from __future__ import annotations

import os
import socket
from contextlib import contextmanager

import torch.distributed as dist


def processes_here() -> int:
    """Processes of the run on this machine, as torchrun says; no process has to ask another."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


class LocalProcesses:
    """This process among those of the run on its machine. The first of them, the owner, writes what they share.

    To be made by all processes of a run at the same time.

    Attributes:
        is_owner: Whether this process is the owner.
        count: Processes of the run on this machine.
    """

    def __init__(self):
        self.count, self.is_owner, self._group = processes_here(), True, None
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return
        hosts = [None] * dist.get_world_size()
        dist.all_gather_object(hosts, socket.gethostname())
        for host in dict.fromkeys(hosts):  # every process has to make all groups
            ranks = [rank for rank, other in enumerate(hosts) if other == host]
            group = dist.new_group(ranks, backend="gloo")
            if dist.get_rank() in ranks:
                self._group, self.count, self._owner = group, len(ranks), ranks[0]
                self.is_owner = dist.get_rank() == ranks[0]

    def from_owner(self, value):
        """The owner's value, in every process of the machine."""
        if self._group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=self._owner, group=self._group)
        return values[0]

    def all_of(self, flag) -> bool:
        """Whether it is true in every process of the machine; none goes on before all have said so."""
        if self._group is None:
            return flag
        flags = [None] * self.count
        dist.all_gather_object(flags, flag, group=self._group)
        return all(flags)

    @contextmanager
    def writing(self):
        """A block in which the owner alone may write what is shared: begun and ended by all processes together.

        Yields:
            Whether this process is the owner.
        """
        self._wait()
        try:
            yield self.is_owner
        finally:
            self._wait()

    def _wait(self):
        if self._group is not None:
            dist.barrier(group=self._group)


__all__ = ["LocalProcesses", "processes_here"]
