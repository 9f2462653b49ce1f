"""What all processes learn of each step: its loss, bad files and batches, numbers that are not finite, requests to stop."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NoReturn

from torch import Tensor

from omnivision.agreement import Agreement
from omnivision.data.batch import BadSample, Batch
from omnivision.distributed import Processes
from omnivision.errors import NonFiniteError, UserError
from omnivision.reporting.bad_samples import BadSampleLedger
from omnivision.reporting.run_folder import RunFolder


@dataclass(frozen=True)
class Posted:
    """A step whose facts are on their way; scalars on the device."""

    number: int
    loss: Tensor
    norm: Tensor
    finite: Tensor
    paths: list[str]
    bad: list[BadSample]


class StepWatch:
    """`post` after each step, `hear` later; both by all processes. Posting waits for nothing."""

    def __init__(self, processes: Processes, ledger: BadSampleLedger, folder: RunFolder) -> None:
        self.processes, self.ledger, self.folder = processes, ledger, folder
        self.agreement: Agreement[Posted] = Agreement(processes)
        self.loss = self.norm = math.nan  # of the last step that was heard of, averaged over the processes
        self.leaving = False  # one process was asked to stop, and all know it

    def post(self, step: Posted, short: bool, asked: bool) -> None:
        """Send the facts of a step on their way: `short` if its batch was not whole, `asked` if this process is to stop."""
        self.agreement.post(step, (step.loss, step.norm, ~step.finite, short, len(step.bad), asked))

    def hear(self, but: int = 0) -> None:
        """Learn of the steps so far, but for the `but` newest. Raises NonFiniteError and UserError, in all processes."""
        for step, (loss, norm, not_finite, short, bad, asked) in self.agreement.read(but):
            self.loss, self.norm = loss / self.processes.world, norm / self.processes.world
            self.leaving = self.leaving or bool(asked)
            if bad:
                self.record(step.bad)
            if short:
                raise UserError(
                    f"{int(bad)} files of one batch could not be decoded, many of them replacements for one another; all are "
                    f"in {self.ledger.path}. Check datasets.NAME.prefix, and that the data is mounted.",
                    everywhere=True,
                )
            if not_finite:
                self._tell_what_is_not_finite(step)

    def record(self, bad: list[BadSample]) -> None:
        """Enter the bad files of all processes into the ledger. Raises UserError when its budget is spent."""
        everywhere = [sample for part in self.processes.gather(bad) for sample in part]
        try:
            self.ledger.add(everywhere, write=self.processes.is_main)
        finally:
            if everywhere and self.processes.is_main:
                self.folder.write_summary(bad_samples=len(self.ledger))

    def _tell_what_is_not_finite(self, step: Posted) -> NoReturn:
        found = self.processes.gather(
            None if step.finite else (float(step.loss), float(step.norm), sorted(set(step.paths)))
        )
        details = "; ".join(
            f"process {rank}: loss {entry[0]}, gradient norm {entry[1]}, samples {', '.join(entry[2])}"
            for rank, entry in enumerate(found)
            if entry is not None
        )
        raise NonFiniteError(
            f"Step {step.number} gave a loss or gradient that is not finite ({details}). The weights were not changed by this "
            "step. Lower the learning rate, set trainer.optim.gradient_clip, or look at these samples.",
            everywhere=True,
        )


def posted(number: int, batch: Batch, loss: Tensor, norm: Tensor, scaled: bool) -> Posted:
    """A step to post. With fp16 (`scaled`) the gradient overflows now and then by design: the step is skipped then."""
    return Posted(number, loss, norm, loss.isfinite() & (norm.isfinite() | scaled), batch.paths, batch.bad)
