"""The service under load: requests a second and their latencies, with 1, 8 and 64 clients at a time.

    python benchmarks/service_load.py --index catalogue --images photos --output load.json

Starts `vptsp serve` on the index, has clients search by image, each as soon as it has its last answer, and gives the
median and the 99th percentile of their waiting, beside a plain loop in one process: embed one image, search, next. All
contenders get the same images in the same order, and what they find is compared; refusals (429) count as failures.
"""

import argparse
import http.client
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import uuid
from pathlib import Path

from machine_report import write_report

from vptsp import Embedder, open_index
from vptsp.data_scripts.image_files import list_images


def multipart(content):
    """Body and type of a form with an image."""
    boundary = uuid.uuid4().hex
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="q"\r\n\r\n'
    return head.encode() + content + f"\r\n--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"


def client(port, bodies, until, answers):
    """Ask until the time is up; appends (seconds, status, ids)."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    for name, (body, kind) in bodies:
        if time.monotonic() > until:
            break
        begin = time.perf_counter()
        connection.request("POST", "/search/image", body, {"Content-Type": kind})
        response = connection.getresponse()
        content = response.read()
        seconds = time.perf_counter() - begin
        ids = [found["id"] for found in json.loads(content)["results"]] if response.status == 200 else None
        answers.append((seconds, response.status, name, ids))
    connection.close()


def load(port, clients, seconds, bodies):
    """Requests of so many clients at a time."""
    answers, begin = [], time.monotonic()
    rows = list(bodies.items())
    threads = [
        threading.Thread(target=client, args=(port, itertools.cycle(rows[n:] + rows[:n]), begin + seconds, answers))
        for n in range(clients)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers, time.monotonic() - begin


def plain_loop(index, seconds, images):
    """One image after another, without a service."""
    answers, begin = [], time.monotonic()
    names = itertools.cycle(images.items())
    while time.monotonic() - begin < seconds:
        name, content = next(names)
        start = time.perf_counter()
        hits = index.search_images([content], 10)[0]
        answers.append((time.perf_counter() - start, 200, name, [hit.id for hit in hits]))
    return answers, time.monotonic() - begin


def summary(answers, seconds, expected):
    """A row of the table."""
    waited = sorted(answer[0] for answer in answers)
    return {
        "requests": len(answers),
        "per_second": len(answers) / seconds,
        "p50_ms": 1e3 * statistics.median(waited),
        "p99_ms": 1e3 * waited[min(len(waited) - 1, int(0.99 * len(waited)))],
        "failed": sum(status != 200 for _, status, _, _ in answers),
        # embedded in another batch, near ties may change places
        "other_first": sum(ids is not None and ids[0] != expected[name][0] for _, _, name, ids in answers),
    }


def start_service(index, log):
    """The process, and its port."""
    command = [sys.executable, "-m", "vptsp.cli", "serve", "--index", index, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log.open("w"), env=dict(os.environ))
    while True:
        started = [line for line in log.read_text().splitlines() if "running on" in line]
        if started:
            return process, int(started[0].partition("running on ")[2].split()[0].rpartition(":")[2])
        if process.poll() is not None:
            raise SystemExit(log.read_text())
        time.sleep(0.1)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", required=True)
    parser.add_argument("--images", required=True, help="folder of the queries")
    parser.add_argument("--queries", type=int, default=200, help="how many of them")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--seconds", type=float, default=20.0, help="of each run")
    parser.add_argument("--output", help="JSON file for the figures")
    args = parser.parse_args(argv)
    found = list_images(args.images)
    files = [Path(args.images, image.path) for image in found[:: max(1, len(found) // args.queries)]]
    images = {str(file): file.read_bytes() for file in files}
    index = open_index(args.index)
    index.use_embedder(Embedder.from_pretrained(index.model["name"]))
    expected = {name: [hit.id for hit in index.search_images([content], 10)[0]] for name, content in images.items()}
    rows = {"plain loop": summary(*plain_loop(index, args.seconds, images), expected)}
    with tempfile.TemporaryDirectory() as folder:
        process, port = start_service(args.index, Path(folder, "log"))
        try:
            bodies = {name: multipart(content) for name, content in images.items()}
            load(port, 8, 3, bodies)  # warms up
            for clients in args.clients:
                rows[f"{clients} clients"] = summary(*load(port, clients, args.seconds, bodies), expected)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
                lines = response.read().decode().splitlines()
            count, total = (
                float(next(line for line in lines if line.startswith(f"vptsp_batch_images_{what}")).split()[1])
                for what in ("count", "sum")
            )
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()
    different = sum(row["other_first"] for row in rows.values())
    print(f"{total / count:.1f} images of a forward pass on average; {different} first results differ")
    report = [{"contender": name, **row} for name, row in rows.items()]
    write_report(report, "cpu", args.output, images_per_batch=total / count, seconds=args.seconds)


if __name__ == "__main__":
    main()
