"""Images per second and core: the transforms of `data_scripts` against plain PIL, in one run.

    python benchmarks/data_loading.py --data_dir path/to/photos --output data_loading.json

Plain is what most pipelines do: open, convert to RGB, crop, resize, with PIL. Both ways start from the file's bytes
and end with a uint8 tensor, and cut the same crops. They take turns, and the medians of the rounds are compared, so
that other work on the machine slows both. Apart from the photos, there are generated pictures of 500x375 and
1500x1000: gradients, shapes and noise, JPEG quality 90. `data_dir` may be any folder with images in it; without one,
the generated pictures are all there is.
"""

import argparse
import io
import os
import random
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import PIL
import torch
from machine_report import write_report
from PIL import Image, ImageDraw, ImageOps
from torch.utils.data import DataLoader

from vptsp.data_scripts.decoding import EncodedImage
from vptsp.data_scripts.image_files import list_images
from vptsp.data_scripts.torch_dataset import ImageDataset, collate_images
from vptsp.data_scripts.transforms import EvalTransform, TrainTransform


SIZES = ((500, 375), (1500, 1000))


def make_picture(width, height, seed):
    """JPEG file of a picture whose decoding costs about what a photo's does."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / height
    waves = [np.sin(rng.uniform(1, 9) * x + rng.uniform(1, 9) * y + phase) for phase in rng.uniform(0, 6, 3)]
    image = Image.fromarray((128 + 90 * np.stack(waves, -1)).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(60):
        center, radius = rng.uniform(0, 1, 2) * (width, height), rng.uniform(0.01, 0.15) * height
        box = [*(center - radius), *(center + radius)]
        color = tuple(int(value) for value in rng.integers(0, 256, 3))
        (draw.ellipse if rng.random() < 0.5 else draw.rectangle)(box, fill=color)
    noise = rng.normal(0, 3, (height, width, 1))
    image = Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=90)
    return stream.getvalue()


def to_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def plain_open(data):
    image = Image.open(io.BytesIO(data))
    ImageOps.exif_transpose(image, in_place=True)  # nearly free where there is nothing to turn
    return image.convert("RGB")


def plain_train(data, transform, rng):
    """The same crop as the transform's, the plain way."""
    image = plain_open(data)
    (box, _), flip = transform.choose_crop(*image.size, rng), rng.random() < transform.horizontal_flip
    image = image.crop(box).resize((transform.size, transform.size), Image.Resampling.BILINEAR)
    return to_tensor(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image)


def plain_eval(data, transform, rng):
    image = plain_open(data)
    short, long = sorted(image.size)
    long = int(transform.resize * long / short)
    size = (transform.resize, long) if image.width <= image.height else (long, transform.resize)
    image = image.resize(size, Image.Resampling.BILINEAR)
    left, top = (image.width - transform.size) // 2, (image.height - transform.size) // 2
    return to_tensor(image.crop((left, top, left + transform.size, top + transform.size)))


def ours(data, transform, rng):
    return transform(EncodedImage(data), rng)


def compare(files, size, rounds):
    """Time every way on the same files, in turns.

    Returns:
        A row per transform: images per second and core of both ways, the median ratio, how far pixels are apart.
    """
    resize = round(size * 256 / 224)
    transforms = {
        "train": (TrainTransform(size), plain_train),
        "eval": (EvalTransform(resize, size), plain_eval),
        "eval, exact=False": (EvalTransform(resize, size, exact=False), plain_eval),
    }
    results = []
    for name, (transform, plain) in transforms.items():
        seconds = {"plain": [], "ours": []}
        for number in range(rounds + 1):  # the first round warms up
            for way, function in (("plain", plain), ("ours", ours)):
                start = time.process_time()
                for i, data in enumerate(files):
                    function(data, transform, random.Random(1000 * number + i))
                seconds[way].append((time.process_time() - start) / len(files))
        ratio = statistics.median(p / o for p, o in zip(seconds["plain"][1:], seconds["ours"][1:], strict=True))
        gaps = [
            (plain(data, transform, random.Random(i)).int() - ours(data, transform, random.Random(i)).int()).abs()
            for i, data in enumerate(files)
        ]
        row = {f"{way} images/s": 1 / statistics.median(times[1:]) for way, times in seconds.items()}
        row |= {"ratio": ratio, "mean difference": statistics.mean(gap.float().mean().item() for gap in gaps)}
        results.append({"transform": name, **row, "largest difference": max(gap.max().item() for gap in gaps)})
    return results


def loader_throughput(files, size, batch_size, workers, rounds):
    """Images per second of a `DataLoader` with training transforms by number of workers, not counting their start."""
    import datasets

    with tempfile.TemporaryDirectory() as folder:
        rows = {"image": [], "label": []}
        for i, data in enumerate(files):
            path = Path(folder) / f"{i}.jpg"
            path.write_bytes(data)
            rows["image"].append({"path": str(path), "bytes": None})
            rows["label"].append(0)
        features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("int64")})
        dataset = ImageDataset(datasets.Dataset.from_dict(rows, features=features), TrainRows(size))
        speeds = {count: [] for count in workers}
        order = list(range(len(files))) * max(1, 12 * batch_size // len(files))
        for _ in range(rounds):
            for count in workers:
                loader = DataLoader(
                    dataset, batch_size=batch_size, sampler=order, num_workers=count, collate_fn=collate_images
                )
                batches = iter(loader)
                for _ in range(2 * max(count, 1)):
                    next(batches)
                start, images = time.perf_counter(), 0
                for batch in batches:
                    images += len(batch["labels"])
                speeds[count].append(images / (time.perf_counter() - start))
    return {str(count): statistics.median(values) for count, values in speeds.items()}


class TrainRows(TrainTransform):
    """Training crops for keys that bring no random numbers: from one generator per process."""

    rng = random.Random(0)

    def __call__(self, image, rng):
        return super().__call__(image, self.rng)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, help="folder with photos, however deep")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--images", type=int, default=48, help="images of each kind")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of which medians are taken")
    parser.add_argument("--size", type=int, default=224, help="side of the result")
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2], help="workers of the DataLoader")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    files = {}
    if args.data_dir is not None:
        found = list_images(args.data_dir)
        if not found:
            parser.error(f"--data_dir: no images in {args.data_dir}")
        step = max(len(found) // args.images, 1)
        files["photos"] = [(args.data_dir / file.path).read_bytes() for file in found[::step][: args.images]]
    for width, height in SIZES:
        files[f"{width}x{height}"] = [make_picture(width, height, seed) for seed in range(args.images)]
    rows = [
        {"images": name, "kB": statistics.mean(map(len, datas)) / 1e3, **row}
        for name, datas in files.items()
        for row in compare(datas, args.size, args.rounds)
    ]
    rounds = max(args.rounds // 2, 1)
    speeds = {name: loader_throughput(datas, args.size, 32, args.workers, rounds) for name, datas in files.items()}
    settings = {"size": args.size, "images": args.images, "rounds": args.rounds, "cores": os.cpu_count()}
    write_report(rows, "cpu", args.output, settings=settings, pillow=PIL.__version__, loader=speeds)
    for name, by_workers in speeds.items():
        print(f"DataLoader, {name}: " + ", ".join(f"{n} workers {value:.0f}/s" for n, value in by_workers.items()))


if __name__ == "__main__":
    main()
