"""What the scores depend on: one setting at a time, on one data set, as curves.

    python benchmarks/dependence.py --output runs/dependence --seeds 0 1 --overrides runs/rates/rates.yaml \\
        --dataset_name folder --data_dir photos --class_split alternate --backbone runs/backbone --image_size 112 \\
        --max_steps 132

A run is `--config` (a row of table 1) with the options given, which go to `train.py`, and with one thing changed:
steps, training classes, photos of each class, both of them (a small shop), prompts, the share of the original proxies,
semantic proxies, or the size of images. Test classes are always the same ones, and training has `--max_steps` steps,
however few the photos. Which classes and photos are taken is drawn anew with each seed, fewer being a part of more.

The command can be stopped, given again and given several times side by side, as `compare_methods.py`. `--curves` names
some only; runs with the options as given belong to all. `OUTPUT/dependence.{json,md,png}` are written anew after every
run, of all that are done in the folder.
"""

import argparse
import csv
import io
import random
from dataclasses import dataclass
from pathlib import Path

from compare_methods import SCORES, find_configs, read_row_overrides, summarise
from resumable_runs import (
    check_earlier_run,
    class_list_options,
    finish,
    launch_process,
    outcomes,
    run_command,
    share,
    write_once,
    writing,
)

from vptsp.files.atomic import write_json, write_text


ROOT = Path(__file__).resolve().parents[1]
DEFAULT = "default"
ALL = "all"
SHOPS = ((5, 5), (10, 5), (10, 10), (20, 5), (20, 10))
MEASURES = ("recall_at_1", "map_at_r")


@dataclass
class Base:
    """What the options given come to.

    Attributes:
        steps: `max_steps`.
        image_size, patch_size: Of the model, in pixels.
        num_prompts, proxy_bias_ratio, proxy_update: Of the model.
        photos: Training class -> its photos (paths); test class -> its photos.
    """

    steps: int
    image_size: int
    patch_size: int
    num_prompts: int
    proxy_bias_ratio: float
    proxy_update: str
    photos: dict[str, dict[str, list[str]]]


def read_base(arguments):
    """[`Base`] of the arguments of `train.py`.

    Raises:
        ValueError: they have no `max_steps` or no backbone, or the images are in no folder.
    """
    from transformers import AutoConfig

    from vptsp.training.run_arguments import parse_arguments

    model_fields, training_args, data_args, _ = parse_arguments(arguments)
    if training_args.max_steps <= 0:
        raise ValueError("--max_steps is needed: epochs would be shorter with fewer photos")
    if model_fields["backbone"] is None:
        raise ValueError("--backbone is needed")
    splits = data_args.load_splits()
    if set(splits) != {"train", "test"}:
        raise ValueError(f"curves need the splits train and test, got {', '.join(splits)}")
    photos = {}
    for name, split in splits.items():
        names = split.features["label"].names
        photos[name] = {class_name: [] for class_name in names}
        for row in split:
            if row["image"]["path"] is None or row["image"]["bytes"] is not None:
                raise ValueError("curves over classes and photos need images in a folder, not in an archive")
            photos[name][names[row["label"]]].append(str(Path(row["image"]["path"]).absolute()))
    patch_size = AutoConfig.from_pretrained(model_fields["backbone"]).patch_size
    fields = {name: model_fields[name] for name in ("num_prompts", "proxy_bias_ratio", "proxy_update")}
    return Base(training_args.max_steps, data_args.image_size, patch_size, photos=photos, **fields)


def subset(photos, classes, per_class, seed):
    """Some photos of some training classes; fewer of either are a part of more.

    Args:
        photos: Class -> paths.
        classes: How many; None for all.
        per_class: Photos of each at most; None for all.
        seed: Of the draw.
    """
    names = sorted(photos)
    random.Random(seed).shuffle(names)
    drawn = {}
    for name in names[:classes]:
        paths = sorted(photos[name])
        random.Random(f"{seed} {name}").shuffle(paths)
        drawn[name] = paths[:per_class]
    return drawn


def subset_options(base, classes, per_class, seed, folder):
    """Options of `train.py` for `subset`; writes a table and two lists of classes into the folder.

    Raises:
        ValueError: the folder has others: the data have changed.
    """
    parts = {"train": subset(base.photos["train"], classes, per_class, seed), "test": base.photos["test"]}
    folder.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["image", "label"])
    rows.writerows([path, name] for part in parts.values() for name in part for path in part[name])
    write_once(folder / "photos.csv", text.getvalue())
    return ["--dataset_name", "table", "--data_dir", str(folder / "photos.csv"), *class_list_options(folder, **parts)]


