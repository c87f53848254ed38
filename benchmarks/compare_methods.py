"""All methods on one data set: every row of tables 1 and 2 with several seeds, one table and one plot out.

    python benchmarks/compare_methods.py --output runs/compare --seeds 0 1 2 \\
        --data_dir CUB_200_2011.tgz --backbone google/vit-base-patch16-224-in21k --num_train_epochs 5

A row is a configuration of `configs/table1` and `configs/table2`, or one that `--configs` names. All other options go
to `train.py` and win over every row's file; fields for single rows, from the YAML files that `--overrides` names
(`vpt: {learning_rate: 0.001}`), win over these. Each run is a process of its own and writes to
`OUTPUT/<row>/seed-<n>/`, so the command can be stopped and given again: finished runs are kept, others go on from
their last checkpoint, and failed ones are tried again. Several such commands may work on one output side by side, with
the same or other rows and seeds: a run that another is at is passed over and looked at again at the end.
`OUTPUT/comparison.{md,json,png}` are written anew after every row, of all runs that are done there.

The weights of the last step are scored, not those that did best on the test classes (`--eval_strategy epoch` would
choose so). Learning rates are those of the files, which were published for CUB at 224 pixels or chosen by us: on other
data or for other lengths of training they favour nobody in particular. `choose_rates.py` chooses one for every row, on
classes held back from training, and writes them as a file for `--overrides`.
"""

import argparse
import json
import statistics
from pathlib import Path

import paired_rows
from resumable_runs import (
    EMBEDDINGS,
    RESULTS,
    check_earlier_run,
    finish,
    launch_process,
    outcomes,
    run_command,
    share,
    writing,
)

from vptsp.files.atomic import write_json, write_text
from vptsp.files.yaml_files import YamlError, read_yaml


ROOT = Path(__file__).resolve().parents[1]
TABLES = ("table1", "table2")
SCORES = {"recall_at_1": "R@1", "recall_at_2": "R@2", "recall_at_4": "R@4", "map_at_r": "MAP@R"}
MARKERS = "os^D"
# result of train.py -> column, divisor, decimals
COSTS = {
    "tuned_parameters": ("tuned (M)", 1e6, 3),
    "training_only_parameters": ("training only (M)", 1e6, 3),
    "shipped_megabytes": ("shipped (MB)", 1, 2),
    "median_step_seconds": ("step (ms)", 1e-3, 0),
    "peak_memory_megabytes": ("peak memory (MB)", 1, 0),
}


def summarise(runs):
    """One row of the table from the results of its seeds.

    Returns:
        Dict with `seeds` (number of finished runs), `failures` (their texts), and `mean` and `deviation` (of the
        sample; None for one seed) of each score (0..1) and cost. `frozen` holds the untuned backbone's scores.
    """
    finished = [run for run in runs if "failure" not in run]
    row = {"seeds": len(finished), "failures": [run["failure"] for run in runs if "failure" in run]}
    if not finished:
        return row
    names = {f"final_{score}": score for score in SCORES} | {cost: cost for cost in COSTS}
    row["frozen"] = {score: finished[0].get(f"frozen_{score}") for score in SCORES}
    row["mean"], row["deviation"] = {}, {}
    for key, name in names.items():
        values = [run[key] for run in finished if run.get(key) is not None]
        row["mean"][name] = statistics.mean(values) if values else None
        row["deviation"][name] = statistics.stdev(values) if len(values) > 1 else None
    return row


def markdown(rows):
    """The table, as text."""
    header = ["method", "seeds", *SCORES.values(), *(title for title, *_ in COSTS.values())]
    lines = [" | ".join(header), " | ".join("---" for _ in header)]
    done = [row for row in rows.values() if row["seeds"]]
    if done and done[0]["frozen"]["recall_at_1"] is not None:
        scores = [_score(done[0]["frozen"][score], None) for score in SCORES]
        lines.append(" | ".join(["frozen backbone", "", *scores, *["0"] * 3, "", ""]))
    for name, row in rows.items():
        if not row["seeds"]:
            lines.append(" | ".join([name, "failed", *[""] * (len(header) - 2)]))
            continue
        scores = [_score(row["mean"][score], row["deviation"][score]) for score in SCORES]
        costs = [_cost(row["mean"][key], divisor, digits) for key, (_, divisor, digits) in COSTS.items()]
        lines.append(" | ".join([name, str(row["seeds"]), *scores, *costs]))
    text = "".join(f"| {line} |\n" for line in lines)
    failures = [f"- {name}: {failure}\n" for name, row in rows.items() for failure in row["failures"]]
    text += "\nScores in percent, ± standard deviation over seeds.\n"
    return text + ("\nFailed runs:\n\n" + "".join(failures) if failures else "")


