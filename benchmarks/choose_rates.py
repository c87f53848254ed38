"""Choose the learning rate of every row of a comparison, on classes held back from training.

    python benchmarks/choose_rates.py --output runs/rates --dataset_name folder --data_dir path/to/folders \\
        --backbone runs/backbone --num_train_epochs 2
    python benchmarks/compare_methods.py --output runs/compare --overrides runs/rates/rates.yaml ...

Of the training classes, every third validates and the others train; the test classes take no part, so the data set
must be one that takes lists of classes (`folder` does). A row is trained at `--rate`, half a decade above and half a
decade below, and at further rates as long as the best is the lowest or highest tried. Best is the highest MAP@R on the
validation classes, which varies less than R@1. The learning rate of proxies stays as it is.

`OUTPUT/rates.yaml` is for `--overrides`, `OUTPUT/rates.md` has the scores; both are written anew after every row.
All other options are those of `compare_methods.py`, and so is what happens when the command is given again. The runs
share one process.
"""

import argparse
import contextlib
import math
import traceback
from pathlib import Path

import yaml
from compare_methods import check_earlier_run, find_configs, finish, read_row_overrides, run_command

from vptsp.files.atomic import write_text


MOST_RATES = 5


def hold_back_classes(config, overrides, output):
    """Write lists of the classes that train and of those that validate.

    Args:
        config: Of any row.
        overrides: Options of `train.py`, with the data set's.
        output: Folder for the lists.

    Returns:
        Options that put the lists in place of the data set's own split.

    Raises:
        DataError: the data set takes no lists of classes.
    """
    from vptsp.data_scripts.dataset_registry import refuse_unknown_options
    from vptsp.training.run_arguments import parse_arguments

    _, _, data_args, _ = parse_arguments(run_command(config, 0, output, overrides))
    refuse_unknown_options(data_args.dataset_name, ("train_classes", "test_classes"))
    names = data_args.load_splits()["train"].features["label"].names
    options = []
    for option, classes in {
        "train_classes": [name for i, name in enumerate(names) if i % 3 != 2],
        "test_classes": names[2::3],
    }.items():
        path = output / f"{option}.txt"
        path.write_text("".join(f"{name}\n" for name in classes), encoding="utf-8")
        options += [f"--{option}", str(path)]
    return options


def launch_here(arguments, log):
    """`train.py` in this process, which spares a start; everything it prints goes to `log`."""
    from vptsp import train

    with log.open("w", encoding="utf-8") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            train.main(arguments)
        except SystemExit as error:
            if error.code not in (1, 2):  # interrupted
                raise
            return error.code
        except FloatingPointError:  # a rate that is too high is a result, too
            traceback.print_exc()
            return 1
    return 0


def search(score):
    """Climb from step 0 to a best step with a worse one on either side.

    Args:
        score: Gets a step (an integer) and gives a number; the more the better.

    Returns:
        Step -> score, of `MOST_RATES` steps at most.
    """
    scores = {step: score(step) for step in (0, -1, 1)}
    while len(scores) < MOST_RATES:
        best = max(scores, key=scores.get)
        if min(scores) < best < max(scores):
            break
        step = best + (1 if best > 0 else -1)
        scores[step] = score(step)
    return scores


def choose(configs, output, overrides, row_overrides, start, seed, launch=launch_here):
    """Search the rate of every row, and write `rates.yaml` and `rates.md`.

    Returns:
        Row name -> {rate as text: MAP@R in 0..1, or -inf for a failed run}.
    """
    table = {}
    for name, config in configs.items():

        def score(step, name=name, config=config):
            rate = f"{start * 10 ** (step / 2):.2g}"
            folder = output / name / f"rate-{rate}"
            options = [*overrides, *row_overrides.get(name, []), "--learning_rate", rate]
            arguments = run_command(config, seed, folder, options)
            check_earlier_run(folder, arguments)
            run = finish(folder, arguments, launch)
            found = run.get("final_map_at_r")
            table.setdefault(name, {})[rate] = (
                -math.inf if found is None or math.isnan(found) else found
            )  # null: nothing was answered
            print(f"{name:<20} {rate:<8} MAP@R {100 * table[name][rate]:.2f}  {run.get('failure', '')}", flush=True)
            return table[name][rate]

        search(score)
        rates = {row: {"learning_rate": float(rate)} for row, rate in best_rates(table).items()}
        write_text(output / "rates.yaml", yaml.safe_dump(rates, sort_keys=False))
        write_text(output / "rates.md", markdown(table))
    return table


def best_rates(table):
    """Row name -> rate of the highest score, of rows with a run that did not fail."""
    best = {name: max(scores, key=scores.get) for name, scores in table.items()}
    return {name: rate for name, rate in best.items() if table[name][rate] > -math.inf}


def markdown(table):
    """All scores as a table, the best of a row in bold."""
    rates = sorted({rate for scores in table.values() for rate in scores}, key=float)
    best = best_rates(table)
    lines = [["method", *rates], ["---"] * (1 + len(rates))]
    for name, scores in table.items():
        cells = []
        for rate in rates:
            value = scores.get(rate)
            text = "" if value is None else "failed" if value == -math.inf else f"{100 * value:.1f}"
            cells.append(f"**{text}**" if rate == best.get(name) else text)
        lines.append([name, *cells])
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return text + "\nMAP@R on the validation classes in percent, by learning rate; in bold the rate that is chosen.\n"


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for runs, rates.yaml and rates.md")
    parser.add_argument("--rate", type=float, default=3.2e-3, help="learning rate that is tried first")
    parser.add_argument("--seed", type=int, default=0, help="of all runs")
    parser.add_argument("--configs", nargs="+", default=[], help="YAML files, a row each")
    parser.add_argument("--overrides", nargs="+", default=[], help="YAML files: row -> fields, for single rows")
    args, overrides = parser.parse_known_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    try:
        configs = find_configs(args.configs)
        row_overrides = read_row_overrides(args.overrides, {**find_configs([]), **configs})
        overrides += hold_back_classes(next(iter(configs.values())), overrides, args.output)
        table = choose(configs, args.output, overrides, row_overrides, args.rate, args.seed)
    except ValueError as error:
        parser.error(str(error))
    print(markdown(table))


if __name__ == "__main__":
    main()