def _size_options(size):
    return ["--image_size", str(size), "--resize_size", str(round(size * 256 / 224))]


def curves(base):
    """Every curve's points.

    Returns:
        Curve -> (what it is about, {value: options of `train.py`, or (classes, photos of each), or None for those that
        were given}).
    """
    steps = [round(base.steps * factor) for factor in (0.25, 0.5, 1, 2, 4)]
    sizes = sorted({base.image_size, *(base.patch_size * patches for patches in (4, 6, 8, 12, 16))})

    def changed(option, values, given):
        return {str(value): None if value == given else [f"--{option}", str(value)] for value in values}

    total = len(base.photos["train"])
    classes = {str(count): (count, None) for count in (5, 10, 20, 40) if count < total}
    shops = {f"{count} x {photos}": (count, photos) for count, photos in SHOPS if count <= total}
    return {
        "steps": ("training steps", changed("max_steps", steps, base.steps)),
        "classes": ("training classes, all their photos", {**classes, f"{ALL} {total}": None}),
        "photos": ("photos of each training class", {"2": (None, 2), "5": (None, 5), "10": (None, 10), ALL: None}),
        "shop": ("training classes x photos of each", shops),
        "prompts": (
            "prompts per layer",
            changed("num_prompts", sorted({1, 5, 10, 20, 50, base.num_prompts}), base.num_prompts),
        ),
        "proxy_bias_ratio": (
            "share of the original proxies",
            changed(
                "proxy_bias_ratio", sorted({0.0, 0.25, 0.5, 0.75, 1.0, base.proxy_bias_ratio}), base.proxy_bias_ratio
            ),
        ),
        "proxy_update": (
            "semantic proxies",
            changed("proxy_update", dict.fromkeys((base.proxy_update, "gru_relu", "mean", "none")), base.proxy_update),
        ),
        "image_size": (
            "image size in pixels",
            {str(size): None if size == base.image_size else _size_options(size) for size in sizes},
        ),
    }


def point_name(curve, value, change):
    """Folder of a point: that of the options given is common to all curves."""
    return DEFAULT if change is None else f"{curve}-{value.replace(' ', '')}"


def run_curves(config, names, seeds, output, overrides, own=(), launch=launch_process):
    """Do all runs that are not done, and write what they say after each.

    Args:
        config: YAML file of the row.
        names: Of the curves.
        seeds: Of every point; all points have one seed before any has two.
        output: Folder.
        overrides: Options of `train.py`.
        own: Further options, which belong to this row alone.
        launch: As `finish` takes it.

    Returns:
        As `collect`.

    Raises:
        ValueError: options that can't be, or a folder that holds runs with others.
    """
    base = read_base(run_command(config, 0, output / DEFAULT, [*overrides, *own]))
    planned = curves(base)
    points = {point_name(name, value, change): change for name in names for value, change in planned[name][1].items()}
    tasks = {}
    for seed in seeds:
        for point, change in points.items():
            folder = output / point / f"seed-{seed}"
            options = change or []
            if isinstance(change, tuple):
                options = subset_options(base, *change, seed, output / "photos" / f"{point}-seed-{seed}")
            tasks[folder] = run_command(config, seed, folder, [*overrides, *own, *options])
            check_earlier_run(folder, tasks[folder])
    collect(planned, output, overrides)  # which refuses runs that can't stand in one table

    def do(folder):
        run = finish(folder, tasks[folder], launch)
        recall = run.get("final_recall_at_1")
        shown = "" if recall is None else f"{100 * recall:.2f}"
        print(f"{folder.relative_to(output)!s:<36} R@1 {shown}  {run.get('failure', '')}", flush=True)
        write_report(planned, output, overrides)

    share(tasks, do)
    return write_report(planned, output, overrides)


def collect(planned, output, overrides):
    """What the runs of a folder say.

    Returns:
        Curve -> {"about": text, "points": {value: what `summarise` says}}, of points with a run that is done.
    """
    found = outcomes(output, "seed-*", overrides)
    table = {}
    for name, (about, changes) in planned.items():
        named = {value: found.get(point_name(name, value, change)) for value, change in changes.items()}
        points = {value: summarise(list(runs.values())) for value, runs in named.items() if runs}
        table[name] = {"about": about, "points": points}
    return table


