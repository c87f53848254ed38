"""Runs `vptsp` commands in forks of a process that has imported what takes seconds; see documented_world.py.

    python tests/command_server.py SOCKET

A client (`CLIENT`) stands in the place of the console script: it sends its words, folder, and standard streams, and
ends with the command's exit status. `vptsp app` is ended once its page has answered, and the server with its
own standard input.
"""

import http.client
import importlib
import json
import os
import socket
import sys
import threading
import time
import traceback

import psutil


CLIENT = """#!{python} -IS
import json, os, socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect({socket!r})
socket.send_fds(connection, [json.dumps([sys.argv[1:], os.getcwd()]).encode()], [0, 1, 2])
sys.exit(int(connection.recv(16) or b"70"))
"""
MODULES = ("datasets", "faiss", "matplotlib.pyplot", "sklearn.cluster", "transformers.models.vit.modeling_vit")
MODULES += ("vptsp.training.run", "vptsp.training.run_arguments", "vptsp.search.sync", "vptsp.search.report")


def end_when_the_page_answers():
    """Leave this process as soon as one of the ports that it listens at gives a page."""
    while True:
        time.sleep(0.1)
        for port in {c.laddr.port for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN}:
            try:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
                connection.request("GET", "/")
                if connection.getresponse().status == 200:
                    print("the page has answered", flush=True)
                    os._exit(0)
            except OSError:
                continue


def run(words):
    """Exit status of a command, as the console script would give it."""
    cli = importlib.import_module("vptsp.cli")
    sys.argv = ["vptsp", *words]
    if words[0] == "app" and "--write_space" not in words:
        threading.Thread(target=end_when_the_page_answers, daemon=True).start()
    try:
        status = cli.main()
    except SystemExit as ended:
        status = ended.code
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    return status or 0


def main(place):
    threading.Thread(target=lambda: sys.stdin.read() or os._exit(0), daemon=True).start()
    for name in MODULES:
        importlib.import_module(name)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(place)
    listening.listen()
    while True:
        connection, _ = listening.accept()
        message, streams, _, _ = socket.recv_fds(connection, 1 << 16, 3)
        child = os.fork()
        if not child:
            words, folder = json.loads(message)
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
            os.chdir(folder)
            os._exit(run(words))
        for stream in streams:
            os.close(stream)
        connection.sendall(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])).encode())
        connection.close()


if __name__ == "__main__":
    main(sys.argv[1])
