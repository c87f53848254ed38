"""Choose the learning rates of every row of a comparison, on classes held back from training.

    python benchmarks/choose_rates.py --output runs/rates --dataset_name folder --data_dir path/to/folders \\
        --backbone runs/backbone --num_train_epochs 2 --also proxy_learning_rate
    python benchmarks/compare_methods.py --output runs/compare --overrides runs/rates/rates.yaml ...

Of the training classes, every third validates and the others train; the test classes take no part, so the data set
must be one that takes lists of classes (`folder` does). A row is trained at `--rate` (or at the `learning_rate` that
`--overrides` has for it), half a decade above and half a decade below, and at further rates as long as the best is the
lowest or highest tried, five in all at most. Best is the highest MAP@R on the validation classes, which varies less
than R@1. The learning rate of proxies stays as it is, or, with `--also proxy_learning_rate`, is searched likewise from
there at the learning rate chosen, for rows whose loss has any.

`OUTPUT/rates.yaml` is for `--overrides`, `OUTPUT/rates.md` has the scores; both are written anew after every row, of
all runs that are done in the folder. All other options are those of `compare_methods.py`, and so is what happens when
the command is given again, or another one with other rows beside it. The runs of a command share one process.
"""

import argparse
import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

import yaml
from compare_methods import find_configs, read_row_overrides
from resumable_runs import (
    check_earlier_run,
    class_list_options,
    finish,
    launch_here,
    outcomes,
    run_command,
    share,
    writing,
)

from vptsp.files.atomic import write_text
from vptsp.files.locks import locked


MOST_RATES = 5


def hold_back_classes(arguments, output):
    """Write lists of the classes that train and of those that validate.

    Args:
        arguments: Of `train.py`, with the data set's.
        output: Folder for the lists.

    Returns:
        Options that put the lists in place of the data set's own split.

    Raises:
        DataError: the data set takes no lists of classes.
        ValueError: the folder has lists of other classes.
    """
    from vptsp.data_scripts.dataset_registry import refuse_unknown_options
    from vptsp.training.run_arguments import parse_arguments

    _, _, data_args, _ = parse_arguments(arguments)
    refuse_unknown_options(data_args.dataset_name, ("train_classes", "test_classes"))
    names = data_args.load_splits()["train"].features["label"].names
    train = [name for i, name in enumerate(names) if i % 3 != 2]
    return class_list_options(output, train=train, test=names[2::3])


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


def rate_text(start, step):
    """The rate `step` half decades above a start, as the command line and the folders' names have it."""
    return f"{start * 10 ** (step / 2):.2g}"


def proxy_rate(arguments):
    """The proxies' rate of a row by its arguments of `train.py`; None for a loss without proxies."""
    from vptsp import VPTSPConfig
    from vptsp.losses.loss_registry import build_criterion
    from vptsp.training.run_arguments import parse_arguments

    model_fields, training_args, *_ = parse_arguments(arguments)
    criterion = build_criterion(VPTSPConfig(**model_fields))
    if criterion is None or criterion.takes == "proxies" or list(criterion.parameters()):
        return training_args.proxy_learning_rate
    return None


def starts(own_options, start, proxies):
    """Where the search of a row begins.

    Args:
        own_options: Options of the row alone.
        start: The learning rate of a row without one of its own.
        proxies: The rate of its proxies, None where it is not searched.

    Returns:
        (learning rate, proxies' rate or None).

    Raises:
        ValueError: one of them is not above 0.
    """
    own = [value for name, value in pairwise(own_options) if name == "--learning_rate"]
    found = {"learning_rate": float(own[-1]) if own else start, "proxy_learning_rate": proxies}
    for name, rate in found.items():
        if rate is not None and not 0 < rate < math.inf:
            raise ValueError(f"{name} must be above 0 to search from there, got {rate}")
    return tuple(found.values())


def choose_row(name, config, output, options, seed, launch, start):
    """Do the runs of one row: at several learning rates, then at several of proxies.

    Args:
        name: Of the row.
        config: Of the row.
        output: Folder of all rows.
        options: Of `train.py`.
        seed: Of all runs.
        launch: As `finish` takes it.
        start: As from `starts`.
    """

    def score(rate, proxies):
        chosen = ["--learning_rate", rate]
        folder = output / name / f"rate-{rate}"
        if proxies is not None:
            chosen += ["--proxy_learning_rate", proxies]
            folder = folder.with_name(f"{folder.name}-proxies-{proxies}")
        arguments = run_command(config, seed, folder, [*options, *chosen])
        check_earlier_run(folder, arguments)
        run = finish(folder, arguments, launch)
        found = map_at_r(run)
        print(f"{name:<20} {folder.name:<30} MAP@R {100 * found:.2f}  {run.get('failure', '')}", flush=True)
        return found

    rate, proxies = start
    first = None if proxies is None else rate_text(proxies, 0)
    scores = search(lambda step: score(rate_text(rate, step), first))
    best = max(scores, key=scores.get)
    if proxies is not None and scores[best] > -math.inf:
        search(lambda step: score(rate_text(rate, best), rate_text(proxies, step)))


