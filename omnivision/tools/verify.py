"""`omnivision verify RUN`: recompute what a run claims."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.table import Table
from rich.text import Text

from omnivision.tools.arguments import Flag, OutFile, at_least
from omnivision.tools.predict import Device
from omnivision.tools.workers import track
from omnivision.utils.errors import UserError
from omnivision.utils.io import write_json
from omnivision.utils.streams import print_text, wide_console

EXIT_CHANGED, EXIT_WRONG = 3, 4
OUTCOMES = {
    0: "Nothing was found to be wrong or changed.",
    EXIT_CHANGED: "Weights or data are no longer those of the run, so some claims cannot be checked.",
    EXIT_WRONG: "Some numbers are wrong.",
}


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """What `verify` checks.

    Attributes:
        sample: How many predictions of each source to recompute.
        all: Recompute all predictions.
        json: Also write the claims to this file.
        workers: Processes that decode videos beside this one.
    """

    sample: Annotated[int, at_least(0)] = 32
    all: Flag = False
    json: OutFile = None
    workers: Annotated[int, at_least(0)] = 0
    device: Device = "cpu"


_OPTIONS = VerifyOptions()


def verify(run: Annotated[Path, Parameter(name="RUN")], /, *, options: VerifyOptions = _OPTIONS) -> int:
    """Recompute what a run claims, and say which claims hold.

    Metrics are recomputed from the predictions and compared with the summary and the log; predictions are recomputed from the
    checkpoint and the videos; checkpoints and lists of data are compared by their hashes. Exit code 0: all that could be
    checked holds; 3: weights or data changed; 4: numbers are wrong.

    Args:
        run: The directory of a run. Of one that has not validated, only checkpoints and lists are compared.
    """
    import torch

    from omnivision.training.verify import verify_run

    try:
        device = torch.device(options.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device must be available to torch, got {options.device!r}: {error}") from None
    show = functools.partial(track, what="verify")
    claims = verify_run(run, None if options.all else options.sample, device, options.workers, show)
    console, _ = wide_console(highlight=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("claim", "recorded", "found", ""):
        table.add_column(column, overflow="fold")
    for claim in claims:
        table.add_row(*map(Text, (claim.what, claim.recorded, claim.found, claim.verdict)))
    console.print(table)
    verdicts = {claim.verdict for claim in claims}
    code = EXIT_WRONG if "wrong" in verdicts else EXIT_CHANGED if "changed" in verdicts else 0
    unchecked = sum(claim.verdict == "unchecked" for claim in claims)
    print_text(OUTCOMES[code] + (f" {unchecked} could not be checked." if unchecked else ""))
    if options.json is not None:
        write_json(options.json, [claim._asdict() for claim in claims])
    return code
