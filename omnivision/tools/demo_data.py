"""`omnivision demo-data DIR`: makes a small set of films to try every stage of the project on."""

import argparse
import sys
import time
from typing import TYPE_CHECKING

from omnivision_demo.films import ACTIONS, DOMAINS, Written, write_demo_data

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_QUICK = {"train": 2, "val": 1, "synthetic": 2}
_FULL = {"train": 40, "val": 20, "synthetic": 160}


def add_parser(subparsers: "Subparsers") -> None:
    """Add `demo-data` to the command's parser; its namespace carries `run`, the function to call."""
    parser = subparsers.add_parser(
        "demo-data",
        help="make small films to try every stage on, without downloading anything",
        description=f"Draw short H.264 films of a person doing one of {len(ACTIONS)} actions, in three domains "
        f"({', '.join(DOMAINS)}), with the lists of paths and labels that training reads. "
        "The same settings give the same bytes. About a minute on two cores.",
    )
    parser.add_argument("folder", metavar="DIR", help="a new or empty folder, or one that this command was making")
    for split, note in (("train", "training"), ("val", "validation")):
        text = f"{note} films of each action in each domain (default {_FULL[split]}, with --quick {_QUICK[split]})"
        parser.add_argument(f"--{split}", type=int, metavar="N", help=text)
    parser.add_argument(
        "--synthetic",
        type=int,
        metavar="N",
        help=f"training films of each action in the synthetic domain (default {_FULL['synthetic']}, with --train as many)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="another seed, other films (default 0)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes to work with (default 2)")
    parser.add_argument("--quick", action="store_true", help="a tiny set, for tests")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Make the data and say what was made and where; 0 when they are complete."""
    counts = _QUICK if args.quick else _FULL
    train = counts["train"] if args.train is None else args.train
    val = counts["val"] if args.val is None else args.val
    synthetic = args.synthetic
    if synthetic is None:
        synthetic = counts["synthetic"] if args.train is None else train
    began = time.monotonic()
    written = write_demo_data(
        args.folder,
        train=train,
        val=val,
        synthetic=synthetic,
        seed=args.seed,
        workers=args.workers,
        progress=_Progress(),
    )
    _tell(args.folder, {"synthetic": synthetic}, train, val, written, time.monotonic() - began)
    return 0


class _Progress:
    """Prints a line at every tenth of the way, so that a log file stays readable too."""

    def __init__(self) -> None:
        self._tenths = 0

    def __call__(self, done: int, total: int) -> None:
        tenths = 10 * done // total
        if tenths > self._tenths:
            self._tenths = tenths
            print(f"demo-data: {done} of {total} films", file=sys.stderr, flush=True)


def _tell(folder: str, other: dict[str, int], train: int, val: int, written: Written, seconds: float) -> None:
    if written.made == 0:
        print(f"{folder}: complete already, {written.films} films, {written.size / 1e6:.1f} MB. Nothing to do.")
        return
    rest = "" if written.made == written.films else f" ({written.films - written.made} were there already)"
    print(f"Made {written.made} films{rest}, {written.size / 1e6:.1f} MB in all, in {seconds:.0f} s.")
    for domain in DOMAINS:
        films = f"{len(ACTIONS) * other.get(domain, train)} training and {len(ACTIONS) * val} validation films"
        print(f"  {folder}/{domain}: {films} of {len(ACTIONS)} actions")
    print(f"  {folder}/class_names.txt: the actions, in the order of the labels")
    print(f"Stages on them: +experiments=demo/mae, align, finetune, probe or average, with data_root={folder}")
