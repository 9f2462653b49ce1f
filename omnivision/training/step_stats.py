"""Run progress and step statistics, reduced over ranks without blocking the host."""

from __future__ import annotations

import math
import resource
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from omnivision.config.messages import prefix_settings
from omnivision.data.batch import BadSample, missing_files_message
from omnivision.distributed.fsdp import local_tensor
from omnivision.distributed.process_group import Dist
from omnivision.reporting.logs import BadSampleLedger, MetricsLog
from omnivision.reporting.run_directory import RunDir
from omnivision.tasks.metrics import RANKING_METRICS, Meter
from omnivision.utils.errors import NonFiniteError, UserError

MIN_LOSS_SCALE = 1e-4  # for fp16; the scale starts at 65536 and is halved after each overflow


@dataclass
class RunState:
    """Progress of a run: `step` steps of epoch `epoch` (from 0) are done."""

    steps_per_epoch: int = 1
    epoch: int = 0
    step: int = 0
    best: float | None = None  # top-1 or mAP (%), or loss of best.pt
    best_loss: float | None = None
    best_epoch: int | None = None  # counted from 1
    seconds: float = 0.0  # accumulated up to `start_time`
    start_time: float = field(default_factory=time.monotonic)
    last_metrics: dict[str, Any] = field(default_factory=dict)
    meter: Meter = field(default_factory=Meter)  # sums of the current epoch

    @property
    def global_step(self) -> int:
        return self.epoch * self.steps_per_epoch + self.step

    @property
    def weights_epoch(self) -> int:
        """The last epoch, from 0, in which the weights were trained; between epochs, `epoch` is already the next one."""
        return self.epoch if self.step else max(0, self.epoch - 1)

    def count_seconds(self) -> None:
        """Add the time since the last call to `seconds`."""
        now = time.monotonic()
        self.seconds, self.start_time = self.seconds + now - self.start_time, now

    def update_best(self, metrics: Mapping[str, float]) -> bool:
        """Keep an evaluation of the current epoch unless an earlier one is better; return whether it was kept.

        Higher top-1 or mAP is better (lower loss if there is neither), then lower loss, then the later epoch.
        """
        loss = metrics.get("loss", math.nan)
        value, sign = next(((metrics[name], 1) for name in RANKING_METRICS if name in metrics), (loss, -1))
        if not math.isfinite(value):
            return False
        known = loss if math.isfinite(loss) else math.inf
        before = math.inf if self.best_loss is None else self.best_loss  # checkpoints of older versions lack it
        if self.best is not None and (sign * value, -known) < (sign * self.best, -before):
            return False
        self.best = value
        self.best_loss = known
        self.best_epoch = self.epoch + 1
        return True


@dataclass
class ThroughputMeter:
    """Clips and waiting time between two log lines."""

    start_time: float = field(default_factory=time.monotonic)
    clips: int = 0  # summed over ranks
    data_seconds: float = 0.0

    def metrics(self, device: torch.device) -> dict[str, float]:
        """Return clips per second over all ranks, the fraction of time waiting for data, and peak memory here in GB."""
        seconds = max(time.monotonic() - self.start_time, 1e-9)
        return {
            "clips_per_second": self.clips / seconds,
            "data_wait": self.data_seconds / seconds,
            "memory_gb": peak_memory(device) / 1e9,
        }


def peak_memory(device: torch.device) -> int:
    """Return the peak memory of this process in bytes: reserved on its GPU, or resident on the host."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(device))
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def is_due(count: int, every: int | None) -> bool:
    """Return whether something done once per `every` epochs or steps (None: never) is due after `count`."""
    return every is not None and count % every == 0


@dataclass(frozen=True)
class Step:
    """One optimizer step on this rank. Tensors are scalars on the device."""

    epoch: int
    number: int  # global step, from 1
    loss: Tensor
    count: Tensor | float  # samples that the loss averages over
    grad_norm: Tensor
    lr: float
    paths: list[str]
    bad: list[BadSample]
    is_partial: bool = False  # the batch has fewer clips than the plan asks for
    stop_requested: bool = False
    scaled: bool = False  # fp16: occasional overflows of the gradient are expected, and skipped silently

    @property
    def is_unexpectedly_nonfinite(self) -> Tensor:
        """Whether to report the step as skipped; an overflow of scaled gradients is not reported."""
        return ~(self.loss.isfinite() & (self.grad_norm.isfinite() | self.scaled))


class StepSums(NamedTuple):
    """Quantities of a step to sum over ranks: this rank's values, or the sums."""

    loss: Any  # times `count`
    count: Any
    grad_norm: Any
    nonfinite: Any
    partial: Any
    bad: Any  # files
    missing: Any  # files
    stop_requested: Any


