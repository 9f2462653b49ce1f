"""The loop: epochs of steps, validation, checkpoints, and how a run picks itself up again.

What a run starts from, first that applies:
  1. its own newest checkpoint, in the middle of an epoch too (`resuming.take_up`: re-running the command);
  2. pretrained weights, loaded into the model when there is no such checkpoint;
  3. nothing.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import torch
from torch import nn

from omnivision.checkpoint import checkpointer as checkpoint
from omnivision.checkpoint import fingerprint as experiment
from omnivision.checkpoint import sharded as checkpoint_shards
from omnivision.checkpoint.pretrained import LoadReport
from omnivision.data.batch import Batch
from omnivision.data.loader import TrainData, ValData
from omnivision.data.sampling import SourcePlan, keyed_rng
from omnivision.distributed.fsdp import apply_fsdp, full_tensor, summon_full_params, without_sync
from omnivision.distributed.process_group import Dist, wrap_ddp
from omnivision.models.architecture import describe, has_unused_parameters
from omnivision.models.classifier import train_mode
from omnivision.models.mae import CrossBlock
from omnivision.models.vit import Block
from omnivision.optim.ema import MovingAverage
from omnivision.optim.groups import ScheduledOptimizer
from omnivision.reporting.bad_samples import BadSampleLedger
from omnivision.reporting.reporter import Reporter
from omnivision.reporting.run_directory import RunDir
from omnivision.tasks.base import StepOutput, Task
from omnivision.tasks.metrics import Meter, averages
from omnivision.training.evaluate import Evaluation, evaluate
from omnivision.training.run_state import Interval, State, due
from omnivision.training.steps import StepWatch, check_finite, check_loss_scale, check_same_step, posted
from omnivision.utils.errors import StopRequested
from omnivision.utils.io import BEST
from omnivision.utils.signals import StopSignal

MODEL_DRAW = 200  # purpose of the random numbers inside the model; see data.dataset.Draw


@dataclass(frozen=True)
class Options:
    """Numbers of the loop, from the settings under `trainer`."""

    max_epochs: int
    seed: int
    gradient_clip: float | None = None
    amp_dtype: torch.dtype | None = None
    strategy: Literal["ddp", "fsdp"] = "ddp"
    comms_dtype: str | None = None
    compile: bool = False
    ema_decay: float | None = None
    val_epoch_freq: int | None = None
    limit_val_batches: int | None = None
    log_freq: int = 10
    pictures_every_epochs: int | None = None
    save_freq: int | None = None
    save_every_steps: int | None = None
    max_skipped_steps: int = 0
    allow_changes: bool = False
    peak_clips_per_second: float | None = None  # clips a second of one device at its peak


class Trainer:
    """Trains `model` on `task`; see `fit` and `evaluate`. It receives built objects and knows nothing of settings files."""

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        optimizer: ScheduledOptimizer,
        train: TrainData | None,
        val: ValData | None,
        dist: Dist,
        folder: RunDir,
        reporter: Reporter,
        ledger: BadSampleLedger,
        options: Options,
        sources: Sequence[LoadReport] = (),
        stop: StopSignal | None = None,
    ) -> None:
        """Without `train` it only evaluates.

        `sources` are what the model is an average of; which they were is kept in checkpoints and compared. When one process
        is asked to `stop`, all save after the step that they are in, and leave.
        """
        self.stop = stop or StopSignal()
        self.task, self.optimizer, self.options = task, optimizer, options
        self.train, self.val = train, val
        self.dist, self.folder, self.reporter = dist, folder, reporter
        self.watch = StepWatch(dist, ledger, folder, reporter.info, options.max_skipped_steps)
        self.bare, self.sources = model.to(dist.device), list(sources)
        self.experiment: dict[str, Any] = {}  # what checkpoints say of it (`experiment.facts`); process 0 knows
        self.model: nn.Module = self.bare
        if options.compile:
            self.model = torch.compile(self.bare)  # type: ignore[assignment]
            task.compile()
        self.ema = MovingAverage(self.bare, options.ema_decay) if options.ema_decay is not None else None
        # Small gradients vanish in half precision unless they are scaled up, in autocast as on the wire.
        halves = options.amp_dtype == torch.float16 or (dist.world_size > 1 and options.comms_dtype == "fp16")
        self.scaler = torch.amp.GradScaler(dist.device.type, enabled=halves)
        self.steps_per_epoch = 1 if train is None else train.plan.steps
        self.state, self.meter = State(), Meter()
        self.last: dict[str, Any] = {}
        self.began = time.monotonic()  # of the seconds that are not yet in the state

    # ---- a whole run ----------------------------------------------------------------------------------------------

    def fit(self) -> None:
        """Train to `max_epochs` from where the state stands. Raises NonFiniteError, UserError, StopRequested."""
        ended = self.state.step == self.steps_per_epoch  # an epoch whose evaluation was not done yet
        self.reporter.start(self.global_step, self.total_steps, again="epoch" if ended else "")
        self.watch.start(self.global_step)
        if self.is_done:
            self.reporter.info(f"All {self.options.max_epochs} epochs are done; nothing is left to train.")
            if self.folder.read_summary().get("status") != "finished":
                self._summary(status="finished", exit_reason="all epochs done")
            return
        if frozen := sum(p.numel() for p in self.bare.parameters() if not p.requires_grad):
            self.reporter.info(
                f"{frozen / 1e6:.2f} M parameters are frozen: they take a forward pass alone, about a third of the work of "
                "training them."
            )
        self._summary(status="running", exit_reason=None)
        assert self.train is not None
        start = self.state.epoch, self.state.step
        batches = self.train.batches(start, self.options.max_epochs, self.dist)
        while self.state.epoch < self.options.max_epochs:
            self.train_epoch(batches)
            self._finish_epoch()
        self._summary(status="finished", exit_reason="all epochs done")

    def validate_only(self) -> None:
        """Evaluate the run's newest checkpoint and note the figures, whatever the run's own end was."""
        self.reporter.start(self.global_step, self.total_steps, again="val")
        found = self.evaluate()
        if found is None:
            raise StopRequested(self._cause())
        self._note_evaluation(found)
        self._summary(status=self.folder.read_summary().get("status", "finished"))

    def train_epoch(self, batches: Iterator[Batch]) -> None:
        """The steps that are left of the current epoch."""
        options, epoch = self.options, self.state.epoch
        train_mode(self.model)
        interval = Interval()
        while self.state.step < self.steps_per_epoch:
            asked = time.monotonic()
            self.stop.set_phase("waiting for data", self.global_step)
            batch = next(batches)
            self.stop.set_phase("in a step", self.global_step)
            interval.waited += time.monotonic() - asked
            self.train_step(batch)
            self.stop.update_step_time(time.monotonic() - asked)
            self.state.step += 1
            interval.clips += len(batch) * self.dist.world_size

            last_of_epoch = self.state.step == self.steps_per_epoch
            log = self.global_step % options.log_freq == 0 or last_of_epoch
            save = due(self.global_step, options.save_every_steps)
            # Only what is written somewhere must be known at once.
            pictures = self._pictures_due(last_of_epoch)
            self.watch.hear(but=0 if log or save or pictures else 1)
            for name in pictures:
                self._pictures(batch, name)
            if log:
                check_loss_scale(self.scaler, self.global_step)
                figures = {
                    "loss": self.watch.loss,
                    "lr": self.optimizer.lr,
                    "grad_norm": self.watch.norm,
                } | interval.figures(self.dist.device)
                if options.peak_clips_per_second is not None:
                    figures["mfu"] = figures["clips_per_second"] / self.dist.world_size / options.peak_clips_per_second
                # What it took is of this start alone, and no part of where the run stands.
                self.last |= {name: value for name, value in figures.items() if name not in ("memory_gb", "mfu")}
                self.reporter.step(epoch, options.max_epochs, self.global_step, figures)
                interval = Interval()
            if self.watch.leaving:
                self.watch.hear()
                self._leave()
            if save and not last_of_epoch:
                self.save([])

    def train_step(self, batch: Batch) -> None:
        """One optimizer step on a batch, in the pieces that its source's plan says. What came of it, `watch` hears.

        Its gradient is that of the mean over the samples that count, of all pieces and processes together. A step without such
        samples changes nothing. Nothing here waits for the device.
        """
        options, clips = self.options, self.source_plan(batch).clips // self.dist.world_size
        short = len(batch) < clips
        batch = (batch.pad_to(clips) if short else batch).to(self.dist.device)
        self.optimizer.set_progress(self.global_step / self.total_steps)
        torch.manual_seed(int(keyed_rng(options.seed, MODEL_DRAW, self.global_step, self.dist.rank).integers(2**62)))
        pieces = batch.split(self.source_plan(batch).pieces)
        outputs: list[StepOutput] = []
        loss = torch.zeros((), dtype=torch.float64, device=self.dist.device)
        count = torch.zeros_like(loss)
        for number, piece in enumerate(pieces):
            with without_sync(self.model, skip=number < len(pieces) - 1):
                with self._autocast():
                    output = self.task.training_step(self.model, piece)
                # A batch that is not whole must not change the weights of any process: its gradients become NaN.
                share = math.nan if short else output.count / clips
                self.scaler.scale(output.loss * share).backward()
            outputs.append(output)
            loss += output.loss.detach().double() * output.count
            count += output.count
        total = count.clone()
        self.dist.all_reduce(total)
        self.scaler.unscale_(self.optimizer.optimizer)
        # The processes' gradients were averaged: what they sum to is divided by `world * clips`, and is to be by `total`.
        self.optimizer.scale_gradients(self.dist.world_size * clips / total.clamp(min=1))
        norm = full_tensor(nn.utils.clip_grad_norm_(self.optimizer.parameters(), options.gradient_clip or math.inf))
        step = posted(
            self.state.epoch,
            self.global_step + 1,
            batch,
            loss / count.clamp(min=1),
            norm,
            self.optimizer.lr,
            scaled=self.scaler.is_enabled(),
            count=count,
        )
        spoiled = self.watch.post(step, short, asked=self.stop.cause is not None) | ~norm.isfinite() | (total == 0)
        self.optimizer.step(spoiled)
        if self.scaler.is_enabled():
            self.scaler.update()
        for output in outputs:
            self.meter.add(batch.source, output.sums, output.count, skip_mask=spoiled)
        self.optimizer.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(skip_mask=spoiled)

    def evaluate(self) -> Evaluation | None:
        """Evaluate on the validation videos (the moving average of the weights, if there is one) and log the figures.

        None when a process was asked to stop before the end.
        """
        assert self.val is not None
        self.stop.set_phase("validating", self.global_step)
        batches = self.val.batches(self.dist, self.options.limit_val_batches)
        with self.ema.in_place() if self.ema is not None else contextlib.nullcontext(), summon_full_params(self.bare):
            found = evaluate(self.task, self.bare, batches, self.dist, self._autocast, self.stop)
        if found is None:
            return None
        self.watch.record(found.bad)
        metrics = found.figures | {"per_source": found.per_source}
        self.reporter.epoch("val", self._epoch_of_weights, self.global_step, metrics)
        splits = {split.name: split for split in self.val.dataset.splits}
        for source, made in found.predictions.items():
            made.segments = splits[source].segments(made.index)
            known = splits[source].dataset.names()  # fewer than the head has classes, when label sets share it
            known += [str(label) for label in range(len(known), made.scores.shape[1])]
            self.reporter.predictions(source, made, known, self.global_step)
        return found

    # ---- checkpoints ----------------------------------------------------------------------------------------------

    def save(self, also: list[str]) -> None:
        """Write `checkpoint.pt` (and further names) from process 0; what is split among the processes each writes by itself.

        Raises UserError, in all processes, when it cannot be written, and NonFiniteError for weights that must not be.
        """
        self.stop.set_phase("saving", self.global_step)
        check_finite(self.bare, self.dist, self.global_step)
        self._count_seconds()
        began = time.monotonic()
        meter = {s: {"count": n} | sums for s, (sums, n) in self.meter.totals(self.dist).items()}
        self.dist.run_on_all(self.folder.require_lock, only_main=True)
        state = {  # resuming.take_up puts it back
            "format": checkpoint.FORMAT,
            "experiment": experiment.written(self.experiment),
            "architecture": describe(self.bare),
            "model": self.bare.state_dict(),
            "ema": self.ema.average if self.ema is not None else None,
            "ema_steps": int(self.ema.steps) if self.ema is not None else 0,
            "sources": [source.note() for source in self.sources],
            "optimizer": self.optimizer.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.state.epoch,
            "step": self.state.step,
            "steps_per_epoch": self.steps_per_epoch,
            "best": self.state.best,
            "best_loss": self.state.best_loss,
            "best_epoch": self.state.best_epoch,
            "seconds": self.state.seconds,
            "skipped": self.watch.skipped,
            "meter": meter,
            "last": self.last,
        }
        folder = self.folder.checkpoints
        with checkpoint.report_write_errors(folder):
            state = checkpoint_shards.save_split(state, folder, self.global_step, self.dist)

        def write() -> None:
            with checkpoint.report_write_errors(folder):
                checkpoint.save(state, folder, also)

        self.dist.run_on_all(write, only_main=True)  # the others wait, so that nobody runs ahead
        self.stop.save_seconds, self.stop.saved_step = time.monotonic() - began, self.global_step

    def join_processes(self) -> None:
        """Train with the other processes from here on; all must have come this far, since it waits for them.

        Raises UserError, in all processes, when they did not resume from the same step.
        """
        check_same_step(self.dist, (self.state.epoch, self.state.step), self.folder.checkpoints)
        if self.options.strategy == "ddp":
            find_unused = has_unused_parameters(self.bare)
            self.model = wrap_ddp(self.model, self.dist, self.options.comms_dtype, find_unused)
        elif self.dist.world_size > 1:
            blocks = [part for part in self.bare.modules() if isinstance(part, (Block, CrossBlock))]
            apply_fsdp(self.bare, blocks, self.dist, self.options.comms_dtype, self.options.amp_dtype)
            self.optimizer.take_parameters(self.bare)
            if self.ema is not None:
                self.ema.take_parameters(self.bare)

    # ---- parts ----------------------------------------------------------------------------------------------------

    @property
    def is_done(self) -> bool:
        return self.state.epoch >= self.options.max_epochs

    @property
    def global_step(self) -> int:
        return self.state.epoch * self.steps_per_epoch + self.state.step

    @property
    def total_steps(self) -> int:
        return self.options.max_epochs * self.steps_per_epoch

    @property
    def _epoch_of_weights(self) -> int:
        """The last epoch, counted from 0, that the weights have seen steps of; between epochs, `state` is at the next one."""
        return self.state.epoch if self.state.step else max(0, self.state.epoch - 1)

    def source_plan(self, batch: Batch) -> SourcePlan:
        """How batches of its source are made."""
        assert self.train is not None
        return self.train.plan.sources[batch.source]

    def _finish_epoch(self) -> None:
        """Log the epoch's averages, validate if it is due, and save; afterwards the state stands before the next epoch."""
        epoch, step = self.state.epoch, self.global_step
        totals = self.meter.totals(self.dist)
        by_source = {source: averages({source: total}) for source, total in totals.items()}
        self.last |= averages(totals)
        figures = averages(totals) | {"per_source": by_source} | self.task.epoch_figures(self.bare)
        self.reporter.epoch("train", epoch, step, figures)
        also = []
        last_epoch = epoch + 1 == self.options.max_epochs
        every = self.options.val_epoch_freq
        if self.val is not None and (due(epoch + 1, every) or (every and last_epoch)):
            found = self.evaluate()
            if found is None:
                self._leave()
            self._note_evaluation(found)
            if self.state.update_best(found.figures):
                also.append(BEST)
        if due(epoch + 1, self.options.save_freq):
            also.append(f"checkpoint_{epoch + 1}.pt")
        self.state.epoch, self.state.step, self.meter = epoch + 1, 0, Meter()
        self.save(also)
        self._summary(status="running")

    def _leave(self) -> NoReturn:
        """Save and raise StopRequested, in all processes together."""
        cause = self._cause()
        self.save([])
        self._summary()
        raise StopRequested(cause, saved_step=self.global_step)

    def _cause(self) -> str:
        """Why all stop when at least one was asked to."""
        return next(cause for cause in self.dist.gather(self.stop.cause) if cause is not None)

    def _pictures_due(self, last_of_epoch: bool) -> list[str]:
        """Names of the pictures to make after this step."""
        epoch, every = self.state.epoch, self.options.pictures_every_epochs
        names = [f"epoch_{epoch:04d}"] if self.state.step == 1 and due(epoch, every) else []  # so many epochs are done
        return names + (["last"] if last_of_epoch and epoch + 1 == self.options.max_epochs and every else [])

    def _pictures(self, batch: Batch, name: str) -> None:
        with summon_full_params(self.bare):
            if self.dist.is_main:
                self.bare.eval()
                with self._autocast():
                    made = self.task.pictures(self.bare, batch.to(self.dist.device))
                train_mode(self.bare)
                if made is not None:
                    self.reporter.pictures(name, made, self.global_step)

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = self.options.amp_dtype
        return torch.autocast(self.dist.device.type, dtype=dtype, enabled=dtype is not None)

    def _note_evaluation(self, found: Evaluation) -> None:
        """Keep metrics with the epoch, counted from 1, of the weights that they are of; other runs' weights have none here."""
        self.last |= {f"val_{name}": value for name, value in found.figures.items()}
        if self.global_step:
            self.last["val_epoch"] = self._epoch_of_weights + 1

    def _count_seconds(self) -> None:
        """Add the time since the last count to the run's."""
        now = time.monotonic()
        self.state.seconds, self.began = self.state.seconds + now - self.began, now

    def _summary(self, **facts: Any) -> None:
        self._count_seconds()
        if self.dist.is_main:
            self.folder.write_summary(
                epochs=self.state.epoch,
                steps=self.global_step,
                best=self.state.best,
                best_epoch=self.state.best_epoch,
                last=self.last,
                clips_per_second=self.last.get("clips_per_second"),
                wall_time=round(self.state.seconds, 3),
                **self.stop.timings(),
                **facts,
            )
