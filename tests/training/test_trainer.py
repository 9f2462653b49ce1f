"""The loop, on made-up clips in this process: equivalences, checkpoints, validation, and what stops it."""

import contextlib
import dataclasses
import functools
import io
import json
import os
import signal
import unittest
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode

from omnivision.checkpoint import checkpointer
from omnivision.config import schema
from omnivision.data.batch import BadSample, Batch, Sample
from omnivision.data.catalog import Dataset, LabelSets
from omnivision.data.loader import LoaderConfig, TrainData, ValData
from omnivision.data.masking import RandomMask
from omnivision.data.mixing import MixupCutmix
from omnivision.data.sampling import EpochPlan, Request, SourcePlan, keyed_rng
from omnivision.distributed.process_group import Dist, RankInfo
from omnivision.models.classifier import VideoClassifier
from omnivision.models.mae import MaskedAutoencoder
from omnivision.models.vit import VisionTransformer
from omnivision.optim.groups import ScheduledOptimizer, parameter_groups
from omnivision.optim.schedules import WarmupCosine
from omnivision.reporting.logs import BadSampleLedger
from omnivision.reporting.reporter import Reporter
from omnivision.reporting.run_directory import RunDir
from omnivision.tasks.base import StepOutput, Task
from omnivision.tasks.classify import Classify
from omnivision.tasks.reconstruct import Reconstruct
from omnivision.training import build, preflight
from omnivision.training.evaluate import Evaluation
from omnivision.training.step_stats import RunState, Step
from omnivision.training.trainer import RunContext, Trainer
from omnivision.utils.errors import NonFiniteError, StopRequested, UserError
from tests.fixtures import Folder

TUBELET = (2, 8, 8)
NAN = float("nan")
Weights = dict[str, torch.Tensor]


class FakeSplit(list):
    """The samples of a split, with the attributes that a trainer reads."""

    label_type = "class"

    name, dataset = "noise", Dataset(name="noise", num_classes=2)


class NoiseDataset:
    """A dataset of clips made from their index, all of class 0 unless there are `labels`; `bad` ones have no views."""

    def __init__(self, size: int, bad: tuple[int, ...] = (), labels: Sequence[int] | None = None) -> None:
        self.splits, self.bad, self.seen = [FakeSplit(range(size))], bad, []
        self.labels = labels or [0] * size

    def __getitem__(self, request: Request) -> Sample:
        rng = keyed_rng(7, *request)
        number, path = request.sample_index, f"{request.sample_index}.mp4"
        self.seen.append((request.epoch, number))
        bad = [BadSample("noise", number, path, "why not")] if number in self.bad else []
        video = torch.from_numpy(rng.integers(0, 256, (1, 3, 4, 16, 16), dtype=np.uint8))[: not bad]
        mask = torch.from_numpy(RandomMask(0.5)((2, 2, 2), rng))[None][: not bad]
        return Sample(video, mask, self.labels[number], "noise", number, path, bad)


def classifier(folder: Path, labels: Sequence[int], mixing: MixupCutmix | None, **options: Any) -> Trainer:
    """A trainer of a tiny classifier in double precision, without drop path."""
    torch.manual_seed(0)
    model = VideoClassifier(VisionTransformer(24, 2, 2, num_frames=4, image_size=16, tubelet=TUBELET), [2]).double()
    if mixing is not None:  # in single precision
        model.register_forward_pre_hook(lambda module, inputs: (inputs[0].double(), *inputs[1:]))
    task = Classify(LabelSets([2], {"noise": 0}), mixing)
    return make_trainer(folder, NoiseDataset(12, labels=labels), model=model, task=task, **options)


def trainer_settings(amp_dtype: str | None = None, **changes: Any) -> schema.TrainerSettings:
    """Settings of two epochs; a change may name a setting of a group below `trainer`."""
    amp = schema.AmpSettings(enabled=amp_dtype is not None, amp_dtype=amp_dtype or "auto")
    groups = {
        "optim": schema.OptimSettings.model_construct(amp=amp),
        "distributed": schema.DistributedSettings.model_construct(strategy="ddp"),
        "logging": schema.LoggingSettings.model_construct(log_freq=1),
        "checkpoint": schema.CheckpointSettings.model_construct(allow_changes=False),
    }
    settings = schema.TrainerSettings.model_construct(
        max_epochs=2, seed_value=3, compile=False, max_skipped_steps=0, **groups
    )
    for owner in (settings, *groups.values()):
        for name in (
            type(owner).model_fields.keys() - vars(owner).keys() | changes.keys() & type(owner).model_fields.keys()
        ):
            setattr(owner, name, changes.get(name))
    return settings


