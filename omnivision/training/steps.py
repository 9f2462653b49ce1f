"""What all processes learn of each step: its loss, bad files and batches, numbers that are not finite, requests to stop."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn

from omnivision.data.batch import BadSample, Batch, vanished_files
from omnivision.distributed.fsdp import local_tensor
from omnivision.distributed.process_group import Dist
from omnivision.reporting.bad_samples import BadSampleLedger
from omnivision.reporting.metrics_log import MetricsLog
from omnivision.reporting.run_directory import RunDir
from omnivision.training.agreement import Agreement
from omnivision.utils.errors import NonFiniteError, UserError

SMALLEST_SCALE = 1e-4  # of the loss in fp16; it begins at 65536 and is halved after each overflow


@dataclass(frozen=True)
class Posted:
    """A step whose facts are on their way; scalars on the device."""

    epoch: int
    number: int
    loss: Tensor
    count: Tensor | float  # samples that the loss is a mean of
    norm: Tensor
    finite: Tensor
    lr: float
    paths: list[str]
    bad: list[BadSample]


class StepWatch:
    """`post` after each step, `hear` later; both by all processes. Posting waits for nothing."""

    def __init__(
        self,
        dist: Dist,
        ledger: BadSampleLedger,
        folder: RunDir,
        say: Callable[[str], None],
        max_skipped: int,
    ) -> None:
        """A run may skip `max_skipped` steps whose numbers are not finite; each is told with `say`."""
        self.dist, self.ledger, self.folder, self.info = dist, ledger, folder, say
        self.max_skipped = max_skipped
        self.skipped = 0  # in the whole run
        self._not_finite = MetricsLog(folder.logs / "nonfinite.jsonl")
        self.agreement: Agreement[Posted] = Agreement(dist)
        self.loss = self.norm = math.nan  # of the last step that was heard of, of all processes together
        self.leaving = False  # one process was asked to stop, and all know it

    def start(self, step: int) -> None:
        """Begin after a step; what was written of later ones is forgotten."""
        if self.dist.is_main:
            self._not_finite.truncate_after(step)

    def post(self, step: Posted, short: bool, asked: bool) -> Tensor:
        """Send the facts of a step on their way: `short` if its batch was not whole, `asked` if this process is to stop.

        Returns whether the step must change nothing, because of numbers that are not finite in any process: bool, a scalar on
        the device, the same in all.
        """
        missing = sum(sample.missing for sample in step.bad)
        facts = (step.loss * step.count, step.count, step.norm, ~step.finite, short, len(step.bad), missing, asked)
        return self.agreement.post(step, facts)[3] > 0

    def hear(self, but: int = 0) -> None:
        """Learn of the steps so far, but for the `but` newest. Raises NonFiniteError and UserError, in all processes."""
        for step, (loss, count, norm, not_finite, short, bad, missing, asked) in self.agreement.read(but):
            self.loss, self.norm = loss / max(count, 1), norm / self.dist.world_size
            self.leaving = self.leaving or bool(asked)
            if short and missing == bad:  # nothing is wrong with these files, and the ledger is not to say so
                self._require_files(step.bad)
            files = self.record(step.bad) if bad else 0
            if short:
                raise UserError(
                    f"{files} files of one batch could not be decoded, many of them replacements for one another; all are "
                    f"in {self.ledger.path}. Check datasets.NAME.prefix, and that the data is mounted.",
                    on_all_ranks=True,
                )
            if not_finite:
                self._skipped(step)

    def _require_files(self, bad: list[BadSample]) -> NoReturn:
        """Raises UserError, in all processes, about files that are all gone at once."""
        paths = [sample.path for part in self.dist.gather(bad) for sample in part]
        raise UserError(vanished_files(paths, "that one batch was to be made of"), on_all_ranks=True)

    def record(self, bad: list[BadSample]) -> int:
        """Enter the bad files of all processes into the ledger; return how many they are, each counted once.

        Raises UserError when its budget is spent.
        """
        everywhere = [sample for part in self.dist.gather(bad) for sample in part]
        try:
            self.ledger.add(everywhere, write=self.dist.is_main)
        finally:
            if everywhere and self.dist.is_main:
                self.folder.write_summary(bad_samples=len(self.ledger))
        return len({sample.path for sample in everywhere})

    def _skipped(self, step: Posted) -> None:
        """Tell of a step that changed nothing. Raises NonFiniteError, in all processes, when it is one too many."""
        found = list(enumerate(self.dist.gather((float(step.loss), float(step.norm), sorted(set(step.paths))))))
        # The gradients of all are one; of the losses those that began it are told.
        culprits = [entry for entry in found if not math.isfinite(entry[1][0])] or found
        self.skipped += 1
        for rank, (loss, norm, samples) in culprits:
            if self.dist.is_main:
                facts = {"rank": rank, "loss": loss, "grad_norm": norm, "samples": samples}
                self._not_finite.write("nonfinite", "train", step.epoch, step.number, **facts)
        details = "; ".join(
            f"process {rank}: loss {loss}, gradient norm {norm}, samples {', '.join(samples)}"
            for rank, (loss, norm, samples) in culprits
        )
        told = (
            f"Step {step.number}, at a learning rate of {step.lr:.3g}, gave a loss or gradient that is not finite ({details}). "
            "It changed no weights"
        )
        if self.skipped > self.max_skipped:
            raise NonFiniteError(
                f"{told}; {self.skipped} such steps, and trainer.max_skipped_steps is {self.max_skipped}. Lower the learning "
                f"rate, set trainer.optim.gradient_clip, or look at these samples, which are in {self._not_finite.path}.",
                on_all_ranks=True,
            )
        self.info(f"{told} ({self.skipped} of at most {self.max_skipped} such steps; {self._not_finite.path}).")


def posted(
    epoch: int,
    number: int,
    batch: Batch,
    loss: Tensor,
    norm: Tensor,
    lr: float,
    scaled: bool,
    count: Tensor | float = 1,
) -> Posted:
    """A step to post. With fp16 (`scaled`) the gradient overflows now and then by design: the step is skipped then.

    `count`: how many samples the loss is a mean of.
    """
    finite = loss.isfinite() & (norm.isfinite() | scaled)
    return Posted(epoch, number, loss, count, norm, finite, lr, batch.paths, batch.bad)


def check_loss_scale(scaler: torch.amp.GradScaler, step: int) -> None:
    """Raises NonFiniteError when gradients overflow in fp16 however little they are scaled up: then no step counts."""
    if scaler.is_enabled() and (scale := scaler.get_scale()) < SMALLEST_SCALE:
        raise NonFiniteError(
            f"Step {step}: the gradient is not finite in fp16 even when the loss is scaled by {scale:.1g}, so that no step "
            "changes the weights any more. Lower the learning rate, set trainer.optim.gradient_clip, or set "
            "trainer.optim.amp.amp_dtype=bfloat16 or trainer.optim.amp.enabled=false.",
            on_all_ranks=True,
        )


def check_same_step(dist: Dist, place: tuple[int, int], folder: Path) -> None:
    """Raises UserError, in all processes, when they did not resume from the same (epoch, step)."""
    places = dist.gather(place)
    if len(set(places)) > 1:
        raise UserError(
            f"The processes found different checkpoints in {folder}: by rank, (epoch, step) {', '.join(map(str, places))}. "
            "Expected one folder that all of them see. Change trainer.checkpoint.save_dir or launcher.experiment_log_dir.",
            on_all_ranks=True,
        )


def check_finite(model: nn.Module, dist: Dist, step: int) -> None:
    """Raises NonFiniteError, in all processes, for weights that must not take the place of good ones."""
    parts = [local_tensor(parameter) for parameter in model.parameters()]
    spoilt = torch.stack([~part.isfinite().all() for part in parts])
    if count := int((dist.sum(spoilt.long()) > 0).sum()):
        raise NonFiniteError(
            f"{count} of the {len(parts)} parameters are not finite after step {step}; the last checkpoint stays as it is. "
            "Lower the learning rate, or set trainer.optim.gradient_clip.",
            on_all_ranks=True,
        )
