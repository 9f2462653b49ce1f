"""`omnivision demo-data DIR`: a small set of rendered videos to try every stage on."""

import functools
import time
from typing import Annotated

from cyclopts import Parameter

from omnivision.tools.arguments import Flag, at_least
from omnivision.tools.workers import track
from omnivision_demo.dataset import write_demo_data
from omnivision_demo.spec import ACTIONS, DOMAINS

QUICK = {"train": 4, "val": 1, "synthetic": 4}
FULL = {"train": 40, "val": 40, "synthetic": 500}
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
    """Render small videos to try every stage on, without a download.

    Write short H.264 videos of a person doing one of six actions, in three domains (synthetic, nohuman, target), and the lists
    of paths and labels that training reads. The same settings give the same bytes. Takes about a minute on two cores.

    Args:
        folder: A new or empty folder, or one with unfinished demo data.
        train: Training videos per action and domain (default 40, with --quick 4).
        val: Validation videos per action and domain (default 40, with --quick 1).
        synthetic: Training videos per action in the synthetic domain (default 500; with --train, the same number).
        seed: Seed of the videos.
        workers: Processes that render.
        quick: A tiny set, for tests.
    """
    counts = QUICK if quick else FULL
    if synthetic is None:
        synthetic = counts["synthetic"] if train is None else train
    train, val = train or counts["train"], val or counts["val"]
    start = time.monotonic()
    show = functools.partial(track, what="demo-data")
    written = write_demo_data(folder, train=train, val=val, synthetic=synthetic, seed=seed, workers=workers, track=show)
    seconds = time.monotonic() - start
    print(f"Rendered {written.new} of {written.videos} videos, {written.size / 1e6:.1f} MB in all, in {seconds:.0f} s.")
    for domain in DOMAINS:
        count = len(ACTIONS) * (synthetic if domain == "synthetic" else train)
        print(
            f"  {folder}/{domain}: {count} training, {len(ACTIONS) * val} validation videos of {len(ACTIONS)} actions"
        )
    print(f"Stages on them: +experiments=demo/mae, align, finetune, probe or average, with data_root={folder}")
    return 0