def make_trainer(
    folder: Path,
    train: NoiseDataset | None = None,
    val: NoiseDataset | None = None,
    model: torch.nn.Module | None = None,
    task: Task | None = None,
    **options: Any,
) -> Trainer:
    """A trainer of a tiny autoencoder, batches of 4 of 12 clips, on one process."""
    if model is None:
        torch.manual_seed(0)
        trunk = VisionTransformer(24, 2, 2, num_frames=4, image_size=16, tubelet=TUBELET, drop_path=0.2)
        model = MaskedAutoencoder(trunk, {"width": 16, "depth": 1, "heads": 2})
    rule = schema.RuleSettings(scheduler={"_target_": "any"})
    groups = parameter_groups(model, {"lr": [rule]}, {"lr": [WarmupCosine(0.0, 1e-2, 0.0, 0.2)]})
    dist = Dist(RankInfo(), "cpu", None, timedelta(minutes=1))
    run_folder = RunDir(folder)
    run_folder.create()
    source = SourcePlan(12, 4, micro_batches=options.pop("micro_batches", 1))
    plan = EpochPlan({"noise": source}, seed=3, limit=options.pop("limit", None))
    ledger = BadSampleLedger(run_folder.logs / "bad_samples.jsonl", 12, budget=0.5)
    trainer = Trainer(
        trainer_settings(**options),
        RunContext(dist, run_folder, Reporter(run_folder, enabled=True, console=Console(file=io.StringIO())), ledger),
        task or Reconstruct(TUBELET),
        model,
        ScheduledOptimizer(model, groups, torch.optim.AdamW),
        TrainData(train or NoiseDataset(12), LoaderConfig(), plan),
        None if val is None else ValData(val, LoaderConfig(), videos_per_batch=4),
    )
    trainer.load_checkpoint()
    return trainer


