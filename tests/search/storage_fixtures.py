"""A service that speaks S3, in this process, and images in the forms that people keep there."""

import itertools
import json
from contextlib import contextmanager

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from data_fixtures import jpeg_bytes, write_tar
from pyarrow import fs


_NUMBERS = itertools.count()  # services of one process share their buckets


@contextmanager
def s3_service(monkeypatch):
    """An empty service; yields a function that copies a folder there and gives its address."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    values = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)

    def upload(folder):
        bucket = f"bucket{next(_NUMBERS)}"
        s3 = fs.S3FileSystem(endpoint_override=values["AWS_ENDPOINT_URL"], allow_bucket_creation=True)
        s3.create_dir(bucket)
        fs.copy_files(str(folder), f"{bucket}/{folder.name}", fs.LocalFileSystem(), s3)
        return f"s3://{bucket}/{folder.name}"

    try:
        yield upload
    finally:
        server.stop()


def write_shards(root, counts=(5, 4)):
    """WebDataset shards with classes, fields and captions; returns per id what is known of the image."""
    expected, number = {}, 0
    for shard, count in enumerate(counts):
        files = {}
        for _ in range(count):
            key, fields = f"{number:04d}", {"price": number / 2, "title": f"photo {number}"}
            files[f"{key}.jpg"] = jpeg_bytes(number)
            files[f"{key}.cls"] = str(number % 3)
            files[f"{key}.json"] = json.dumps(fields)
            files[f"{key}.txt"] = f"caption {number}"
            expected[f"{shard:06d}/{key}.jpg"] = (
                jpeg_bytes(number),
                str(number % 3),
                fields["price"],
                f"caption {number}",
            )
            number += 1
        write_tar(root / f"{shard:06d}.tar", files, "w")
    return expected


def write_parquet(path, count=9, rows_per_group=4):
    """Images with classes and prices as `datasets` writes them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=["cup", "mug"]), price=datasets.Value("float64")
    )
    rows = {
        "image": [{"bytes": jpeg_bytes(i), "path": f"{i}.jpg"} for i in range(count)],
        "label": [i % 2 for i in range(count)],
        "price": [i / 4 for i in range(count)],
    }
    table = datasets.Dataset.from_dict(rows, features=features).with_format("arrow")[:]
    pq.write_table(pa.table(table), path, row_group_size=rows_per_group)
    return path
