"""`omnivision demo-data DIR`: makes a small set of videos to try every stage of the project on."""

import sys
import time
from typing import Annotated

from cyclopts import Parameter

from omnivision.tools.arguments import Flag, at_least
from omnivision_demo.dataset import ACTIONS, DOMAINS, write_demo_data

QUICK = {"train": 2, "val": 1, "synthetic": 2}
FULL = {"train": 40, "val": 20, "synthetic": 160}
Count = Annotated[int | None, at_least(1)]


def demo_data(
    folder: Annotated[str, Parameter(name="DIR")],
    /,
    *,
    train: Count = None,
    val: Count = None,
    synthetic: Count = None,
    seed: Annotated[int, at_least(0)] = 0,
    workers: Annotated[int, at_least(1)] = 2,
    quick: Flag = False,
) -> int:
    """Make small videos to try every stage on, without a download.

    Draw short H.264 videos of a person doing one of 12 actions, in three domains (synthetic, nohuman, target), with the lists
    of paths and labels that training reads. The same settings give the same bytes. About a minute on two cores.

    Args:
        folder: A new or empty folder, or one that this command was making.
        train: Training videos of each action in each domain (default 40, with --quick 2).
        val: Validation videos of each action in each domain (default 20, with --quick 1).
        synthetic: Training videos of each action in the synthetic domain (default 160, with --train as many).
        seed: Another seed, other videos.
        workers: Processes to work with.
        quick: A tiny set, for tests.
    """
    counts = QUICK if quick else FULL
    if synthetic is None:
        synthetic = counts["synthetic"] if train is None else train
    train, val = train or counts["train"], val or counts["val"]
    start = time.monotonic()
    written = write_demo_data(
        folder, train=train, val=val, synthetic=synthetic, seed=seed, workers=workers, progress=_print_progress
    )
    if written.made == 0:
        print(f"{folder}: complete already, {written.videos} videos, {written.size / 1e6:.1f} MB. Nothing to do.")
        return 0
    rest = "" if written.made == written.videos else f" ({written.videos - written.made} existed already)"
    seconds = time.monotonic() - start
    print(f"Made {written.made} videos{rest}, {written.size / 1e6:.1f} MB in all, in {seconds:.0f} s.")
    for domain in DOMAINS:
        count = len(ACTIONS) * (synthetic if domain == "synthetic" else train)
        print(
            f"  {folder}/{domain}: {count} training and {len(ACTIONS) * val} validation videos of {len(ACTIONS)} actions"
        )
    print(f"  {folder}/class_names.txt: the actions, in the order of the labels")
    print(f"Stages on them: +experiments=demo/mae, align, finetune, probe or average, with data_root={folder}")
    return 0


def _print_progress(done: int, total: int) -> None:
    """Print a line at every tenth, so that a log file stays readable, too."""
    if 10 * done // total > 10 * (done - 1) // total:
        print(f"demo-data: {done} of {total} videos", file=sys.stderr, flush=True)