class StepStats:
    """Reduces step results over ranks: `submit` queues a step, `drain` reads it later. Collective.

    `loss` and `grad_norm` are from the last step drained; `stop_requested` becomes true when any rank was asked to stop.
    """

    def __init__(
        self, dist: Dist, ledger: BadSampleLedger, run_dir: RunDir, info: Callable[[str], None], max_skipped: int
    ) -> None:
        """A run may skip up to `max_skipped` non-finite steps; each is reported with `info`."""
        self.dist = dist
        self.ledger = ledger
        self.run_dir = run_dir
        self.info = info
        self.max_skipped = max_skipped
        self.skipped = 0  # steps skipped in the whole run
        self.loss = self.grad_norm = math.nan
        self.stop_requested = False
        self._nonfinite_log = MetricsLog(run_dir.logs / "nonfinite.jsonl")
        self._pending = deque[tuple[Step, Tensor, torch.Event | None]]()  # sums are on the host once the event is done

    def start(self, step: int) -> None:
        """Start after `step`; entries of later steps are dropped from the log."""
        if self.dist.is_main:
            self._nonfinite_log.truncate_after(step)

    def submit(self, step: Step) -> Tensor:
        """Queue a step's reduction without waiting.

        Returns whether the step must not change the weights, because it is non-finite or partial on any rank: bool, a scalar on
        the device, the same on all ranks.
        """
        device = self.dist.device
        facts = StepSums(
            loss=step.loss * step.count,
            count=step.count,
            grad_norm=step.grad_norm,
            nonfinite=step.is_unexpectedly_nonfinite,
            partial=step.is_partial,
            bad=len(step.bad),
            missing=sum(sample.missing for sample in step.bad),
            stop_requested=step.stop_requested,
        )
        # `torch.full` fills on the device; a host tensor would have to be copied there, and the host would wait.
        values = torch.stack(
            [
                fact.detach().double()
                if isinstance(fact, Tensor)
                else torch.full((), fact, dtype=torch.float64, device=device)
                for fact in facts
            ]
        )
        self.dist.all_reduce(values)
        sums, event = values.to("cpu", non_blocking=True), None
        if device.type != "cpu":
            event = torch.Event(device)
            event.record()
        self._pending.append((step, sums, event))
        totals = StepSums(*values)
        return (totals.nonfinite > 0) | (totals.partial > 0)

    def drain(self, keep_newest: int = 0) -> None:
        """Process all submitted steps but the newest `keep_newest`. Raises NonFiniteError and UserError on all ranks alike."""
        while len(self._pending) > keep_newest:
            step, sums, event = self._pending.popleft()
            if event is not None:
                event.synchronize()
            totals = StepSums(*sums.tolist())
            self.loss, self.grad_norm = totals.loss / max(totals.count, 1), totals.grad_norm / self.dist.world_size
            self.stop_requested = self.stop_requested or bool(totals.stop_requested)
            if totals.partial and totals.missing == totals.bad:  # the data is unreachable; the files are not bad
                samples = [sample for part in self.dist.all_gather_object(step.bad) for sample in part]
                raise UserError(missing_files_message(samples, "files of a batch"), on_all_ranks=True)
            bad = self.record_bad(step.bad) if totals.bad else []
            if totals.partial:
                num_files = len({sample.path for sample in bad})
                raise UserError(
                    f"{num_files} files of one batch could not be decoded, including replacements ({self.ledger.path}). Check "
                    f"{prefix_settings(sample.source for sample in bad)}, and that the data is mounted.",
                    on_all_ranks=True,
                )
            if totals.nonfinite:
                self._record_skipped(step)

    def record_bad(self, bad: list[BadSample]) -> list[BadSample]:
        """Record the bad samples of all ranks in the ledger, and return them.

        Raises UserError when the budget of bad files is spent.
        """
        samples = [sample for part in self.dist.all_gather_object(bad) for sample in part]
        try:
            self.ledger.add(samples, write=self.dist.is_main)
        finally:
            if samples and self.dist.is_main:
                self.run_dir.write_summary(bad_samples=len(self.ledger))
        return samples

    def _record_skipped(self, step: Step) -> None:
        """Log a skipped step. Raises NonFiniteError on all ranks when there are too many."""
        ranks = list(
            enumerate(self.dist.all_gather_object((float(step.loss), float(step.grad_norm), sorted(set(step.paths)))))
        )
        # All ranks share a gradient; ranks with a non-finite loss caused the problem.
        causes = [entry for entry in ranks if not math.isfinite(entry[1][0])] or ranks
        self.skipped += 1
        details = []
        for rank, (loss, norm, samples) in causes:
            details.append(f"rank {rank}: loss {loss}, gradient norm {norm}, samples {', '.join(samples)}")
            if self.dist.is_main:
                facts = {"rank": rank, "loss": loss, "grad_norm": norm, "samples": samples}
                self._nonfinite_log.write("nonfinite", "train", step.epoch, step.number, **facts)
        message = (
            f"Step {step.number} (lr {step.lr:.3g}) was skipped: its loss or gradient is not finite ({'; '.join(details)}). "
            f"{self.skipped} of at most {self.max_skipped} skipped steps ({self._nonfinite_log.path})."
        )
        if self.skipped > self.max_skipped:
            advice = "Lower the learning rate, set trainer.optim.gradient_clip, inspect these samples, or set"
            raise NonFiniteError(f"{message} {advice} trainer.max_skipped_steps.", on_all_ranks=True)
        self.info(message)


def check_loss_scale(scaler: torch.amp.GradScaler, step: int) -> None:
    """Raise NonFiniteError when fp16 gradients overflow at every loss scale."""
    if scaler.is_enabled() and (scale := scaler.get_scale()) < MIN_LOSS_SCALE:
        raise NonFiniteError(
            f"Step {step}: fp16 gradients are not finite even at a loss scale of {scale:.1g}, so no step changes the weights. "
            "Lower the learning rate, or set trainer.optim.gradient_clip or trainer.optim.amp.amp_dtype=bfloat16.",
            on_all_ranks=True,
        )


def require_finite_weights(model: nn.Module, dist: Dist, step: int) -> None:
    """Raise NonFiniteError, on all ranks, for weights that are not finite; they must not replace a good checkpoint."""
    nonfinite = torch.stack([~local_tensor(parameter).isfinite().all() for parameter in model.parameters()])
    if any(ranks := dist.all_gather_object(int(nonfinite.sum()))):
        raise NonFiniteError(
            f"{max(ranks)} of the {len(nonfinite)} parameters are not finite after step {step}; the last checkpoint is kept. "
            "Lower the learning rate, or set trainer.optim.gradient_clip.",
            on_all_ranks=True,
        )
