"""Photos without labels: clusters in rounds against what else costs the same, on several data sets and seeds.

    python benchmarks/no_labels.py --output runs/no_labels --backbone facebook/dinov2-small --seeds 0 1 2 \\
        --data groceries=folder:photos/grocery cars=cars:photos/cars --image_size 112 --num_train_epochs 3

A row is a way to do without labels (`METHODS`), and above them all the frozen backbone, below them all the same
training with the labels. The labels of the classes that train are looked at by that last row alone; all are scored on
the other classes. With `--curves` the number of clusters and of rounds are gone through as well, one at a time. All
other options go to `train.py`, and are the same for all.

Each run is a process of its own and writes to `OUTPUT/<data>/<row>/seed-<n>/`, so the command can be stopped and given
again: finished runs are kept, others go on from their last checkpoint, and failed ones are tried again.
`OUTPUT/<data>/comparison.{md,json}` and `OUTPUT/curves.png` are written anew after every row.
"""

import argparse
from pathlib import Path

from compare_methods import check_earlier_run, finish, launch_process, markdown, summarise

from vptsp.files.atomic import write_json, write_text


NONE = ("--labels", "none")
# The loss of SimCLR (Chen et al., 2020): each photo a class, its two views in a batch find each other.
SIMCLR = ("--proxy_update", "none", "--loss", "pml.NTXentLoss", "--images_per_class", "2")
METHODS = {
    "clusters, 1 round": (*NONE,),
    "clusters, 2 rounds": (*NONE, "--rounds", "2"),
    "clusters, 3 rounds": (*NONE, "--rounds", "3"),
    "hdbscan": (*NONE, "--clustering", "hdbscan"),
    "not whitened": (*NONE, "--cluster_dims", "0"),
    "instances": (*NONE, "--clustering", "instances"),
    "simclr": (*NONE, "--clustering", "instances", *SIMCLR),
    "labelled": (),
}
CLUSTERS = (25, 50, 100, 200, 400)
WITH_TEST_LABELS = ("folder", "table", "imagefolder", "saved")  # others have a test in any case


def curve_methods():
    """Rows of the curve over the number of clusters; that over rounds is in `METHODS`."""
    return {f"{count} clusters": (*NONE, "--clusters", str(count)) for count in CLUSTERS}


def data_options(text):
    """`NAME=DATASET:PLACE` as a name and options of `train.py`.

    Raises:
        ValueError: it is something else.
    """
    name, equals, rest = text.partition("=")
    dataset, colon, place = rest.partition(":")
    if not (equals and colon and name and dataset and place):
        raise ValueError(f"--data must be NAME=DATASET:PLACE, as in cars=cars:photos/cars, got {text!r}")
    return name, ["--dataset_name", dataset, "--data_dir", place]


def run_command(data, method, seed, folder, options):
    """Arguments of `train.py` for one run; later options win over earlier ones."""
    asked = ["--test_labels", "true"] if "--labels" in method and data[1] in WITH_TEST_LABELS else []
    fixed = ["--seed", str(seed), "--output_dir", str(folder)]
    return [*data, "--eval_strategy", "no", "--picture_queries", "0", *asked, *options, *method, *fixed]


def compare(data_sets, methods, seeds, output, options, launch=launch_process):
    """Do all runs that are not done, and write tables after each row.

    Args:
        data_sets: Name -> options of `train.py`.
        methods: Row name -> options.
        seeds: Of every row.
        output: Folder.
        options: Of all rows.
        launch: As `compare_methods.finish` takes it.

    Returns:
        Data set -> row name -> what `compare_methods.summarise` says.
    """
    planned = {}
    for name, data in data_sets.items():
        for row, method in methods.items():
            for seed in seeds:
                folder = output / name / row.replace(", ", "-").replace(" ", "-") / f"seed-{seed}"
                planned[name, row, seed] = folder, run_command(data, method, seed, folder, options)
                check_earlier_run(*planned[name, row, seed])
    tables = {name: {} for name in data_sets}
    for row in methods:
        for name in data_sets:
            runs = []
            for seed in seeds:
                runs.append(finish(*planned[name, row, seed], launch))
                score = runs[-1].get("final_map_at_r")
                shown = "" if score is None else f"MAP@R {100 * score:.2f}"
                print(f"{name:<12} {row:<20} seed {seed}  {shown}{runs[-1].get('failure', '')}", flush=True)
            tables[name][row] = summarise(runs)
            write_json(output / name / "comparison.json", tables[name])
            write_text(output / name / "comparison.md", markdown(tables[name]))
        draw_curves(tables, output / "curves.png")
    return tables


def draw_curves(tables, path):
    """MAP@R over the number of clusters, and over rounds, of each data set, above its frozen backbone."""
    from matplotlib.figure import Figure

    axes_of = {
        "number of clusters": {f"{count} clusters": count for count in CLUSTERS},
        "rounds": {f"clusters, {count} round{'s' if count > 1 else ''}": count for count in (1, 2, 3)},
    }
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, (title, rows) in zip(figure.subplots(1, 2), axes_of.items(), strict=True):
        for number, (name, table) in enumerate(tables.items()):
            found = {count: table[row] for row, count in rows.items() if table.get(row, {}).get("seeds")}
            if found:
                means = [100 * row["mean"]["map_at_r"] for row in found.values()]
                spreads = [100 * (row["deviation"]["map_at_r"] or 0) for row in found.values()]
                axes.errorbar(list(found), means, spreads, color=f"C{number}", marker="o", capsize=3, label=name)
                frozen = 100 * next(iter(found.values()))["frozen"]["map_at_r"]
                axes.axhline(frozen, color=f"C{number}", linestyle="--", linewidth=1)
        axes.set(xlabel=title, ylabel="MAP@R (%), frozen dashed")
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path, dpi=150)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for runs, tables and curves")
    parser.add_argument("--backbone", required=True, help="name on the Hub, or folder")
    parser.add_argument("--data", nargs="+", required=True, help="data sets, as NAME=DATASET:PLACE")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of every row")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="rows; by default all")
    parser.add_argument("--curves", action="store_true", help="go through numbers of clusters too")
    args, options = parser.parse_known_args(argv)
    try:
        data_sets = dict(map(data_options, args.data))
        methods = {name: METHODS[name] for name in args.methods} | (curve_methods() if args.curves else {})
        compare(data_sets, methods, args.seeds, args.output, ["--backbone", args.backbone, *options])
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
