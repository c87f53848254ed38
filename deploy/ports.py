"""Whether a server will be able to listen where it is told to, asked before anything slow is loaded."""

from __future__ import annotations

import errno
import os
import socket

from vptsp.data_scripts.data_errors import DataError


_REASONS = {
    errno.EADDRINUSE: "is in use by another program: stop that, or give another --port",
    errno.EACCES: "may not be listened at by this user: give a --port from 1024",
}


def check_port(host, port, least=0):
    """Refuse a port that can't be listened at.

    Args:
        host: Address or name of this machine, as of `--host`.
        port: As of `--port`; 0 is any that is free.
        least: Smallest port that is accepted.

    Raises:
        ValueError: it is out of range.
        DataError: another program listens there, this user may not, or this machine has no such address.
    """
    if not least <= port <= 65535:
        raise ValueError(f"--port must be in {least} to 65535, got {port}")
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host.removeprefix("[").removesuffix("]"), port, type=socket.SOCK_STREAM
        )[0]
        with socket.socket(family, kind) as tried:
            if os.name == "posix":  # as servers do; on Windows it would let two listen at one port
                tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(address)
    except OSError as error:
        if reason := _REASONS.get(error.errno):
            raise DataError(f"--port {port} of {host} {reason}") from error
        raise DataError(
            f"--host must be a name or an address of this machine, got {host!r} ({error.strerror})"
        ) from error


__all__ = ["check_port"]