def _score(mean, deviation):
    if mean is None:
        return ""
    return f"{100 * mean:.1f}" + ("" if deviation is None else f" ± {100 * deviation:.1f}")


def _cost(value, divisor, digits):
    return "" if value is None else f"{value / divisor:.{digits}f}"


def plot(rows, path):
    """R@1 and MAP@R against what is trained (shipped or for training only), with deviations over seeds."""
    from matplotlib.figure import Figure

    points = {name: row for name, row in rows.items() if row["seeds"]}
    if not points:
        return
    figure = Figure(figsize=(14, 7), layout="constrained")
    for axes, score in zip(figure.subplots(1, 2), ("recall_at_1", "map_at_r"), strict=True):
        for number, (name, row) in enumerate(points.items()):
            trained = row["mean"]["tuned_parameters"] + row["mean"]["training_only_parameters"]
            mean, spread = 100 * row["mean"][score], 100 * (row["deviation"][score] or 0)
            look = {"color": f"C{number % 10}", "fmt": MARKERS[number // 10 % len(MARKERS)]}
            axes.errorbar(trained, mean, spread, capsize=3, label=name, **look)
        frozen = next(iter(points.values()))["frozen"][score]
        if frozen is not None:
            axes.axhline(100 * frozen, color="#888888", linestyle="--", linewidth=1, label="frozen backbone")
        axes.set(xscale="log", xlabel="trained parameters", ylabel=f"{SCORES[score]} (%)")
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path, dpi=150)


def find_configs(names):
    """Configurations by row name.

    Raises:
        ValueError: there is none, a file is missing, or two have one name.
    """
    paths = [Path(name) for name in names] or [
        p for t in TABLES for p in sorted((ROOT / "configs" / t).glob("*.yaml"))
    ]
    configs = {}
    for path in paths:
        if not path.is_file():
            raise ValueError(f"--configs: there is no file {path}")
        if configs.setdefault(path.stem, path) is not path:
            raise ValueError(f"--configs: {path} and {configs[path.stem]} would be one row")
    if not configs:
        raise ValueError(f"there is no configuration in {ROOT / 'configs'}/{{{','.join(TABLES)}}}")
    return configs


def read_row_overrides(paths, rows):
    """Options of `train.py` for single rows, from YAML files that map row -> fields; later files win.

    Args:
        paths: Of the files. They may name rows that are not compared.
        rows: Names of all rows that there are.

    Returns:
        Row name -> list of options.

    Raises:
        ValueError: a file can't be read, or is not such a mapping, or names a row that does not exist.
    """
    options = {}
    for path in paths:
        try:
            content = read_yaml(path)
        except (OSError, YamlError) as error:
            raise ValueError(f"--overrides: {path} can't be read: {error}") from error
        if not isinstance(content, dict) or not all(isinstance(fields, dict) for fields in content.values()):
            raise ValueError(f"--overrides: {path} must map rows to fields, as in 'vpt: {{learning_rate: 0.001}}'")
        if unknown := sorted(str(name) for name in content if name not in rows):
            raise ValueError(f"--overrides: {path} names {unknown[0]}, which is none of the rows {', '.join(rows)}")
        for name, fields in content.items():
            for field, value in fields.items():
                options.setdefault(name, []).extend([f"--{field}", *_texts(value)])
    return options


def _texts(value):
    """A YAML value as the command line gives it."""
    if isinstance(value, list):
        return [str(item) for item in value]
    return [json.dumps(value) if isinstance(value, (dict, bool)) else str(value)]


def compare(
    configs, seeds, output, overrides, launch=launch_process, row_overrides=None, reference=None, resample="classes"
):
    """Do all runs that are not done, and write table and plot of all in the folder after each row.

    Args:
        configs: Row name -> configuration.
        seeds: Of every row.
        output: Folder.
        overrides: Options of `train.py` for all rows.
        launch: As `finish` takes it.
        row_overrides: Row name -> options for this row.
        reference: Row that all are compared with on the same queries; None for no such comparison.
        resample: What the intervals draw: `classes` or `queries`.

    Returns:
        Row name -> what `summarise` says.
    """
    row_overrides = row_overrides or {}
    planned = {
        (name, seed): run_command(
            path, seed, output / name / f"seed-{seed}", [*overrides, *row_overrides.get(name, [])]
        )
        for name, path in configs.items()
        for seed in seeds
    }
    for (name, seed), arguments in planned.items():
        check_earlier_run(output / name / f"seed-{seed}", arguments)
    find_rows(output, overrides)  # which refuses runs that can't stand in one table

    def do(task):
        name, seed = task
        folder = output / name / f"seed-{seed}"
        run = finish(folder, planned[task], launch)
        if reference is not None and "failure" not in run:
            paired_rows.embed_run(folder)
        recall = run.get("final_recall_at_1")  # None where no query could be answered
        shown = "" if recall is None else f"{100 * recall:.2f}"
        print(f"{name:<20} seed {seed}  R@1 {shown}  {run.get('failure', '')}", flush=True)
        if seed == seeds[-1]:
            write_tables(output, overrides, reference, resample)

    share(planned, do)
    return write_tables(output, overrides, reference, resample)


def find_rows(output, overrides):
    """`summarise` of every row with a run that is done, in the tables' order and then by name."""
    found = outcomes(output, "seed-*", overrides)
    order = [*find_configs([]), *found]
    return {name: summarise(list(found[name].values())) for name in sorted(found, key=order.index)}


def write_tables(output, overrides, reference=None, resample="classes"):
    """Write tables and plot of all runs that are done in the folder, and return the rows."""
    with writing(output):
        rows = find_rows(output, overrides)
        text = markdown(rows)
        if reference is not None and any(row["seeds"] for row in rows.values()):
            runs, missing = find_query_scores(output)
            paired = paired_rows.compare_rows(runs, reference, resample)
            write_json(output / "paired.json", {"reference": reference, "resample": resample, "rows": paired})
            text += "\n" + paired_rows.markdown(paired, reference, resample)
            text += f"Not among them yet: {', '.join(missing)}.\n" if missing else ""
        write_json(output / "comparison.json", rows)
        write_text(output / "comparison.md", text)
        plot(rows, output / "comparison.png")
    return rows


def find_query_scores(output):
    """Scores of the queries by all runs that are done and embedded, and by the frozen backbone.

    Returns:
        What `compare_rows` takes, and the names of runs that are done but not embedded.
    """
    done = [path.parent for path in sorted(output.glob(f"*/seed-*/{RESULTS}"))]
    embedded = [folder for folder in done if paired_rows.is_embedded(folder / EMBEDDINGS)]
    frozen = output / "frozen_embeddings"
    paired_rows.embed_run(done[0], frozen)
    runs = {paired_rows.FROZEN: {None: paired_rows.query_scores(frozen)}}
    for folder in embedded:
        seed = int(folder.name.removeprefix("seed-"))
        runs.setdefault(folder.parent.name, {})[seed] = paired_rows.query_scores(folder / EMBEDDINGS)
    return runs, [folder.relative_to(output).as_posix() for folder in done if folder not in embedded]


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for runs, table and plot")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of every row")
    parser.add_argument("--configs", nargs="+", default=[], help="YAML files, a row each")
    parser.add_argument("--overrides", nargs="+", default=[], help="YAML files: row -> fields, for single rows")
    parser.add_argument("--reference", default="vptsp_g_bitfit", help="row that all are compared with, or none")
    parser.add_argument("--resample", default="classes", choices=("classes", "queries"), help="what intervals draw")
    args, overrides = parser.parse_known_args(argv)
    try:
        configs = find_configs(args.configs)
        every = {**find_configs([]), **configs}
        row_overrides = read_row_overrides(args.overrides, every)
        if args.reference not in ("none", *every):
            raise ValueError(f"--reference must be none or one of the rows {', '.join(every)}, got {args.reference!r}")
        compare(
            configs,
            args.seeds,
            args.output,
            overrides,
            row_overrides=row_overrides,
            reference=None if args.reference == "none" else args.reference,
            resample=args.resample,
        )
    except ValueError as error:
        parser.error(str(error))
    print((args.output / "comparison.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