class HostSyncRecorder(TorchDispatchMode):
    """Record operations that make the host wait for the device, since it needs their result."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function.overloadpacket)
        if name in ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.equal", "aten.unique_dim"):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


class Loop(Folder):
    def make(self, name: str, **options: Any) -> Trainer:
        trainer = make_trainer(self.folder / name, **options)
        self.addCleanup(trainer.context.reporter.close)
        return trainer

    def fit(self, name: str, **options: Any) -> Weights:
        return self.run_to_end(self.make(name, **options))

    def run_to_end(self, trainer: Trainer) -> Weights:
        trainer.fit()
        trainer.context.reporter.close()
        return trainer.raw_model.state_dict()

    def lines(self, name: str, event: str = "step", file: str = "metrics") -> list[dict]:
        lines = (self.folder / name / f"logs/{file}.jsonl").read_text().splitlines()
        return [line for line in map(json.loads, lines) if line["event"] == event]

    def summary(self, name: str) -> dict:
        return RunDir(self.folder / name).read_summary()

    def change_checkpoint(self, name: str, change: Callable[[dict], object]) -> None:
        """Change entries of `checkpoint.pt`, which has no manifest then."""
        path = self.folder / name / "checkpoints/checkpoint.pt"
        saved = checkpointer.safe_load(path)
        change(saved)
        path.unlink()  # the tensors are mapped from it
        torch.save(saved, path)
        path.with_name("checkpoint.pt.json").unlink(missing_ok=True)

    def assert_same(self, one: Weights, other: Weights, delta: float = 0.0) -> None:
        for name in one:
            self.assertLessEqual(float((one[name] - other[name]).detach().abs().max()), delta, name)

    # ---- equivalences ---------------------------------------------------------------------------------------------

    def test_interrupted_after_any_step_and_resumed_equals_uninterrupted(self):
        whole = self.fit("whole")
        for stop in range(1, 6):
            first = self.make(f"stopped_{stop}", save_every_steps=1)
            self.interrupt(first, "save_checkpoint", stop)
            with self.assertRaises(KeyboardInterrupt):
                first.fit()
            self.assert_same(whole, self.fit(f"stopped_{stop}"))
            self.assertEqual([line["step"] for line in self.lines(f"stopped_{stop}")], [1, 2, 3, 4, 5, 6])
        epochs = [[line["loss"] for line in self.lines(name, "epoch")] for name in ("whole", "stopped_2")]
        self.assertEqual(*epochs)

    def test_accumulated_equals_whole_batch(self):
        """Also where micro-batches hold unequal numbers of labelled samples, or none; with mixup and CutMix as well."""
        few = (0, -1, -1, 1, -1, -1, -1, 1, 0, 1, -1, -1)
        # Drop path draws by batch, so it is off. In double precision, because the gradient of the keys' bias is zero but for
        # rounding, and AdamW makes steps of rounding that it can see.
        for name, mixing, labels in (
            ("mae", None, None),
            ("few", None, few),
            ("few_mixed", MixupCutmix(), few),
            ("one", None, (-1, -1, -1, -1, 1, -1, -1, -1, -1, -1, -1, -1)),
            ("all_mixed", MixupCutmix(), (0, 1) * 6),
        ):
            results = []
            for count in (1, 2, 4):
                run = f"{name}_{count}"
                if labels is None:
                    trainer = self.make(run, micro_batches=count)
                    trainer.raw_model.double()
                    for block in trainer.raw_model.trunk.blocks:
                        block.drop_path.rate = 0.0
                else:
                    trainer = classifier(self.folder / run, labels, mixing, micro_batches=count)
                weights = self.run_to_end(trainer)
                logged = [(line["loss"], line.get("top1", 0.0)) for line in self.lines(run) + self.lines(run, "epoch")]
                results.append((weights, logged))
            for weights, logged in results[1:]:
                self.assert_same(results[0][0], weights, delta=1e-6)
                np.testing.assert_allclose(logged, results[0][1], atol=1e-5)

    def test_compiled_equals_eager(self):
        eager = self.fit("eager", max_epochs=1)
        # The real back end takes a minute to generate code; the capture, and so the same switch, is tested without it.
        compile_quickly = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
        with mock.patch("torch.compile", side_effect=compile_quickly) as compiled:
            self.assert_same(eager, self.fit("compiled", max_epochs=1, compile=True), delta=1e-5)
        self.assertEqual(compiled.call_count, 2, "the model, and the loss")

    def test_reduced_precision(self):
        for dtype in (None, "bfloat16", "float16"):
            trainer, seen = self.make(f"amp_{dtype}", limit=1, max_epochs=1, amp_dtype=dtype), set()
            layer = trainer.raw_model.trunk.blocks[0].mlp.fc1
            layer.register_forward_hook(lambda module, inputs, output, seen=seen: seen.add(output.dtype))
            self.run_to_end(trainer)
            self.assertEqual(seen, {getattr(torch, dtype or "float32")})
            self.assertTrue(
                all(p.dtype == torch.float32 and p.isfinite().all() for p in trainer.raw_model.parameters())
            )

    def test_gradients_are_clipped_and_their_norm_is_logged_unclipped(self):
        trainer, norms = self.make("clipped", gradient_clip=1e-3, limit=1, max_epochs=1), []
        step = trainer.optimizer.step

        def note(skip_step: torch.Tensor) -> None:
            norms.append(torch.stack([p.grad.norm() for p in trainer.optimizer.parameters()]).norm().item())
            step(skip_step)

        trainer.optimizer.step = note
        trainer.fit()
        self.assertAlmostEqual(norms[0], 1e-3, places=6)
        self.assertGreater(self.lines("clipped")[0]["grad_norm"], 1e-2)

    def test_a_step_without_labels_changes_nothing(self):
        trainer = classifier(self.folder / "none", [-1] * 12, None, ema_decay=0.5)
        before = {name: value.clone() for name, value in trainer.raw_model.state_dict().items()}
        self.assert_same(before, self.run_to_end(trainer))
        self.assertEqual([line["loss"] for line in self.lines("none")], [0.0] * 6)
        self.assertEqual(trainer.step_stats.skipped, 0)

    def test_step_never_waits_for_the_device(self):
        for name, options in (
            ("plain", {}),
            ("clipped", {"gradient_clip": 1.0, "ema_decay": 0.9}),
            ("micro_batches", {"micro_batches": 2}),
        ):
            trainer = self.make(name, **options)
            fused = functools.partial(torch.optim.AdamW, fused=True)
            trainer.optimizer = ScheduledOptimizer(trainer.raw_model, trainer.optimizer.groups, fused)
            batch = next(trainer.train_data.batches((0, 0), 1))
            with HostSyncRecorder() as recorder:
                trainer.train_step(batch)
            self.assertEqual(recorder.found, [])
        with HostSyncRecorder() as recorder:
            float(trainer.step_stats._pending[0][0].loss)
        self.assertEqual(recorder.found, ["aten._local_scalar_dense"], "it would be found")

    def test_limit_train_batches_limits_steps(self):
        data = NoiseDataset(12)
        self.fit("limited", train=data, limit=2)
        self.assertEqual([line["step"] for line in self.lines("limited")], [1, 2, 3, 4])
        self.assertEqual(len({video for epoch, video in data.seen if epoch == 0}), 8)

    # ---- checkpoints and what is resumed ----------------------------------------------------------------------------

    def test_periodic_and_best_checkpoints_are_kept(self):
        trainer = self.make("kept", val=NoiseDataset(5), val_epoch_freq=1, save_freq=2, max_epochs=4)
        losses = iter([NAN, 1.0, 2.0, 5.0])
        trainer.evaluate = lambda: Evaluation({"loss": next(losses)}, {}, {}, [])
        trainer.fit()
        folder = self.folder / "kept/checkpoints"
        names = {"best.pt": 2, "checkpoint.pt": 4, "checkpoint_2.pt": 2, "checkpoint_4.pt": 4, "previous.pt": 3}
        self.assertEqual({path.name: checkpointer.safe_load(path)["epoch"] for path in folder.glob("*.pt")}, names)
        self.assertEqual(self.summary("kept")["best"], 1.0)

    def test_ties_for_best_go_to_the_lower_loss_then_the_later_epoch(self):
        for best_epoch, best, evaluations in (
            (2, 50.0, [(50.0, 1.0), (50.0, 0.5), (50.0, 0.7)]),
            (3, 50.0, [(50.0, 0.5), (40.0, 0.1), (50.0, 0.5)]),
            (2, 60.0, [(50.0, 0.5), (60.0, 0.9), (50.0, 0.1)]),
            (1, 50.0, [(50.0, 0.5), (50.0, NAN), (NAN, 0.1)]),
            (2, 50.0, [(50.0, NAN), (50.0, NAN), (40.0, 0.1)]),
            (2, 1.0, [(None, 1.0), (None, 1.0), (None, 2.0)]),
        ):
            state, kept = RunState(), 0
            for state.epoch, (top1, loss) in enumerate(evaluations):
                if state.update_best({"loss": loss} if top1 is None else {"top1": top1, "loss": loss}):
                    kept = state.epoch + 1
            self.assertEqual((state.best_epoch, kept, state.best), (best_epoch, best_epoch, best))

    def test_best_metric_is_resumed_also_from_old_checkpoints(self):
        for number, loss in ((1, 0.5), (2, 0.9)):
            trainer = self.make("best", val=NoiseDataset(1), val_epoch_freq=1, max_epochs=number, limit=1)
            self.assertEqual(trainer.state.best, None if number == 1 else 50.0)
            trainer.evaluate = lambda loss=loss: Evaluation({"top1": 50.0, "loss": loss}, {}, {}, [])
            self.run_to_end(trainer)
            self.change_checkpoint("best", lambda saved: [saved.pop(key) for key in ("best_loss", "best_epoch")])
        self.assertEqual(checkpointer.safe_load(trainer.context.run_dir.checkpoints / "best.pt")["epoch"], 2)
        self.assertEqual(self.summary("best")["last"]["val_epoch"], 2)

    def test_loss_scale_is_resumed_and_may_start_late(self):
        self.fit("scale", max_epochs=1)
        trainer = self.make("scale", amp_dtype="float16")
        self.assertEqual((trainer.state.epoch, trainer.scaler.is_enabled()), (1, True))
        trainer.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        self.run_to_end(trainer)
        scale = self.make("scale", amp_dtype="float16", max_epochs=3).scaler
        self.assertEqual(scale.get_scale(), trainer.scaler.get_scale())

    def test_resuming_with_another_optimizer_or_step_count_is_refused(self):
        self.fit("run", max_epochs=1)
        with self.assertRaisesRegex(UserError, "trainer.limit_train_batches"):
            self.make("run", limit=2)
        with (
            mock.patch("torch.optim.AdamW", torch.optim.SGD),
            self.assertRaisesRegex(UserError, "trainer.optim.optimizer"),
        ):
            self.make("run")
        for damage in (
            lambda saved: saved["optimizer"]["param_groups"][0]["params"].pop(),
            lambda saved: saved["optimizer"].update(param_groups=[]),
            lambda saved: saved["optimizer"].pop("state"),
        ):
            self.change_checkpoint("run", damage)
            with self.assertRaisesRegex(UserError, "trainer.optim.optimizer"):
                self.make("run")

    def test_ranks_with_different_checkpoints_are_refused(self):
        trainer = self.make("apart")
        with mock.patch.object(trainer.context.dist, "all_gather_object", lambda place: [place, (1, 0)]):
            with self.assertRaisesRegex(UserError, r"\(0, 0\), \(1, 0\).*trainer\.checkpoint\.save_dir"):
                trainer.wrap_model()

    def test_previous_checkpoint_replaces_a_corrupt_one(self):
        whole, folder = self.fit("corrupt"), self.folder / "corrupt/checkpoints"
        (folder / "checkpoint.pt").write_bytes(b"junk")
        trainer = self.make("corrupt")
        self.assertEqual(trainer.state.epoch, 1)
        self.assertIn("checkpoint.pt", trainer.context.reporter.console.file.getvalue())
        self.assert_same(whole, self.run_to_end(trainer))
        for name in ("checkpoint.pt", "previous.pt"):
            (folder / name).write_bytes(b"junk")
        with self.assertRaisesRegex(UserError, "launcher.experiment_log_dir"):
            self.make("corrupt")

    def test_run_that_lost_its_directory_saves_nothing(self):
        trainer = self.make("lost")
        trainer.context.run_dir.lock()
        (self.folder / "lost/.lock").write_text(json.dumps({"token": "another's", "host": "elsewhere", "pid": 1}))
        with self.assertRaisesRegex(UserError, "elsewhere"):
            trainer.fit()
        self.assertIsNone(checkpointer.load_newest(trainer.context.run_dir.checkpoints))
        trainer.context.run_dir.unlock()

    def test_incomplete_summary_is_completed(self):
        self.fit("cut")
        RunDir(self.folder / "cut").write_summary(status="running")
        self.fit("cut")
        self.assertEqual(self.summary("cut")["status"], "finished")

    # ---- validation, visualizations, stopping -----------------------------------------------------------------------

    def test_validation_counts_each_readable_video_once(self):
        data = NoiseDataset(11, bad=(3, 9))
        trainer = self.make("val", val=data)
        trainer.context.reporter.start(0, 1)
        metrics = trainer.evaluate().metrics
        self.assertEqual(metrics["videos"], 9)
        self.assertEqual(sorted(video for _, video in data.seen), list(range(11)))
        self.assertEqual(len((self.folder / "val/logs/bad_samples.jsonl").read_text().splitlines()), 2)
        logged = self.lines("val", "epoch")[-1]
        self.assertEqual((logged["phase"], logged["videos"]), ("val", 9))
        self.assertAlmostEqual(logged["loss"], metrics["loss"])
        self.assertEqual(trainer.evaluate().metrics, metrics, "evaluating again gives the same")
        limited = self.make("limited", val=NoiseDataset(11), limit_val_batches=2)
        limited.context.reporter.start(0, 1)
        self.assertEqual(limited.evaluate().metrics["videos"], 8)

    def test_validate_only_leaves_the_weights_alone_and_can_be_stopped(self):
        before = self.fit("only", max_epochs=1)
        trainer = self.make("only", val=NoiseDataset(5), max_epochs=1)
        trainer.validate_only()
        self.assert_same(before, trainer.raw_model.state_dict())
        self.assertIn("val_loss", self.summary("only")["last"])
        trainer.context.stop.signals.append(signal.SIGTERM)
        with self.assertRaises(StopRequested) as ended:
            trainer.validate_only()
        self.assertIsNone(ended.exception.saved_step)

    def test_videos_that_vanish_during_evaluation_are_not_bad(self):
        class Vanishing(NoiseDataset):
            after, there, files = 0, (), 99

            def __getitem__(self, request: Request) -> Sample:
                sample = super().__getitem__(request)
                if request.sample_index < self.after or request.sample_index in self.there:
                    return sample
                bad = [
                    BadSample(
                        "noise", request.sample_index, f"{request.sample_index % self.files}.mp4", "gone", "val", True
                    )
                ]
                return dataclasses.replace(sample, video=sample.video[:0], mask=sample.mask[:0], bad=bad)

        few = (12, 13, 14, 15, 16)  # at least a batch: those before and after are not in a row
        for size, stops, facts in (
            (24, True, {"after": 4}),
            (16, False, {"after": 4}),
            (400, True, {}),
            (26, False, {"there": few}),
            (40, False, {"files": 2}),  # many segments of few files
        ):
            data = Vanishing(size)
            vars(data).update(facts)
            trainer = self.make(f"gone_{size}", val=data, max_epochs=1)
            trainer.context.reporter.start(0, 1)
            with self.assertRaisesRegex(UserError, "datasets.noise.prefix" if stops else "budget"):
                trainer.evaluate()
            if stops:
                self.assertEqual(len(trainer.step_stats.ledger), 0)
                self.assertLess(len(data.seen), 40, "it stops at once")

    def test_visualizations_are_saved_at_their_epochs(self):
        self.fit("seen", pictures_every_epochs=2, max_epochs=3)
        names = sorted(path.name for path in (self.folder / "seen/pictures").glob("*.png"))
        self.assertEqual(names, ["epoch_0000.png", "epoch_0002.png", "last.png"])

    def test_stop_request_saves_and_resuming_equals_uninterrupted(self):
        """In the second step of the second epoch, and in the second validation, which is repeated."""
        for name, after, step, options in (
            ("step", 17, 2, lambda: {}),
            ("validation", 16, 3, lambda: {"val_epoch_freq": 1, "val": NoiseDataset(11)}),
        ):
            whole = self.fit(f"{name}_whole", **options())
            trainer = self.make(name, **options())
            noise, given = (trainer.val_data or trainer.train_data).dataset, NoiseDataset.__getitem__

            def asking(
                dataset: NoiseDataset, request: Request, trainer=trainer, noise=noise, given=given, after=after
            ) -> Sample:
                if dataset is noise and len(noise.seen) == after:
                    trainer.context.stop.signals.append(signal.SIGUSR2)
                return given(dataset, request)

            with mock.patch.object(NoiseDataset, "__getitem__", asking), self.assertRaises(StopRequested) as ended:
                trainer.fit()
            trainer.context.reporter.close()
            self.assertEqual((ended.exception.cause, ended.exception.saved_step), ("SIGUSR2", trainer.global_step))
            self.assertEqual((trainer.state.epoch, trainer.state.step), (1, step))
            self.assert_same(whole, self.fit(name, **options()))
            for event in ("step", "epoch"):
                logs = [
                    [(e["phase"], e["step"], e["loss"]) for e in self.lines(n, event)] for n in (name, f"{name}_whole")
                ]
                self.assertEqual(*logs)

    # ---- EMA --------------------------------------------------------------------------------------------------------

    def test_ema_is_evaluated_saved_and_resumed(self):
        options = {"ema_decay": 0.5, "val_epoch_freq": 1}
        whole = self.make("ema", val=NoiseDataset(5), **options)
        self.run_to_end(whole)
        again = self.make("ema", val=NoiseDataset(5), **options)
        again.context.reporter.start(6, 6)
        self.assert_same(whole.ema.average, again.ema.average)
        own = {name: value.clone() for name, value in again.raw_model.state_dict().items()}
        averaged = again.evaluate().metrics["loss"]
        self.assertEqual(averaged, whole.state.last_metrics["val_loss"])
        self.assert_same(own, again.raw_model.state_dict())
        with again.ema.swapped_in():
            self.assertFalse(torch.equal(again.raw_model.trunk.norm.weight, own["trunk.norm.weight"]))
        again.ema = None
        self.assertNotEqual(again.evaluate().metrics["loss"], averaged)

    def test_ema_may_start_late_and_must_match_the_trained_parameters(self):
        weights = self.fit("late", max_epochs=1)
        trainer = self.make("late", ema_decay=0.5)
        self.assert_same({name: weights[name] for name in trainer.ema.average}, trainer.ema.average)
        self.fit("narrow", max_epochs=1, ema_decay=0.5)
        self.change_checkpoint("narrow", lambda saved: saved["ema"].pop("trunk.norm.weight"))
        with self.assertRaisesRegex(UserError, r"trunk\.norm\.weight.*trainer\.freeze"):
            self.make("narrow", ema_decay=0.5)

    def test_ema_decay_warms_up(self):
        """With the steps that were not skipped, also after an interruption and from checkpoints that lack their number."""

        def train(name: str, until: int = 6, decay: float = 0.9999) -> tuple[Trainer, Weights, dict[int, Weights]]:
            trainer = self.make(name, ema_decay=decay, max_skipped_steps=1, save_every_steps=1)
            start = {name: tensor.clone() for name, tensor in trainer.ema.average.items()}
            self.spoil(trainer, 2)
            self.interrupt(trainer, "train_step", until)
            seen = self.watch(trainer)
            with contextlib.suppress(KeyboardInterrupt):
                self.run_to_end(trainer)
            return trainer, start, seen

        for decay in (0.3, 0.9999):
            whole, expected, seen = train(f"whole_{decay}", decay=decay)
            for step, weights in sorted(seen.items()):
                if step != 2:
                    taken = step - (step > 2)
                    kept = min(decay, (1 + taken) / (10 + taken))
                    expected = {n: kept * average + (1 - kept) * weights[n] for n, average in expected.items()}
            self.assert_same(expected, whole.ema.average, delta=1e-6)
        for forget in (False, True):
            train(f"cut_{forget}", until=3)
            if forget:
                self.change_checkpoint(f"cut_{forget}", lambda saved: saved.pop("ema_steps"))
            trainer, _, _ = train(f"cut_{forget}")
            self.assertEqual(int(trainer.ema.steps), 5)
            self.assert_same(whole.ema.average, trainer.ema.average)

    # ---- what is not finite, and files that cannot be read ----------------------------------------------------------

    def spoil(self, trainer: Trainer, step: int, by: float = NAN) -> None:
        """Make the loss of a step NaN, or infinite, where its gradient is finite."""
        training_step = trainer.task.training_step

        def spoilt(model: torch.nn.Module, batch: Batch) -> StepOutput:
            output = training_step(model, batch)
            if trainer.global_step + 1 != step:
                return output
            loss = output.loss * by if by != by else output.loss + by
            sums = {name: value * by for name, value in output.sums.items()}
            return dataclasses.replace(output, loss=loss, sums=sums)

        trainer.task.training_step = spoilt

    def interrupt(self, trainer: Trainer, method: str, step: int) -> None:
        """Ctrl-C when a method is called after this step; a checkpoint is written first."""
        wrapped = getattr(trainer, method)

        def stopping(*arguments: Any) -> None:
            if method == "save_checkpoint":
                wrapped(*arguments)
            if trainer.global_step == step:
                raise KeyboardInterrupt
            if method != "save_checkpoint":
                wrapped(*arguments)

        setattr(trainer, method, stopping)

    def watch(self, trainer: Trainer) -> dict[int, Weights]:
        """The weights after each step, by number."""
        seen, train_step = {}, trainer.train_step

        def watched(batch: Batch) -> None:
            train_step(batch)
            seen[trainer.global_step + 1] = {
                name: value.clone() for name, value in trainer.raw_model.state_dict().items()
            }

        trainer.train_step = watched
        return seen

    def test_nonfinite_step_stops_before_the_weights_change(self):
        """Also when its result is read after the next step, and with optimizers that read the flag in other ways."""
        fused = functools.partial(torch.optim.AdamW, fused=True)
        for name, make in (("adamw", torch.optim.AdamW), ("fused", fused), ("sgd", torch.optim.SGD)):
            trainer = self.make(name, log_freq=100)
            trainer.optimizer = ScheduledOptimizer(trainer.raw_model, trainer.optimizer.groups, make)
            self.spoil(trainer, step=2)
            seen = self.watch(trainer)
            with self.assertRaisesRegex(NonFiniteError, r"Step 2 .*loss nan.*\.mp4"):
                trainer.fit()
            self.assertEqual(sorted(seen), [1, 2, 3])
            self.assert_same(seen[1], seen[2])
            with self.assertRaises(AssertionError):
                self.assert_same(seen[2], seen[3])
            for state in trainer.optimizer.optimizer.state.values():
                self.assertTrue(all(bool(value.isfinite().all()) for value in state.values() if value is not None))
            self.assertIsNone(checkpointer.load_newest(trainer.context.run_dir.checkpoints))

    def test_nonfinite_steps_up_to_the_limit_are_skipped_also_when_resumed(self):
        def train(name: str, limit: int = 2, until: int = 6) -> tuple[Trainer, dict[int, Weights]]:
            trainer = self.make(name, max_skipped_steps=limit, ema_decay=0.5)
            self.spoil(trainer, 2)
            self.spoil(trainer, 5, by=float("inf"))
            seen = self.watch(trainer)
            self.interrupt(trainer, "train_step", until)
            with contextlib.suppress(KeyboardInterrupt):
                self.run_to_end(trainer)
            return trainer, seen

        whole, seen = train("whole")
        for one, same in ((1, True), (2, False), (4, True), (5, False)):
            unchanged = all(torch.equal(seen[one][name], seen[one + 1][name]) for name in seen[one])
            self.assertEqual(unchanged, same, one)
        entries = self.lines("whole", "nonfinite", file="nonfinite")
        self.assertEqual([(entry["step"], entry["epoch"], entry["rank"]) for entry in entries], [(2, 0, 0), (5, 1, 0)])
        self.assertEqual(len(set(entries[0]["samples"])), 4)
        losses = [step["loss"] for step in self.lines("whole")]
        for line in self.lines("whole", "epoch"):
            others = [loss for loss in losses[3 * line["epoch"] : 3 * line["epoch"] + 3] if loss is not None]
            self.assertAlmostEqual(line["loss"], sum(others) / 2, delta=1e-6)
        self.assertIn("2 of at most 2", whole.context.reporter.console.file.getvalue())
        for until in (1, 2, 4, 5):
            train(f"cut_{until}", until=until)
            trainer, _ = train(f"cut_{until}")
            self.assert_same(whole.raw_model.state_dict(), trainer.raw_model.state_dict())
            self.assert_same(whole.ema.average, trainer.ema.average)
            self.assertEqual(trainer.step_stats.skipped, 2)
            again = self.lines(f"cut_{until}", "nonfinite", file="nonfinite")
            self.assertEqual([entry["step"] for entry in again], [2, 5], until)
        with self.assertRaisesRegex(NonFiniteError, "Step 5 .*trainer.max_skipped_steps"):
            train("one", limit=1)
        self.assertEqual(checkpointer.load_newest(self.folder / "one/checkpoints")[0]["epoch"], 1)

    def test_ranks_with_a_nonfinite_step_are_named(self):
        trainer = self.make("two")
        step = Step(0, 1, torch.tensor(2.0), 1, torch.tensor(NAN), 0.1, ["a.mp4"], [])
        for losses, named in (((2.0, NAN, 3.0), [1]), ((2.0, 3.0), [0, 1])):
            ranks = [(loss, NAN, [f"{rank}.mp4"]) for rank, loss in enumerate(losses)]
            with mock.patch.object(trainer.context.dist, "all_gather_object", return_value=ranks):
                trainer.step_stats.submit(step)
                with self.assertRaises(NonFiniteError) as raised:
                    trainer.step_stats.drain()
            self.assertEqual([rank for rank in range(3) if f"{rank}.mp4" in str(raised.exception)], named)

    def test_nonfinite_weights_are_not_saved(self):
        trainer = self.make("inf", save_every_steps=1)
        step = trainer.optimizer.step

        def overflow(skip_step: torch.Tensor) -> None:
            step(skip_step)
            if trainer.global_step == 1:
                with torch.no_grad():
                    trainer.raw_model.heads[0].projector.bias[0] = float("inf")

        trainer.optimizer.step = overflow
        with self.assertRaisesRegex(NonFiniteError, "trainer.optim.gradient_clip"):
            trainer.fit()
        self.assertEqual(checkpointer.load_newest(trainer.context.run_dir.checkpoints)[0]["step"], 1)

    def test_fp16_overflow_at_every_scale_stops(self):
        trainer = self.make("half", amp_dtype="float16", max_epochs=40)
        training_step = trainer.task.training_step

        def overflowing(model: torch.nn.Module, batch: Batch) -> StepOutput:
            output = training_step(model, batch)
            # The loss is finite, its gradient is not.
            with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor * float("inf")):
                return dataclasses.replace(output, loss=output.loss * model.heads[0].projector.bias[0].exp())

        trainer.task.training_step = overflowing
        before = {name: value.clone() for name, value in trainer.raw_model.state_dict().items()}
        with self.assertRaisesRegex(NonFiniteError, "amp_dtype=bfloat16"):
            trainer.fit()
        self.assert_same(before, trainer.raw_model.state_dict())

    def test_partial_batch_stops_and_names_the_ledger(self):
        for count, bad in ((1, (0,)), (4, tuple(range(12)))):
            trainer = self.make(f"partial_{count}", train=NoiseDataset(12, bad=bad), log_freq=100)
            before = {name: value.clone() for name, value in trainer.raw_model.state_dict().items()}
            with self.assertRaisesRegex(UserError, rf"{count} files of one batch .*bad_samples\.jsonl"):
                trainer.fit()
        self.assert_same(before, trainer.raw_model.state_dict())  # the first batch was the partial one

    def test_compiling_without_a_compiler_is_refused(self):
        from torch._dynamo.exc import TorchDynamoException
        from torch._inductor import config, cpp_builder

        self.addCleanup(cpp_builder.cpp_compiler_search.cache_clear)
        for compiler in ("no-such-compiler", "false"):
            cpp_builder.cpp_compiler_search.cache_clear()
            with (
                mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=str(self.folder / compiler)),
                config.patch({"cpp.cxx": (None, compiler)}),
                self.assertRaisesRegex(UserError, f"trainer.compile(.|\n)*{compiler}"),
            ):
                preflight.check_compiler(torch.device("cpu"))
        error = TorchDynamoException("CppCompileError: see below\nx.cpp:27:10: fatal error: Python.h: No such file")
        with mock.patch("torch.compile", return_value=mock.Mock(side_effect=error)):
            with self.assertRaisesRegex(UserError, "trainer.compile.*Python.h"):
                preflight.check_compiler(torch.device("cpu"))
        settings = mock.Mock()
        settings.launcher.gpus_per_node = 2
        with (
            mock.patch.object(preflight, "check_compiler") as tried,
            mock.patch.object(build, "build_meta_model", lambda _: None),
        ):
            for local_rank in (0, 1, 2):  # one rank of a node tries it
                preflight.check_device(settings, torch.device("cpu"), local_rank)
        tried.assert_called_once_with(torch.device("cpu"))


if __name__ == "__main__":
    unittest.main()
