"""The training loop: epochs of steps, validation, checkpoints, resuming.

A run starts from the first of these that exists: its own newest checkpoint (`Trainer.load_checkpoint`, even in the middle
of an epoch), pretrained weights, random weights.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from omnivision.checkpoint import checkpointer, sharded
from omnivision.checkpoint.pretrained import LoadReport
from omnivision.checkpoint.state_dict_file import describe_checkpoint
from omnivision.config.schema import TrainerSettings
from omnivision.data.batch import Batch
from omnivision.data.loader import TrainData, ValData
from omnivision.data.sampling import Draw, SourcePlan, keyed_rng
from omnivision.distributed.fsdp import apply_fsdp, full_tensor, summon_full_params
from omnivision.distributed.process_group import Dist, skip_gradient_sync, wrap_ddp
from omnivision.models.architecture import architecture_of, has_unused_parameters
from omnivision.models.classifier import train_mode
from omnivision.models.mae import CrossBlock
from omnivision.models.vit import Block
from omnivision.optim.ema import MovingAverage
from omnivision.optim.groups import ScheduledOptimizer
from omnivision.reporting.logs import BadSampleLedger
from omnivision.reporting.reporter import Reporter
from omnivision.reporting.run_directory import RunDir
from omnivision.tasks.base import StepOutput, Task
from omnivision.tasks.metrics import Meter, averages
from omnivision.training import resume_checks
from omnivision.training.evaluate import Evaluation, evaluate_model
from omnivision.training.online_eval import OnlineEval, plain_trunk
from omnivision.training.step_stats import (
    RunState,
    Step,
    StepStats,
    ThroughputMeter,
    check_loss_scale,
    is_due,
    require_finite_weights,
)
from omnivision.utils.errors import StopRequested, UserError
from omnivision.utils.io import BEST, LATEST, CorruptCheckpointError
from omnivision.utils.signals import StopSignal
from omnivision.utils.streams import format_count, plural

# Fields of RunState in checkpoints
PROGRESS_FIELDS = ("epoch", "step", "steps_per_epoch", "best", "best_loss", "best_epoch", "seconds")


@dataclass
class RunContext:
    """The environment of a trainer: process group, run directory, logs."""

    dist: Dist
    run_dir: RunDir
    reporter: Reporter
    ledger: BadSampleLedger
    stop: StopSignal = field(default_factory=StopSignal)
    averaged_checkpoints: list[LoadReport] = field(default_factory=list)  # set only for a learned average
    fingerprint: dict[str, Any] = field(default_factory=dict)  # the experiment's fingerprint; rank 0 only
    evaluation_settings: dict[str, Any] = field(default_factory=dict)  # how a video is evaluated
    peak_clips_per_second: float | None = None  # one device's peak, used for MFU


class Trainer:
    """Trains `model` on `task`; see `fit` and `validate_only`. It receives built objects and the settings of the loop."""

    def __init__(
        self,
        settings: TrainerSettings,
        context: RunContext,
        task: Task,
        model: nn.Module,
        optimizer: ScheduledOptimizer,
        train: TrainData | None,
        val: ValData | None,
        online_eval: OnlineEval | None = None,
        held_out: ValData | None = None,
    ) -> None:
        """Without `train`, the trainer only evaluates. `held_out` is evaluated before each validation."""
        self.settings = settings
        self.context = context
        self.task = task
        self.train_data, self.val_data = train, val
        self.online_eval, self.held_out_data = online_eval, held_out
        self.evaluation: dict[str, Any] = {}  # how the last one was made, for the summary
        self.raw_model: nn.Module = model.to(context.dist.device)
        self.model: nn.Module = self.raw_model  # compiled and wrapped
        if settings.compile:
            self.model = torch.compile(self.raw_model)  # type: ignore[assignment]
            task.compile()
        self.optimizer = optimizer
        self.ema = MovingAverage(self.raw_model, settings.ema_decay) if settings.ema_decay is not None else None
        # In fp16, small gradients underflow unless they are scaled, both in autocast and in communication.
        use_grad_scaler = self.amp_dtype == torch.float16 or (
            context.dist.world_size > 1 and self.comms_dtype == "fp16"
        )
        self.scaler = torch.amp.GradScaler(context.dist.device.type, enabled=use_grad_scaler)
        self.state = RunState(steps_per_epoch=1 if train is None else train.plan.steps)
        self.step_stats = StepStats(
            context.dist, context.ledger, context.run_dir, context.reporter.info, settings.max_skipped_steps
        )

    @functools.cached_property
    def amp_dtype(self) -> torch.dtype | None:
        return resolve_amp_dtype(self.settings, self.context.dist.device)

    @property
    def comms_dtype(self) -> str | None:
        return resolve_comms_dtype(self.settings, self.context.dist.device)

    @property
    def is_done(self) -> bool:
        return self.state.epoch >= self.settings.max_epochs

    @property
    def global_step(self) -> int:
        return self.state.global_step

    @property
    def total_steps(self) -> int:
        return self.settings.max_epochs * self.state.steps_per_epoch

    def source_plan(self, batch: Batch) -> SourcePlan:
        """Return the plan of the batch's source."""
        assert self.train_data is not None
        return self.train_data.plan.sources[batch.source]

    # ---- a whole run ----------------------------------------------------------------------------------------------

    def fit(self) -> None:
        """Train to `max_epochs`. Raises NonFiniteError, UserError, and StopRequested when asked to stop."""
        state, reporter = self.state, self.context.reporter
        epoch_ended = state.step == state.steps_per_epoch  # its evaluation was interrupted
        reporter.start(self.global_step, self.total_steps, replay="epoch" if epoch_ended else "")
        self.step_stats.start(self.global_step)
        if self.is_done:
            reporter.info(f"{plural(self.settings.max_epochs, 'epoch')} done; nothing is left to train.")
            if self.context.run_dir.read_summary().get("status") != "finished":
                self._write_summary(status="finished", exit_reason="all epochs done")
            return
        if frozen := sum(p.numel() for p in self.raw_model.parameters() if not p.requires_grad):
            reporter.info(
                f"{format_count(frozen)} parameters are frozen (forward pass only, about a third of the work)."
            )
        self._write_summary(status="running", exit_reason=None)
        assert self.train_data is not None
        start, dist = (state.epoch, state.step), self.context.dist
        batches = self.train_data.batches(start, self.settings.max_epochs, dist.rank, dist.world_size)
        while not self.is_done:
            self.train_epoch(batches)
            self._finish_epoch()
        self._write_summary(status="finished", exit_reason="all epochs done")

    def validate_only(self) -> None:
        """Evaluate the loaded weights and write the metrics; the summary keeps the run's status."""
        self.context.reporter.start(self.global_step, self.total_steps, replay="val")
        result = self.evaluate()
        if result is None:
            raise StopRequested(self._stop_cause())
        self._record_evaluation(result)
        self._write_summary(status=self.context.run_dir.read_summary().get("status", "finished"))

    def train_epoch(self, batches: Iterator[Batch]) -> None:
        """Run the remaining steps of the current epoch."""
        state = self.state
        stop = self.context.stop
        settings = self.settings
        train_mode(self.model)
        throughput = ThroughputMeter()
        while state.step < state.steps_per_epoch:
            start = time.monotonic()
            stop.set_phase("waiting for data", self.global_step)
            batch = next(batches)
            stop.set_phase("in a step", self.global_step)
            throughput.data_seconds += time.monotonic() - start
            self.train_step(batch)
            stop.update_step_time(time.monotonic() - start)
            state.step += 1
            throughput.clips += len(batch) * self.context.dist.world_size

            last_of_epoch = state.step == state.steps_per_epoch
            log = self.global_step % settings.logging.log_freq == 0 or last_of_epoch
            save = is_due(self.global_step, settings.checkpoint.save_every_steps)
            visualizations = self._due_visualizations(last_of_epoch)
            # Wait for the newest step only if something is written.
            self.step_stats.drain(keep_newest=0 if log or save or visualizations else 1)
            for name in visualizations:
                self._visualize(batch, name)
            if log:
                self._log_step(throughput)
                throughput = ThroughputMeter()
            if self.step_stats.stop_requested:
                self.step_stats.drain()
                self._save_and_stop()
            if save and not last_of_epoch:
                self.save_checkpoint()

    def train_step(self, batch: Batch) -> None:
        """Run one optimizer step with gradient accumulation; results go to `step_stats`.

        The gradient is that of the mean loss over the counted samples of all micro-batches and ranks. A step without counted
        samples changes nothing. Nothing here waits for the device.
        """
        dist, optimizer = self.context.dist, self.optimizer
        clips = self.source_plan(batch).clips_per_step // dist.world_size
        is_partial = len(batch) < clips
        batch = (batch.pad_to(clips) if is_partial else batch).to(dist.device, dist.copy_stream)
        optimizer.set_progress(self.global_step / self.total_steps)
        outputs, loss, count = self._backward(batch, clips)
        total = count.clone()
        dist.all_reduce(total)
        self.scaler.unscale_(optimizer.optimizer)
        # DDP divides by world_size * clips; rescale to `total`.
        optimizer.scale_gradients(dist.world_size * clips / total.clamp(min=1))
        max_norm = self.settings.optim.gradient_clip or math.inf
        grad_norm = full_tensor(nn.utils.clip_grad_norm_(optimizer.parameters(), max_norm))
        step = Step(
            epoch=self.state.epoch,
            number=self.global_step + 1,
            loss=loss / count.clamp(min=1),
            count=count,
            grad_norm=grad_norm,
            lr=optimizer.lr,
            paths=batch.paths,
            bad=batch.bad,
            is_partial=is_partial,
            stop_requested=self.context.stop.cause is not None,
            scaled=self.scaler.is_enabled(),
        )
        # A step whose scaled gradients overflow is also skipped, but not reported.
        skip_step = self.step_stats.submit(step) | ~grad_norm.isfinite() | (total == 0)
        optimizer.step(skip_step)
        if self.scaler.is_enabled():
            self.scaler.update()
        for output in outputs:
            self.state.meter.add(batch.source, output.sums, output.count, skip_step=skip_step)
        optimizer.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(skip_step)

    def _backward(self, batch: Batch, clips: int) -> tuple[list[StepOutput], Tensor, Tensor]:
        """Run forward and backward for each micro-batch; return the outputs, the sum of losses and the count (float64)."""
        rng = keyed_rng(self.settings.seed_value, Draw.MODEL, self.global_step, self.context.dist.rank)
        torch.manual_seed(int(rng.integers(2**62)))
        micro_batches = batch.split(self.source_plan(batch).micro_batches)
        outputs: list[StepOutput] = []
        loss = torch.zeros((), dtype=torch.float64, device=self.context.dist.device)
        count = torch.zeros_like(loss)
        for number, micro_batch in enumerate(micro_batches):
            with skip_gradient_sync(self.model, skip=number < len(micro_batches) - 1):
                with self._autocast():
                    output = self.task.training_step(self.model, micro_batch)
                self.scaler.scale(output.loss * (output.count / clips)).backward()
            outputs.append(output)
            logged = output.loss if output.logged_loss is None else output.logged_loss
            loss += logged.detach().double() * output.count
            count += output.count
        return outputs, loss, count

    def evaluate(self) -> Evaluation | None:
        """Evaluate the EMA if there is one, else the weights, on the validation videos, and log the metrics.

        Returns None when any rank was asked to stop before the end.
        """
        assert self.val_data is not None
        reporter = self.context.reporter
        self.context.stop.set_phase("validating", self.global_step)
        with (
            self.ema.swapped_in() if self.ema is not None else contextlib.nullcontext(),
            summon_full_params(self.raw_model),
        ):
            if not self._choose():
                return None
            result = self._evaluate(self.val_data, self.task.evaluation_step)
        if result is None:
            return None
        metrics = result.metrics | {"per_source": result.per_source}
        reporter.log_epoch("val", self.state.weights_epoch, self.global_step, metrics)
        splits = {split.name: split for split in self.val_data.dataset.splits}
        for source, predictions in result.predictions.items():
            predictions.segments = splits[source].segments(predictions.index)
            names = splits[source].dataset.names()  # may be fewer than the head's classes, if label sets share it
            names += [str(label) for label in range(len(names), predictions.scores.shape[1])]
            predictions.class_names = names
            reporter.save_predictions(source, predictions, self.global_step)
        return result

    def _choose(self) -> bool:
        """Evaluate the held-out part of the training split, if there is one, let the task choose by it, and log the metrics.

        Returns False when any rank was asked to stop before the end.
        """
        if self.held_out_data is None:
            return True
        result = self._evaluate(self.held_out_data, self.task.held_out_step)
        if result is None:
            return False
        metrics = self.task.choose(self.raw_model, result.metrics)
        self.context.reporter.log_epoch("held_out", self.state.weights_epoch, self.global_step, metrics)
        return True

    def _evaluate(self, data: ValData, step: Callable[[nn.Module, Batch], StepOutput]) -> Evaluation | None:
        """Evaluate the weights on some data; None when any rank was asked to stop before the end."""
        dist, splits = self.context.dist, data.dataset.splits
        batches = data.batches(self.settings.limit_val_batches, dist.rank, dist.world_size)
        label_types = {split.name: split.label_type for split in splits}
        stop = self.context.stop
        result = evaluate_model(step, self.raw_model, batches, dist, self._autocast, stop, label_types)
        if result is not None:
            self.step_stats.record_bad(result.bad)
        return result

    def _probe(self, online_eval: OnlineEval) -> None:
        """Probe the features of the EMA if there is one, else of the weights, and log the metrics."""
        stop = self.context.stop
        stop.set_phase("probing", self.global_step)
        start = time.monotonic()
        with self.ema.swapped_in() if self.ema is not None else contextlib.nullcontext():
            trunk = plain_trunk(self.raw_model)
            found = online_eval.evaluate(trunk, self.context.dist, self.amp_dtype, stop)
        if found is None:
            self._save_and_stop()
        metrics = found | {"seconds": time.monotonic() - start}
        self.context.reporter.log_epoch("online", self.state.weights_epoch, self.global_step, metrics)

    # ---- checkpoints ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the contents of a checkpoint. Collective."""
        state, ema = self.state, self.ema
        return {
            "format": checkpointer.FORMAT,
            "experiment": json.dumps(self.context.fingerprint, default=str),
            "architecture": architecture_of(self.raw_model),
            "model": self.raw_model.state_dict(),
            "ema": ema.average if ema is not None else None,
            "ema_steps": int(ema.steps) if ema is not None else 0,
            "sources": [report.identity() for report in self.context.averaged_checkpoints],
            "optimizer": self.optimizer.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            **{name: getattr(state, name) for name in PROGRESS_FIELDS},
            "skipped": self.step_stats.skipped,
            "meter": state.meter.all_gather_totals(self.context.dist),
            "last": state.last_metrics,
        }

    def load_state_dict(self, saved: dict[str, Any], path: Path, class_names: Sequence[Sequence[str]] = ()) -> None:
        """Resume from the contents of the checkpoint `path`. Evaluation needs only the weights.

        Raises UserError for a checkpoint of another model, optimizer, data or number of steps.
        """
        context, info = self.context, self.context.reporter.info
        if self.train_data is None:
            resume_checks.match_checkpoint_heads(saved, class_names, path, info)
        else:
            if context.fingerprint:
                allow_changes = self.settings.checkpoint.allow_changes
                resume_checks.check_same_experiment(saved["experiment"], context.fingerprint, path, allow_changes, info)
            resume_checks.check_same_steps(saved["steps_per_epoch"], self.state.steps_per_epoch, path)
        averaged = [report.identity() for report in context.averaged_checkpoints]
        resume_checks.check_same_averaged_checkpoints(saved["sources"], averaged, path)
        self._load_weights(saved, path)
        self._load_progress(saved)

    def _load_weights(self, saved: dict[str, Any], path: Path) -> None:
        """Load the model, the optimizer (if the run trains), the EMA and the loss scale."""
        checkpointer.load_model(self.raw_model, saved["model"], path)
        if self.train_data is not None:
            try:
                self.optimizer.load_state_dict(saved["optimizer"])
            except (ValueError, KeyError) as error:
                raise UserError(
                    f"{path} has the state of another optimizer ({error}): trainer.optim.optimizer, its options, layer_decay "
                    f"or trainer.freeze changed. {resume_checks.RESUME_HINT}"
                ) from None
        if self.ema is not None:
            resume_checks.load_ema(self.ema, saved, path)
        if self.scaler.is_enabled() and saved["scaler"]:  # empty if the checkpoint's run had no scaler
            self.scaler.load_state_dict(saved["scaler"])

    def _load_progress(self, saved: dict[str, Any]) -> None:
        # Older checkpoints lack best_loss and best_epoch.
        progress: dict[str, Any] = {name: saved.get(name) for name in PROGRESS_FIELDS}
        self.state = RunState(**progress, start_time=self.state.start_time, last_metrics=saved["last"])
        self.step_stats.skipped = saved["skipped"]
        if self.context.dist.is_main:  # the saved sums cover all ranks
            self.state.meter.load(saved["meter"])

    def save_checkpoint(self, aliases: Sequence[str] = ()) -> None:
        """Write `checkpoint.pt` and `aliases` from rank 0; each rank writes its own shards.

        Raises UserError on all ranks when it cannot be written, and NonFiniteError for weights that are not finite.
        """
        dist = self.context.dist
        run_dir = self.context.run_dir
        stop = self.context.stop
        stop.set_phase("saving", self.global_step)
        require_finite_weights(self.raw_model, dist, self.global_step)
        self.state.count_seconds()
        start = time.monotonic()
        dist.run_on_main(run_dir.require_lock)
        folder, state = run_dir.checkpoints, self.state_dict()
        with checkpointer.report_write_errors(folder):
            state = sharded.save_split(state, folder, self.global_step, dist)

        def write() -> None:
            with checkpointer.report_write_errors(folder):
                checkpointer.save(state, folder, list(aliases))

        dist.run_on_main(write)  # the others wait
        stop.save_seconds, stop.saved_step = time.monotonic() - start, self.global_step

    def load_checkpoint(self, class_names: Sequence[Sequence[str]] = ()) -> bool:
        """Resume from the newest complete checkpoint of the run directory; False when there is none.

        Args:
            class_names: one list per head. An evaluation matches heads to them; a run that trains must have the same names.

        Raises UserError when no checkpoint is complete, or when it belongs to another run (see `load_state_dict`).
        """
        folder, info = self.context.run_dir.checkpoints, self.context.reporter.info
        try:
            newest = checkpointer.load_newest(folder)
        except CorruptCheckpointError as error:
            raise UserError(
                f"No checkpoint of this run is complete: {error}. Restore a good file as {folder / LATEST}, or start a new run "
                "with another launcher.experiment_log_dir."
            ) from None
        if newest is None:
            return False
        saved, path, problems = newest
        for problem in problems:
            info(f"Skipped a corrupt checkpoint: {problem}")
        self.load_state_dict(saved, path, class_names)
        self.context.stop.saved_step = self.global_step
        info(f"Resumed from {path} ({describe_checkpoint(saved)})")
        return True

    def wrap_model(self) -> None:
        """Wrap the model in DDP or FSDP. Collective: blocks until all ranks call it.

        Raises UserError on all ranks when they did not resume from the same step.
        """
        dist = self.context.dist
        positions = dist.all_gather_object((self.state.epoch, self.state.step))
        if len(set(positions)) > 1:
            raise UserError(
                f"The ranks found different checkpoints in {self.context.run_dir.checkpoints}: (epoch, step) "
                f"{', '.join(map(str, positions))}. All ranks must see one directory. Set trainer.checkpoint.save_dir or "
                "launcher.experiment_log_dir.",
                on_all_ranks=True,
            )
        if self.settings.distributed.strategy == "ddp":
            find_unused = has_unused_parameters(self.raw_model)
            self.model = wrap_ddp(self.model, dist, self.comms_dtype, find_unused)
        elif dist.world_size > 1:
            blocks = [part for part in self.raw_model.modules() if isinstance(part, (Block, CrossBlock))]
            apply_fsdp(self.raw_model, blocks, dist, self.comms_dtype, self.amp_dtype)
            self.optimizer.rebind_parameters(self.raw_model)
            if self.ema is not None:
                self.ema.rebind_parameters(self.raw_model)

    # ---- parts ----------------------------------------------------------------------------------------------------

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = self.amp_dtype
        return torch.autocast(self.context.dist.device.type, dtype=dtype, enabled=dtype is not None)

    def _log_step(self, throughput: ThroughputMeter) -> None:
        check_loss_scale(self.scaler, self.global_step)
        dist, peak = self.context.dist, self.context.peak_clips_per_second
        metrics = {"loss": self.step_stats.loss, "lr": self.optimizer.lr, "grad_norm": self.step_stats.grad_norm}
        metrics |= throughput.metrics(dist.device)
        if peak is not None:
            metrics["mfu"] = metrics["clips_per_second"] / dist.world_size / peak
        # Leave out what is specific to this attempt.
        self.state.last_metrics |= {k: v for k, v in metrics.items() if k not in ("memory_gb", "mfu")}
        self.context.reporter.log_step(self.state.epoch, self.settings.max_epochs, self.global_step, metrics)

    def _finish_epoch(self) -> None:
        """Log the epoch's averages, validate if due, and save; `state` then points at the next epoch."""
        state, settings = self.state, self.settings
        epoch = state.epoch
        totals = state.meter.all_gather_totals(self.context.dist)
        by_source = {source: averages({source: total}) for source, total in totals.items()}
        state.last_metrics |= averages(totals)
        metrics = averages(totals) | {"per_source": by_source} | self.task.epoch_metrics(self.raw_model)
        self.context.reporter.log_epoch("train", epoch, self.global_step, metrics)
        aliases = []
        last_epoch, every = epoch + 1 == settings.max_epochs, settings.val_epoch_freq
        if self.val_data is not None and (is_due(epoch + 1, every) or (every and last_epoch)):
            result = self.evaluate()
            if result is None:
                self._save_and_stop()
            self._record_evaluation(result)
            if state.update_best(result.metrics):
                aliases.append(BEST)
        if is_due(epoch + 1, settings.checkpoint.save_freq):
            aliases.append(f"checkpoint_{epoch + 1}.pt")
        state.epoch = epoch + 1
        state.step = 0
        state.meter = Meter()
        self.save_checkpoint(aliases)
        self._write_summary(status="running")
        # After saving: a probe may take longer than a run has to stop.
        if self.online_eval is not None and (is_due(epoch + 1, settings.online_eval.every_epochs) or last_epoch):
            self._probe(self.online_eval)

    def _save_and_stop(self) -> NoReturn:
        """Save and raise StopRequested, on all ranks together."""
        cause = self._stop_cause()
        self.save_checkpoint()
        self._write_summary()
        raise StopRequested(cause, saved_step=self.global_step)

    def _stop_cause(self) -> str:
        """Return the cause of the stop request on the first rank that received one."""
        return next(
            cause for cause in self.context.dist.all_gather_object(self.context.stop.cause) if cause is not None
        )

    def _due_visualizations(self, last_of_epoch: bool) -> list[str]:
        """Return the names of the visualizations to make after this step."""
        epoch, every = self.state.epoch, self.settings.logging.pictures_every_epochs
        names = [f"epoch_{epoch:04d}"] if self.state.step == 1 and is_due(epoch, every) else []
        return names + (["last"] if last_of_epoch and epoch + 1 == self.settings.max_epochs and every else [])

    def _visualize(self, batch: Batch, name: str) -> None:
        with summon_full_params(self.raw_model):
            if self.context.dist.is_main:
                self.raw_model.eval()
                with self._autocast():
                    visualization = self.task.visualize(self.raw_model, batch.to(self.context.dist.device))
                train_mode(self.raw_model)
                if visualization is not None:
                    self.context.reporter.save_visualization(name, visualization, self.global_step)

    def _record_evaluation(self, result: Evaluation) -> None:
        """Store metrics with the epoch (from 1) of their weights; weights from another run have no epoch here."""
        self.evaluation = {
            "mode": self.settings.mode,
            "dtype": str(self.amp_dtype or torch.float32).removeprefix("torch."),
            "sources": sorted(result.per_source),
            "settings": self.context.evaluation_settings,
        }
        self.state.last_metrics |= {f"val_{name}": value for name, value in result.metrics.items()}
        if self.global_step:
            self.state.last_metrics["val_epoch"] = self.state.weights_epoch + 1

    def _write_summary(self, **facts: Any) -> None:
        state = self.state
        state.count_seconds()
        if self.context.dist.is_main:
            self.context.run_dir.write_summary(
                epochs=state.epoch,
                steps=self.global_step,
                best=state.best,
                best_epoch=state.best_epoch,
                last=state.last_metrics,
                clips_per_second=state.last_metrics.get("clips_per_second"),
                **({"evaluation": self.evaluation} if self.evaluation else {}),
                wall_time=round(state.seconds, 3),
                **self.context.stop.timings(),
                **facts,
            )


def resolve_amp_dtype(settings: TrainerSettings, device: torch.device) -> torch.dtype | None:
    """Return autocast's dtype, None if disabled; `auto` is bf16 if the device has it, else fp16 on GPUs, None on CPUs."""
    amp = settings.optim.amp
    if not amp.enabled:
        return None
    if amp.amp_dtype != "auto":
        return {"bfloat16": torch.bfloat16, "float16": torch.float16}[amp.amp_dtype]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported() else None


def resolve_comms_dtype(settings: TrainerSettings, device: torch.device) -> str | None:
    """Return the dtype for communicating gradients (None: fp32); `auto` is autocast's (fp16 gradients are scaled)."""
    dtype = settings.distributed.comms_dtype
    if dtype != "auto":
        return dtype
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(resolve_amp_dtype(settings, device) or torch.float32)