def write_report(planned, output, overrides):
    """Write `dependence.json`, `.md` and `.png`; returns what `collect` does."""
    with writing(output):
        table = collect(planned, output, overrides)
        write_json(output / "dependence.json", table)
        write_text(output / "dependence.md", markdown(table))
        plot(table, output / "dependence.png")
    return table


def markdown(table):
    """Short answers, then a table for every curve."""
    answers = [answer for name, curve in table.items() if (answer := _answers(name, curve["points"]))]
    parts = ["".join(answers)] if answers else []
    for curve in table.values():
        if not curve["points"]:
            continue
        lines = [[curve["about"], "seeds", "R@1", "MAP@R", "frozen R@1", "frozen MAP@R"], ["---"] * 6]
        for value, row in curve["points"].items():
            if not row["seeds"]:
                lines.append([value, "failed", row["failures"][0], "", "", ""])
                continue
            scores = [_percent(row["mean"][measure], row["deviation"][measure]) for measure in MEASURES]
            frozen = [_percent(row["frozen"][measure]) for measure in MEASURES]
            lines.append([value, str(row["seeds"]), *scores, *frozen])
        parts.append("".join(f"| {' | '.join(line)} |\n" for line in lines))
    return "\n".join(parts) + "\nIn percent, ± standard deviation over seeds. Batches hold each class once at most.\n"


def _answers(name, points):
    """What to expect of so many classes and photos, a line each."""
    if name not in ("classes", "photos", "shop"):
        return ""
    lines = []
    for value, row in points.items():
        if not _is_scored((value, row)):
            continue
        classes, _, photos = value.partition(" x ")
        what = {
            "classes": f"{value} classes and all their photos",
            "photos": f"all classes and {value} photos of each",
            "shop": f"{classes} classes and {photos} photos of each",
        }[name]
        scores = {
            title: f"{_percent(row['mean'][measure])} (frozen backbone {_percent(row['frozen'][measure])})"
            for measure, title in ((measure, SCORES[measure]) for measure in MEASURES)
        }
        lines.append(f"- With {what}, expect {' and '.join(f'{title} {text}' for title, text in scores.items())}.\n")
    return "".join(lines)


def _is_scored(point):
    """Whether a value's row has scores."""
    return point[1]["seeds"] > 0 and point[1]["mean"]["recall_at_1"] is not None


def _percent(mean, deviation=None):
    if mean is None:
        return ""
    return f"{100 * mean:.1f}" + ("" if deviation is None else f" ± {100 * deviation:.1f}")


def plot(table, path):
    """A panel for every curve: R@1 and MAP@R of the tuned model, and dashed those of the frozen backbone."""
    from matplotlib.figure import Figure

    shown = {name: dict(filter(_is_scored, curve["points"].items())) for name, curve in table.items()}
    if not any(shown.values()):
        return
    figure = Figure(figsize=(18, 8), layout="constrained")
    for axes, (name, points) in zip(figure.subplots(2, 4).flat, shown.items(), strict=True):
        for number, measure in enumerate(MEASURES):
            look, places = {"color": f"C{number}"}, range(len(points))
            means = [100 * row["mean"][measure] for row in points.values()]
            spread = [100 * (row["deviation"][measure] or 0) for row in points.values()]
            frozen = [100 * row["frozen"][measure] for row in points.values()]
            axes.errorbar(places, means, spread, marker="o", capsize=3, label=SCORES[measure], **look)
            axes.plot(places, frozen, linestyle="--", label=f"{SCORES[measure]}, frozen backbone", **look)
        axes.set_xticks(range(len(points)), list(points))
        axes.set(xlabel=table[name]["about"], ylabel="%", ylim=(0, 100))
        axes.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=100)


CURVES = ("steps", "classes", "photos", "shop", "prompts", "proxy_bias_ratio", "proxy_update", "image_size")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for runs, tables and picture")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "table1" / "vptsp_g_bitfit.yaml")
    parser.add_argument("--curves", nargs="+", default=list(CURVES), choices=CURVES, help="default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of every point")
    parser.add_argument(
        "--overrides", nargs="+", default=[], help="YAML files: row -> fields; those of this row count"
    )
    args, overrides = parser.parse_known_args(argv)
    try:
        configs = find_configs([str(args.config)])
        own = read_row_overrides(args.overrides, {**find_configs([]), **configs}).get(args.config.stem, [])
        run_curves(args.config, args.curves, args.seeds, args.output, overrides, own)
    except ValueError as error:
        parser.error(str(error))
    print((args.output / "dependence.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