def choose(configs, output, overrides, row_overrides, start, seed, launch=launch_here, proxies_of=None):
    """Search the rates of every row, and write `rates.yaml` and `rates.md` of all rows in the folder.

    Args:
        configs: Row name -> configuration.
        output: Folder.
        overrides: Options of `train.py` for all rows.
        row_overrides: Row name -> options for this row, of which a `learning_rate` is tried first.
        start: The learning rate that other rows try first.
        seed: Of all runs.
        launch: As `finish` takes it.
        proxies_of: Gives the proxies' rate to start from, of a row's arguments, as `proxy_rate`; None: not searched.

    Returns:
        As `find_scores`.

    Raises:
        ValueError: a folder holds runs with other options, or a rate to start from is not above 0 or is given twice.
    """
    if any(option.partition("=")[0] == "--learning_rate" for option in overrides):
        raise ValueError("--learning_rate is what is searched: --rate says where it starts, --overrides for one row")
    find_scores(output, overrides)  # which refuses runs that can't stand in one table
    options = {name: [*overrides, *row_overrides.get(name, [])] for name in configs}
    first = {}
    for name, config in configs.items():
        proxies = proxies_of(run_command(config, seed, output, options[name])) if proxies_of else None
        first[name] = starts(row_overrides.get(name, []), start, proxies)

    def do(name):
        with locked(output / name / ".row.lock", f"the row {name} of {output}"):
            choose_row(name, configs[name], output, options[name], seed, launch, first[name])
        write_tables(output, overrides)

    share(configs, do)
    return write_tables(output, overrides)


def map_at_r(run):
    """What is compared, in 0..1; -inf for a failed run and where nothing was answered."""
    found = run.get("final_map_at_r")
    return -math.inf if found is None or math.isnan(found) else found


def find_scores(output, overrides):
    """Scores of all runs in a folder that are done.

    Returns:
        Row name, in the tables' order and then by name -> {(learning rate, proxies' rate or None), as text: MAP@R in
        0..1, or -inf for a failed run}.
    """
    found = outcomes(output, "rate-*", overrides)
    order = [*find_configs([]), *found]
    table = {}
    for name in sorted(found, key=order.index):
        for folder, run in found[name].items():
            rate, _, proxies = folder.removeprefix("rate-").partition("-proxies-")
            table.setdefault(name, {})[rate, proxies or None] = map_at_r(run)
    return table


def write_tables(output, overrides):
    """Write `rates.yaml` and `rates.md` of all runs that are done in the folder, and return their scores."""
    with writing(output):
        table = find_scores(output, overrides)
        names = ("learning_rate", "proxy_learning_rate")
        rates = {
            row: {name: float(rate) for name, rate in zip(names, chosen, strict=True) if rate is not None}
            for row, chosen in best_rates(table).items()
        }
        write_text(output / "rates.yaml", yaml.safe_dump(rates, sort_keys=False))
        write_text(output / "rates.md", markdown(table))
    return table


def best_rates(table):
    """Row name -> rates of the highest score, of rows with a run that did not fail."""
    best = {name: max(scores, key=scores.get) for name, scores in table.items()}
    return {name: rates for name, rates in best.items() if table[name][rates] > -math.inf}


def markdown(table):
    """All scores as tables, one for each kind of rate, the best of a row in bold."""
    by_rate, by_proxies = {}, {}
    best = best_rates(table)
    for name, scores in table.items():
        # the learning rate was searched at one rate of proxies, the proxies' rate at one learning rate
        (first, _), *_ = Counter(proxies for _, proxies in scores).most_common(1)
        by_rate[name] = {rate: score for (rate, proxies), score in scores.items() if proxies == first}
        if first is not None and name in best:
            chosen = best[name][0]
            by_proxies[name] = {proxies: score for (rate, proxies), score in scores.items() if rate == chosen}
    text = _grid(by_rate, {name: rates[0] for name, rates in best.items()})
    text += "\nMAP@R on the validation classes in percent, by learning rate; in bold the rate that is chosen.\n"
    if by_proxies:
        text += "\n" + _grid(by_proxies, {name: rates[1] for name, rates in best.items()})
        text += "\nThe same at that learning rate, by the learning rate of the proxies.\n"
    return text


def _grid(table, best):
    rates = sorted({rate for scores in table.values() for rate in scores}, key=float)
    lines = [["method", *rates], ["---"] * (1 + len(rates))]
    for name, scores in table.items():
        cells = []
        for rate in rates:
            value = scores.get(rate)
            text = "" if value is None else "failed" if value == -math.inf else f"{100 * value:.1f}"
            cells.append(f"**{text}**" if rate == best.get(name) else text)
        lines.append([name, *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for runs, rates.yaml and rates.md")
    parser.add_argument("--rate", type=float, default=3.2e-3, help="learning rate that is tried first")
    parser.add_argument("--also", nargs="+", default=[], choices=["proxy_learning_rate"], help="what else is searched")
    parser.add_argument("--seed", type=int, default=0, help="of all runs")
    parser.add_argument("--configs", nargs="+", default=[], help="YAML files, a row each")
    parser.add_argument("--overrides", nargs="+", default=[], help="YAML files: row -> fields, for single rows")
    args, overrides = parser.parse_known_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    try:
        configs = find_configs(args.configs)
        row_overrides = read_row_overrides(args.overrides, {**find_configs([]), **configs})
        overrides += hold_back_classes(
            run_command(next(iter(configs.values())), 0, args.output, overrides), args.output
        )
        proxies_of = proxy_rate if args.also else None
        table = choose(configs, args.output, overrides, row_overrides, args.rate, args.seed, proxies_of=proxies_of)
    except ValueError as error:
        parser.error(str(error))
    print(markdown(table))


if __name__ == "__main__":
    main()
