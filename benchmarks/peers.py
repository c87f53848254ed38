"""What people would use instead: other libraries on the same backbone, photos, batches and steps, in one table.

    python benchmarks/peers.py --choose --output runs/peer_rates --data_dir photos --backbone runs/backbone \\
        --optim adamw_torch --num_train_epochs 2
    python benchmarks/peers.py --output runs/peers --overrides runs/peer_rates/rates.yaml --ours runs/compare \\
        --seeds 0 1 2 --data_dir photos --backbone runs/backbone --optim adamw_torch --num_train_epochs 3

All other options are those that `choose_rates.py` and `compare_methods.py` were given, as far as they say something
about data, batches, steps and optimiser (`HONOURED` in `peer_training.py`); others are refused. With `--choose`, each
peer's rate is searched as `choose_rates.py` searches those of our rows: on training classes that are held back, with
as many tries, from a start that suits what it tunes (`STARTS`, or `--overrides`). `--also proxy_learning_rate`
searches that of a peer's proxies too.

Without it, each peer is trained with each seed, in a process of its own, and scored by our metrics; `--ours` is the
output of `compare_methods.py` with the same options, whose rows `--rows` are put beside them. `OUTPUT/peers.md` and
`peers.json` have the table. Both can be stopped and given again, and work side by side, as `compare_methods.py` does.
`--peers` names some only. `requirements-peers.txt` has what they need.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from choose_rates import choose, hold_back_classes
from choose_rates import markdown as rates_markdown
from compare_methods import COSTS, compare, find_rows, markdown, read_row_overrides
from resumable_runs import FIXED, writing

from vptsp.files.atomic import write_json, write_text


# Peer -> learning rate that is tried first.
STARTS = {
    "st_lora_triplet": 3.2e-4,
    "pml_proxy_anchor_linear": 3.2e-3,
    "pml_proxy_anchor_full": 3.2e-5,
    "pml_multi_similarity_linear": 3.2e-3,
    "pml_multi_similarity_full": 3.2e-5,
}
COLUMNS = {"recall_at_1": "R@1", "map_at_r": "MAP@R"} | {name: title for name, (title, *_) in COSTS.items()}
SCRIPT = Path(__file__).with_name("peer_training.py")


def launch_peer(arguments, log):
    """A peer in a process of its own; everything it prints goes to `log`."""
    with log.open("w", encoding="utf-8") as file:
        command = [sys.executable, str(SCRIPT), *arguments]
        return subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode


def proxy_rate(arguments):
    """The proxies' rate of a peer by its arguments; None for a loss without proxies."""
    from vptsp.training.run_arguments import parse_arguments

    peer, *options = arguments
    return parse_arguments(options)[1].proxy_learning_rate if "proxy_anchor" in peer else None


def choose_peer_rates(peers, output, overrides, row_overrides, seed, launch, also):
    """Search the rates of the peers; as `choose_rates.choose`."""
    output.mkdir(parents=True, exist_ok=True)
    overrides = [*overrides, *hold_back_classes([*FIXED, *overrides], output)]
    own = {peer: ["--learning_rate", f"{STARTS[peer]:g}", *row_overrides.get(peer, [])] for peer in peers}
    peers = {peer: peer for peer in peers}
    return choose(peers, output, overrides, own, None, seed, launch, proxy_rate if also else None)


def find_ours(folder, names, overrides):
    """Rows of ours, trained with the same options.

    Args:
        folder: Output of `compare_methods.py`.
        names: Of the rows.
        overrides: Options that they must have.

    Raises:
        ValueError: they were trained with others, or a row has no finished run.
    """
    found = find_rows(folder, overrides)
    if missing := [name for name in names if not found.get(name, {}).get("seeds")]:
        raise ValueError(f"--rows: {folder} has no finished run of {missing[0]}")
    return {name: found[name] for name in names}


def winners(rows):
    """Column -> rows that are best in it: the highest score, the least of all else."""
    best = {}
    for column in COLUMNS:
        values = {
            name: row["mean"][column] for name, row in rows.items() if row["seeds"] and row["mean"][column] is not None
        }
        if values:
            top = (max if column in ("recall_at_1", "map_at_r") else min)(values.values())
            best[column] = [name for name, value in values.items() if value == top]
    return best


def write_tables(output, ours, overrides):
    """Write `peers.md` and `peers.json`, of ours and of all peers that are done in the folder."""
    with writing(output):
        rows = {**ours, **find_rows(output, overrides)}
        best = winners(rows)
        text = markdown(rows) + "\nBest in a column: "
        text += "; ".join(
            f"{COLUMNS[column]} {', '.join(f'`{name}`' for name in names)}" for column, names in best.items()
        )
        write_json(output / "peers.json", {"rows": rows, "best": best})
        write_text(output / "peers.md", text + ".\n")
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for runs and tables")
    parser.add_argument("--choose", action="store_true", help="search the rates instead")
    parser.add_argument("--also", nargs="+", default=[], choices=["proxy_learning_rate"], help="what else is searched")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="of every peer; the search has the first"
    )
    parser.add_argument("--peers", nargs="+", default=list(STARTS), choices=list(STARTS), help="default: all")
    parser.add_argument("--overrides", nargs="+", default=[], help="YAML files: peer -> fields, for single peers")
    parser.add_argument("--ours", type=Path, help="output of compare_methods.py")
    parser.add_argument("--rows", nargs="+", default=["vptsp_g_bitfit"], help="rows of ours in the table")
    args, overrides = parser.parse_known_args(argv)
    try:
        row_overrides = read_row_overrides(args.overrides, STARTS)
        if args.choose:
            if args.ours:
                raise ValueError("--ours goes with the table, not with --choose")
            seed = args.seeds[0]
            table = choose_peer_rates(args.peers, args.output, overrides, row_overrides, seed, launch_peer, args.also)
            print(rates_markdown(table))
            return
        if args.also:
            raise ValueError("--also goes with --choose")
        ours = find_ours(args.ours, args.rows, overrides) if args.ours else {}
        peers = {peer: peer for peer in args.peers}
        compare(peers, args.seeds, args.output, overrides, launch_peer, row_overrides)
        write_tables(args.output, ours, overrides)
    except ValueError as error:
        parser.error(str(error))
    print((args.output / "peers.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
