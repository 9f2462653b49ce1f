"""The loop, on made-up clips in this process: equivalences, checkpoints, validation, and what stops it."""

import contextlib
import dataclasses
import functools
import io
import json
import os
import signal
import tempfile
import unittest
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode

from omnivision.checkpoint import checkpointer as checkpoint
from omnivision.config.schema import (
    AmpSettings,
    CheckpointSettings,
    DistributedSettings,
    LoggingSettings,
    OptimSettings,
    RuleSettings,
    TrainerSettings,
)
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
from omnivision.training import build
from omnivision.training.evaluate import Evaluation
from omnivision.training.step_stats import Step
from omnivision.training.trainer import RunContext, Trainer
from omnivision.utils.errors import NonFiniteError, StopRequested, UserError

TUBELET = (2, 8, 8)


class Named(list):
    """The samples of a split, with what a trainer asks of it."""

    name, dataset = "noise", Dataset(name="noise", num_classes=2)


class Noise:
    """A dataset of clips made from their index, all of class 0 unless there are `labels`; `bad` ones have no views."""

    def __init__(self, size: int, bad: tuple[int, ...] = (), labels: Sequence[int] | None = None) -> None:
        self.splits, self.bad, self.seen = [Named(range(size))], bad, []
        self.labels = labels or [0] * size

    def __getitem__(self, request: Request) -> Sample:
        rng = keyed_rng(7, *request)
        self.seen.append((request.epoch, request.video))
        bad = (
            [BadSample("noise", request.video, f"{request.video}.mp4", "why not")] if request.video in self.bad else []
        )
        views = 0 if bad else 1
        video = torch.from_numpy(rng.integers(0, 256, (1, 3, 4, 16, 16), dtype=np.uint8))
        mask = torch.from_numpy(RandomMask(0.5)((2, 2, 2), rng))[None]
        return Sample(
            video[:views], mask[:views], self.labels[request.video], "noise", request.video, f"{request.video}.mp4", bad
        )


def classifier(folder: Path, labels: Sequence[int], mixing: MixupCutmix | None, **options: Any) -> Trainer:
    """A trainer of a tiny classifier in double precision, without drop path."""
    torch.manual_seed(0)
    model = VideoClassifier(VisionTransformer(24, 2, 2, num_frames=4, image_size=16, tubelet=TUBELET), [2]).double()
    if mixing is not None:  # in single precision
        model.register_forward_pre_hook(lambda module, inputs: (inputs[0].double(), *inputs[1:]))
    task = Classify(LabelSets([2], {"noise": 0}), mixing)
    return trainer(folder, Noise(12, labels=labels), model=model, task=task, **options)


def trainer_settings(amp_dtype: str | None = None, **changes: Any) -> TrainerSettings:
    """Settings of two epochs; a change may name a setting of a group below `trainer`."""
    groups = {
        "optim": OptimSettings.model_construct(
            gradient_clip=None, amp=AmpSettings(enabled=amp_dtype is not None, amp_dtype=amp_dtype or "auto")
        ),
        "distributed": DistributedSettings.model_construct(strategy="ddp", comms_dtype=None),
        "logging": LoggingSettings.model_construct(log_freq=1, pictures_every_epochs=None),
        "checkpoint": CheckpointSettings.model_construct(save_freq=None, save_every_steps=None, allow_changes=False),
    }
    settings = TrainerSettings.model_construct(
        max_epochs=2, seed_value=3, val_epoch_freq=None, limit_val_batches=None, compile=False, ema_decay=None,
        max_skipped_steps=0, **groups,
    )  # fmt: skip
    for name, value in changes.items():
        owner = next(each for each in (settings, *groups.values()) if name in type(each).model_fields)
        setattr(owner, name, value)
    return settings


def trainer(
    folder: Path,
    train: Noise | None = None,
    val: Noise | None = None,
    model: torch.nn.Module | None = None,
    task: Task | None = None,
    **options: Any,
) -> Trainer:
    """A trainer of a tiny autoencoder, batches of 4 of 12 clips, on one process."""
    if model is None:
        torch.manual_seed(0)
        trunk = VisionTransformer(24, 2, 2, num_frames=4, image_size=16, tubelet=TUBELET, drop_path=0.2)
        model = MaskedAutoencoder(trunk, {"width": 16, "depth": 1, "heads": 2})
    rule = RuleSettings(scheduler={"_target_": "any"})
    groups = parameter_groups(model, {"lr": [rule]}, {"lr": [WarmupCosine(0.0, 1e-2, 0.0, 0.2)]})
    dist = Dist(RankInfo(), "cpu", None, timedelta(minutes=1))
    run_folder = RunDir(folder)
    run_folder.create()
    source = SourcePlan(12, 4, micro_batches=options.pop("micro_batches", 1))
    plan = EpochPlan({"noise": source}, seed=3, limit=options.pop("limit", None))
    ledger = BadSampleLedger(run_folder.logs / "bad_samples.jsonl", 12, budget=0.5)
    made = Trainer(
        trainer_settings(**options),
        RunContext(dist, run_folder, Reporter(run_folder, enabled=True, console=Console(file=io.StringIO())), ledger),
        task or Reconstruct(TUBELET),
        model,
        ScheduledOptimizer(model, groups, torch.optim.AdamW),
        TrainData(train or Noise(12), LoaderConfig(), plan),
        None if val is None else ValData(val, LoaderConfig(), videos_per_batch=4),
    )
    made.load_checkpoint()
    return made


class Waits(TorchDispatchMode):
    """Notes the operations whose result the host needs before it can go on: an accelerator would stand still."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function.overloadpacket)
        if name in ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.equal", "aten.unique_dim"):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


class Loop(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.folder = Path(temporary.name)

    def lines(self, name: str) -> list[dict]:
        return [json.loads(line) for line in (self.folder / name / "logs/metrics.jsonl").read_text().splitlines()]

    def fit(self, name: str, **options: Any) -> dict[str, torch.Tensor]:
        made = trainer(self.folder / name, **options)
        made.fit()
        made.run.reporter.close()
        return made.raw_model.state_dict()

    def assert_same(self, one: dict, other: dict, delta: float = 0.0) -> None:
        for name in one:
            self.assertLessEqual(float((one[name] - other[name]).detach().abs().max()), delta, name)

    def test_interrupted_after_any_step_and_resumed_equals_uninterrupted(self):
        whole = self.fit("whole")
        for stop in range(1, 6):
            name = f"stopped_{stop}"
            first = trainer(self.folder / name, save_every_steps=1)
            save, saves = first.save_checkpoint, []

            def save_and_stop(aliases: Sequence[str] = (), save=save, saves=saves, stop=stop, first=first) -> None:
                save(aliases)
                saves.append(first.global_step)
                if first.global_step == stop:
                    raise KeyboardInterrupt

            first.save_checkpoint = save_and_stop
            with self.assertRaises(KeyboardInterrupt):
                first.fit()
            self.assert_same(whole, self.fit(name))
            steps = [line["step"] for line in self.lines(name) if line["event"] == "step"]
            self.assertEqual(steps, [1, 2, 3, 4, 5, 6])
        epochs = [[line["loss"] for line in self.lines(n) if line["event"] == "epoch"] for n in ("whole", "stopped_2")]
        self.assertEqual(*epochs)

    def test_accumulated_equals_whole_batch(self):
        # Drop path draws by batch, so it is off here. In double precision, because the gradient of the keys' bias is zero but
        # for rounding, and AdamW makes steps of rounding that it can see.
        results = []
        for micro_batches in (1, 2, 4):
            made = trainer(self.folder / f"pieces_{micro_batches}", micro_batches=micro_batches)
            made.raw_model.double()
            for block in made.raw_model.trunk.blocks:
                block.drop_path.rate = 0.0
            made.fit()
            results.append(made.raw_model.state_dict())
        self.assert_same(results[0], results[1], delta=1e-6)
        self.assert_same(results[0], results[2], delta=1e-6)

    def test_accumulated_labels_equal_whole_batch(self):
        """Where micro-batches hold unequal numbers of labelled samples, or none; with mixup and CutMix as well."""
        for name, mixing, labels in (
            ("plain", None, (0, -1, -1, 1, -1, -1, -1, 1, 0, 1, -1, -1)),
            ("mixed", MixupCutmix(), (0, -1, -1, 1, -1, -1, -1, 1, 0, 1, -1, -1)),
            ("one", None, (-1, -1, -1, -1, 1, -1, -1, -1, -1, -1, -1, -1)),
            ("all", MixupCutmix(), (0, 1) * 6),
        ):
            results = []
            for micro_batches in (1, 2, 4):
                made = classifier(self.folder / f"{name}_{micro_batches}", labels, mixing, micro_batches=micro_batches)
                made.fit()
                made.run.reporter.close()
                logged = [(line["loss"], line.get("top1", 0.0)) for line in self.lines(f"{name}_{micro_batches}")]
                results.append((made.raw_model.state_dict(), logged))
            for weights, logged in results[1:]:
                self.assert_same(results[0][0], weights, delta=1e-6)
                for wanted, got in zip(results[0][1], logged, strict=True):
                    for one, other in zip(wanted, got, strict=True):
                        self.assertAlmostEqual(one, other, places=5)

    def test_a_step_without_labels_changes_nothing(self):
        made = classifier(self.folder / "none", [-1] * 12, None, ema_decay=0.5)
        before = {name: value.clone() for name, value in made.raw_model.state_dict().items()}
        made.fit()
        made.run.reporter.close()
        self.assert_same(before, made.raw_model.state_dict())
        self.assertEqual([line["loss"] for line in self.lines("none") if line["event"] == "step"], [0.0] * 6)
        self.assertEqual(made.step_stats.skipped, 0)

    def test_limit_means_that_many_steps(self):
        data = Noise(12)
        self.fit("limited", train=data, limit=2)
        self.assertEqual([line["step"] for line in self.lines("limited") if line["event"] == "step"], [1, 2, 3, 4])
        self.assertEqual(len({video for epoch, video in data.seen if epoch == 0}), 8)

    def test_gradients_are_clipped_and_their_norm_is_logged_unclipped(self):
        made = trainer(self.folder / "clipped", gradient_clip=1e-3, limit=1, max_epochs=1)
        norms = []
        step = made.optimizer.step
        made.optimizer.step = lambda *a, **k: (
            norms.append(torch.stack([p.grad.norm() for p in made.optimizer.parameters()]).norm().item()),
            step(*a, **k),
        )[1]
        made.fit()
        self.assertAlmostEqual(norms[0], 1e-3, places=6)
        self.assertGreater(self.lines("clipped")[0]["grad_norm"], 1e-2)

    def test_kept_checkpoints_and_the_best(self):
        made = trainer(self.folder / "kept", val=Noise(5), val_epoch_freq=1, save_freq=2, max_epochs=4)
        losses = iter([float("nan"), 1.0, 2.0, 5.0])
        made.evaluate = lambda: Evaluation({"loss": next(losses)}, {}, {}, [])
        made.fit()
        folder = self.folder / "kept" / "checkpoints"
        self.assertEqual(
            sorted(path.name for path in folder.glob("*.pt")),
            ["best.pt", "checkpoint.pt", "checkpoint_2.pt", "checkpoint_4.pt", "previous.pt"],
        )
        self.assertEqual(checkpoint.safe_load(folder / "best.pt")["epoch"], 2)
        self.assertEqual(checkpoint.safe_load(folder / "checkpoint_4.pt")["epoch"], 4)
        self.assertEqual(json.loads((self.folder / "kept/summary.json").read_text())["best"], 1.0)

    def best_of(self, name: str, *figures: dict[str, float], **old: None) -> tuple[int, dict]:
        """The epoch of best.pt, and the summary, of a run that is stopped and resumed after each of these evaluations.

        `old` replaces entries of each checkpoint; None removes them.
        """
        for number in range(1, len(figures) + 1):
            made = trainer(self.folder / name, val=Noise(1), val_epoch_freq=1, max_epochs=number, limit=1)
            made.evaluate = lambda number=number: Evaluation(figures[number - 1], {}, {}, [])
            made.fit()
            made.run.reporter.close()
            if old:
                latest = made.run.directory.checkpoints / "checkpoint.pt"
                kept = {key: value for key, value in checkpoint.safe_load(latest).items() if key not in old}
                checkpoint.save(kept, made.run.directory.checkpoints, [])
        best = checkpoint.safe_load(made.run.directory.checkpoints / "best.pt")
        return best["epoch"], json.loads((made.run.directory.path / "summary.json").read_text())

    def test_ties_of_the_best_go_to_the_lower_loss_then_to_the_later_epoch(self):
        nan = float("nan")
        for name, epoch, figures in (
            ("loss", 2, [(50.0, 1.0), (50.0, 0.5), (50.0, 0.7)]),
            ("later", 3, [(50.0, 0.5), (40.0, 0.1), (50.0, 0.5)]),
            ("higher", 2, [(50.0, 0.5), (60.0, 0.9), (50.0, 0.1)]),
            ("nan", 1, [(50.0, 0.5), (50.0, nan), (nan, 0.1)]),
            ("all", 2, [(50.0, nan), (50.0, nan), (40.0, 0.1)]),
        ):
            with self.subTest(name):
                best, summary = self.best_of(name, *({"top1": top1, "loss": loss} for top1, loss in figures))
                self.assertEqual(
                    (best, summary["best_epoch"], summary["best"]),
                    (epoch, epoch, max(f[0] for f in figures if f[0] == f[0])),
                )
                self.assertEqual(summary["last"]["val_epoch"], 3)

    def test_ties_of_losses_alone(self):
        best, summary = self.best_of("mae", {"loss": 1.0}, {"loss": 1.0}, {"loss": 2.0})
        self.assertEqual((best, summary["best_epoch"], summary["best"]), (2, 2, 1.0))

    def test_a_checkpoint_from_before_ties_were_broken_resumes(self):
        best, summary = self.best_of(
            "old", {"top1": 50.0, "loss": 0.5}, {"top1": 50.0, "loss": 0.9}, best_loss=None, best_epoch=None
        )
        self.assertEqual((best, summary["best_epoch"]), (2, 2))

    def test_validation_counts_every_good_video_once(self):
        data = Noise(11, bad=(3, 9))
        made = trainer(self.folder / "val", val=data)
        made.run.reporter.start(0, 1)
        self.addCleanup(made.run.reporter.close)
        figures = made.evaluate().metrics
        self.assertEqual(figures["videos"], 9)
        self.assertEqual(sorted(video for _, video in data.seen), list(range(11)))
        self.assertEqual(len((self.folder / "val/logs/bad_samples.jsonl").read_text().splitlines()), 2)
        logged = self.lines("val")[-1]
        self.assertEqual((logged["phase"], logged["videos"]), ("val", 9))
        self.assertAlmostEqual(logged["loss"], figures["loss"])
        self.assertEqual(made.evaluate().metrics, figures, "evaluating again gives the same")

    def test_validate_only_leaves_the_weights_alone(self):
        before = self.fit("only", max_epochs=1)
        made = trainer(self.folder / "only", val=Noise(5), max_epochs=1)
        self.addCleanup(made.run.reporter.close)
        made.validate_only()
        self.assert_same(before, made.raw_model.state_dict())
        self.assertIn("val_loss", json.loads((self.folder / "only/summary.json").read_text())["last"])

    def test_a_disk_that_fills_up_is_told(self):
        made = trainer(self.folder / "full", max_epochs=1)
        self.addCleanup(made.run.reporter.close)
        with mock.patch("torch.save", side_effect=OSError(28, "No space left on device")):
            with self.assertRaisesRegex(
                UserError, "could not be written to .*: No space left on device .*GB.*save_dir"
            ):
                made.fit()

    def test_films_that_vanish_while_they_are_evaluated_are_none_that_are_bad(self):
        class Gone(Noise):
            def __getitem__(self, request: Request) -> Sample:
                sample = super().__getitem__(request)
                asked.append(request.video)
                gone = request.video >= after and request.video not in there
                path = f"{request.video % distinct}.mp4"
                bad = [BadSample("noise", request.video, path, "gone", "val", True)] if gone else []
                return dataclasses.replace(
                    sample, video=sample.video[: 1 - gone], mask=sample.mask[: 1 - gone], bad=bad
                )

        asked: list[int] = []
        few = (12, 13, 14, 15, 16)  # a batch of them at least: those before and after are not in a row
        for after, size, kept, stops, files in (
            (4, 24, (), True, 99),
            (4, 16, (), False, 99),
            (0, 400, (), True, 99),
            (0, 26, few, False, 99),
            (0, 40, (), False, 2),  # many segments of few files
        ):
            there, distinct = kept, files
            asked.clear()
            made = trainer(self.folder / f"gone_{after}_{size}", val=Gone(size), max_epochs=1)
            self.addCleanup(made.run.reporter.close)
            made.run.reporter.start(0, 1)
            if stops:
                self.assertRaisesRegex(UserError, "None of .* files in a row .* is there, e.g.", made.evaluate)
                self.assertEqual(len(made.step_stats.ledger), 0)
                self.assertLess(len(asked), 40, "it stops at once")
            else:
                with self.assertRaisesRegex(UserError, "budget"):
                    made.evaluate()

    def test_steps_run_in_the_precision_asked_for(self):
        for dtype in (None, "bfloat16"):
            made = trainer(self.folder / f"amp_{dtype}", limit=1, max_epochs=1, amp_dtype=dtype)
            seen: list[torch.dtype] = []
            made.raw_model.trunk.blocks[0].mlp.fc1.register_forward_hook(
                lambda m, a, out, seen=seen: seen.append(out.dtype)
            )
            made.fit()
            made.run.reporter.close()
            self.assertEqual(set(seen), {getattr(torch, dtype or "float32")})

    def test_compile_compiles(self):
        with mock.patch("torch.compile", side_effect=lambda model: model) as compiled:
            for on in (False, True):
                trainer(self.folder / "compiled", compile=on)
        self.assertEqual(compiled.call_count, 2, "the model, and the loss")

    def test_the_best_and_the_scale_are_resumed(self):
        losses, scale = iter([3.0, 2.0]), 1024.0
        for epochs, best in ((1, None), (2, 3.0)):
            made = trainer(self.folder / "best", val=Noise(3), max_epochs=epochs, val_epoch_freq=1, amp_dtype="float16")
            if best is None:
                made.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            self.assertEqual((made.state.best, made.scaler.get_scale()), (best, scale))
            made.evaluate = lambda: Evaluation({"loss": next(losses)}, {}, {}, [])
            made.fit()
            made.run.reporter.close()
            scale = made.scaler.get_scale()
        self.assertEqual(made.state.best, 2.0)

    def stopped(self, name: str, after: int, **options: Any) -> Trainer:
        """A run that is asked to stop while its dataset gives the sample number `after` to it."""
        made = trainer(self.folder / name, **options)
        noise = made.val.dataset if options.get("val") else made.train.dataset
        given = noise.__class__.__getitem__

        def asking(dataset: Noise, request: Request) -> Sample:
            if dataset is noise and len(noise.seen) == after:
                made.run.stop.signals.append(signal.SIGUSR2)
            return given(dataset, request)

        with mock.patch.object(Noise, "__getitem__", asking), self.assertRaises(StopRequested) as ended:
            made.fit()
        made.run.reporter.close()
        self.assertEqual((ended.exception.cause, ended.exception.saved_step), ("SIGUSR2", made.global_step))
        return made

    def test_asked_to_stop_it_ends_the_step_saves_and_goes_on_later(self):
        whole = self.fit("whole")
        made = self.stopped("asked", after=17)  # of the second step of the second epoch
        self.assertEqual((made.state.epoch, made.state.step), (1, 2))
        self.assert_same(whole, self.fit("asked"))
        self.assertEqual([line["step"] for line in self.lines("asked") if line["event"] == "step"], [1, 2, 3, 4, 5, 6])

    def test_asked_to_stop_while_it_validates_it_saves_and_validates_later(self):
        options = {"val_epoch_freq": 1, "val": Noise(11)}
        whole = self.fit("whole", **options)
        made = self.stopped("asked", after=16, **options | {"val": Noise(11)})  # in the second validation
        self.assertEqual((made.state.epoch, made.state.step), (1, 3), "the epoch is not finished")
        self.assert_same(whole, self.fit("asked", **options))
        told, wanted = (
            [(line["event"], line["phase"], line["step"]) for line in self.lines(n)] for n in ("asked", "whole")
        )
        self.assertEqual(told, wanted)
        averages = [[line["loss"] for line in self.lines(n) if line["event"] == "epoch"] for n in ("asked", "whole")]
        self.assertEqual(*averages)

    def test_an_evaluation_alone_that_is_asked_to_stop_leaves(self):
        self.fit("only", max_epochs=1)
        made = trainer(self.folder / "only", val=Noise(5), max_epochs=1)
        self.addCleanup(made.run.reporter.close)
        made.run.stop.signals.append(signal.SIGTERM)
        with self.assertRaises(StopRequested) as ended:
            made.validate_only()
        self.assertIsNone(ended.exception.saved_step)

    def test_limit_of_validation(self):
        made = trainer(self.folder / "limited_val", val=Noise(11), limit_val_batches=2)
        made.run.reporter.start(0, 1)
        self.addCleanup(made.run.reporter.close)
        self.assertEqual(made.evaluate().metrics["videos"], 8)

    def test_processes_that_found_different_checkpoints_stop(self):
        made = trainer(self.folder / "apart")
        with mock.patch.object(made.run.dist, "gather", lambda place: [place, (1, 0)]):
            with self.assertRaisesRegex(UserError, r"\(0, 0\), \(1, 0\).*trainer\.checkpoint\.save_dir"):
                made.wrap_model()
        made.wrap_model()

    def test_another_optimizer_is_told(self):
        self.fit("optimizer", max_epochs=1)
        with (
            mock.patch("torch.optim.AdamW", torch.optim.SGD),
            self.assertRaisesRegex(UserError, "trainer.optim.optimizer"),
        ):
            trainer(self.folder / "optimizer")

    def test_an_optimizers_state_that_does_not_fit_is_told(self):
        self.fit("groups", max_epochs=1)
        path = self.folder / "groups/checkpoints/checkpoint.pt"
        damages = {
            "no groups": lambda found: found["optimizer"].update(param_groups=[]),
            "no state": lambda found: found["optimizer"].pop("state"),
            "one parameter less": lambda found: found["optimizer"]["param_groups"][0]["params"].pop(),
        }
        whole = path.read_bytes()
        for name, damage in damages.items():
            with self.subTest(name):
                path.write_bytes(whole)
                found = checkpoint.safe_load(path)
                damage(found)
                path.unlink()
                torch.save(found, path)
                path.with_name("checkpoint.pt.json").unlink(missing_ok=True)
                with self.assertRaisesRegex(UserError, "trainer.optim.optimizer"):
                    trainer(self.folder / "groups")

    def test_steps_without_a_scaler_go_on_with_one(self):
        self.fit("unscaled", max_epochs=1)
        made = trainer(self.folder / "unscaled", amp_dtype="float16")
        self.assertEqual((made.state.epoch, made.scaler.is_enabled()), (1, True))
        made.fit()
        made.run.reporter.close()
        self.assertTrue(made.is_done)

    def test_a_moving_average_is_evaluated_kept_and_resumed(self):
        whole = trainer(self.folder / "ema", val=Noise(5), ema_decay=0.5, val_epoch_freq=1)
        whole.fit()
        whole.run.reporter.close()
        again = trainer(self.folder / "ema", val=Noise(5), ema_decay=0.5, val_epoch_freq=1)
        self.addCleanup(again.run.reporter.close)
        again.run.reporter.start(6, 6)
        self.assert_same(whole.ema.average, again.ema.average)
        own = {name: value.clone() for name, value in again.raw_model.state_dict().items()}
        averaged = again.evaluate().metrics["loss"]
        self.assertEqual(averaged, whole.state.last_metrics["val_loss"])
        self.assert_same(own, again.raw_model.state_dict())
        with again.ema.in_place():
            self.assertFalse(torch.equal(again.raw_model.trunk.norm.weight, own["trunk.norm.weight"]))
        again.ema = None
        self.assertNotEqual(again.evaluate().metrics["loss"], averaged)

    def test_the_decay_of_a_moving_average_warms_up(self):
        """With the steps that were taken, also after an interruption and from checkpoints that do not hold their number."""

        def train(name: str, until: int, forget: bool = False, decay: float = 0.9999) -> Trainer:
            file = self.folder / name / "checkpoints/checkpoint.pt"
            if forget:
                found = checkpoint.safe_load(file)
                del found["ema_steps"]
                file.unlink()
                torch.save(found, file)
                file.with_name("checkpoint.pt.json").unlink()
            made = trainer(self.folder / name, ema_decay=decay, max_skipped_steps=1, save_every_steps=1)
            self.spoil(made, 2)
            self.stop_after(made, until)
            averages.append(({n: p.clone() for n, p in made.ema.average.items()}, self.watch(made)))
            with contextlib.suppress(KeyboardInterrupt):
                made.fit()
            made.run.reporter.close()
            return made

        averages: list[tuple[dict, dict]] = []
        for decay in (0.9999, 0.3):
            whole = train(f"whole_{decay}", 6, decay=decay)
            expected, seen = averages.pop()
            for step, weights in sorted(seen.items()):
                if step != 2:
                    taken = step - (step > 2)
                    kept = min(decay, (1 + taken) / (10 + taken))
                    expected = {n: kept * average + (1 - kept) * weights[n] for n, average in expected.items()}
            self.assert_same(expected, whole.ema.average, delta=1e-6)
        for forget in (False, True):
            train(f"cut_{forget}", 3)
            made = train(f"cut_{forget}", 6, forget)
            self.assertEqual(int(made.ema.steps), 5)
            self.assert_same(train("whole_0.9999", 6).ema.average, made.ema.average)

    def test_a_moving_average_that_a_run_begins_late_begins_at_its_weights(self):
        weights = self.fit("late", max_epochs=1)
        made = trainer(self.folder / "late", ema_decay=0.5)
        self.assert_same({name: weights[name] for name in made.ema.average}, made.ema.average)

    def test_a_moving_average_of_other_weights_is_told(self):
        self.fit("narrow", max_epochs=1, ema_decay=0.5)
        path = self.folder / "narrow/checkpoints/checkpoint.pt"
        found = checkpoint.safe_load(path)
        del found["ema"]["trunk.norm.weight"]
        path.unlink()
        torch.save(found, path)
        path.with_name("checkpoint.pt.json").unlink()
        with self.assertRaisesRegex(UserError, r"trunk\.norm\.weight.*trainer\.freeze"):
            trainer(self.folder / "narrow", ema_decay=0.5)

    def test_processes_meet_only_when_all_are_ready(self):
        with mock.patch("omnivision.training.trainer.wrap_ddp", side_effect=lambda model, *_: model) as parallel:
            made = trainer(self.folder / "meeting")
            self.assertEqual(parallel.call_count, 0)
            made.wrap_model()
            self.assertEqual(parallel.call_count, 1)

    def test_a_run_that_was_taken_over_saves_nothing_more(self):
        made = trainer(self.folder / "lost")
        made.run.directory.lock()
        (self.folder / "lost" / ".lock").write_text(json.dumps({"token": "another's", "host": "elsewhere", "pid": 1}))
        with self.assertRaisesRegex(UserError, "Process 1 on elsewhere"):
            made.fit()
        self.assertIsNone(checkpoint.load_newest(made.run.directory.checkpoints))
        made.run.directory.unlock()

    def test_a_summary_that_was_cut_off_is_completed(self):
        self.fit("cut")
        RunDir(self.folder / "cut").write_summary(status="running")
        self.fit("cut")
        self.assertEqual(RunDir(self.folder / "cut").read_summary()["status"], "finished")

    def test_when_no_checkpoint_is_whole_nothing_starts_over(self):
        self.fit("all_broken")
        for name in ("checkpoint.pt", "previous.pt"):
            (self.folder / "all_broken/checkpoints" / name).write_bytes(b"junk")
        with self.assertRaisesRegex(UserError, "launcher.experiment_log_dir"):
            trainer(self.folder / "all_broken")

    def test_pictures_come_when_they_are_due(self):
        self.fit("seen", pictures_every_epochs=2, max_epochs=3)
        names = sorted(path.name for path in (self.folder / "seen/pictures").glob("*.png"))
        self.assertEqual(names, ["epoch_0000.png", "epoch_0002.png", "last.png"])

    def test_a_loss_that_is_not_finite_stops_before_the_weights_change(self):
        made = trainer(self.folder / "nan")
        with torch.no_grad():
            made.raw_model.heads[0].projector.bias.fill_(float("nan"))
        before = {name: value.clone() for name, value in made.raw_model.state_dict().items()}
        with self.assertRaisesRegex(NonFiniteError, r"Step 1 .*loss nan.*\.mp4"):
            made.fit()
        for name, value in made.raw_model.state_dict().items():
            self.assertTrue(torch.equal(value, before[name]) or name == "heads.0.projector.bias", name)
        self.assertIsNone(checkpoint.load_newest(made.run.directory.checkpoints))

    def test_a_step_that_is_heard_of_late_has_not_changed_the_weights_either(self):
        for name, make in (("fused", functools.partial(torch.optim.AdamW, fused=True)), ("sgd", torch.optim.SGD)):
            made = trainer(self.folder / name, log_freq=100)
            made.optimizer = ScheduledOptimizer(made.raw_model, made.optimizer.groups, make)
            self.spoil(made, step=2)
            seen = self.watch(made)
            with self.assertRaisesRegex(NonFiniteError, r"Step 2 .*loss nan.*\.mp4"):
                made.fit()
            self.assertEqual(sorted(seen), [1, 2, 3], "told after the next step")
            self.assert_same(seen[1], seen[2])
            with self.assertRaises(AssertionError):
                self.assert_same(seen[2], seen[3])
            for state in made.optimizer.optimizer.state.values():
                self.assertTrue(all(bool(value.isfinite().all()) for value in state.values() if value is not None))

    def test_so_many_steps_may_be_skipped_and_resumed_equals_uninterrupted(self):
        watched: list[dict[int, dict[str, torch.Tensor]]] = []

        def train(name: str, limit: int, steps: int | None = None) -> Trainer:
            made = trainer(self.folder / name, max_skipped_steps=limit)
            self.spoil(made, 2)
            self.spoil(made, 5, by=float("inf"))  # its gradient is finite
            if name == "whole":
                watched.append(self.watch(made))
            if steps is not None:
                self.stop_after(made, steps)
            with contextlib.suppress(KeyboardInterrupt):
                made.fit()
            made.run.reporter.close()
            return made

        # The first steps of a warm-up change next to nothing.
        averaged = trainer(self.folder / "averaged", max_skipped_steps=1, max_epochs=2, ema_decay=0.5)
        self.spoil(averaged, 5)
        averages = []
        update = averaged.ema.update

        def noted(skip_mask: torch.Tensor) -> None:
            update(skip_mask)
            averages.append({name: tensor.clone() for name, tensor in averaged.ema.average.items()})

        averaged.ema.update = noted
        averaged.fit()
        averaged.run.reporter.close()
        self.assert_same(averages[3], averages[4])
        for one, other in ((2, 3), (4, 5)):
            self.assertFalse(all(torch.equal(averages[one][name], averages[other][name]) for name in averages[one]))

        whole = train("whole", 2)
        [seen] = watched
        for one, other, same in ((1, 2, True), (2, 3, False), (4, 5, True), (5, 6, False)):
            changed = [name for name in seen[one] if not torch.equal(seen[one][name], seen[other][name])]
            self.assertEqual(not changed, same, (one, other))
        entries = [json.loads(line) for line in (self.folder / "whole/logs/nonfinite.jsonl").read_text().splitlines()]
        self.assertEqual([(entry["step"], entry["epoch"], entry["rank"]) for entry in entries], [(2, 0, 0), (5, 1, 0)])
        self.assertEqual(len(set(entries[0]["samples"])), 4)
        epochs = [line for line in self.lines("whole") if line["event"] == "epoch"]
        for line in epochs:
            losses = [step["loss"] for step in self.lines("whole") if step["event"] == "step"]
            losses = [loss for loss in losses[3 * line["epoch"] : 3 * line["epoch"] + 3] if loss is not None]
            self.assertAlmostEqual(line["loss"], sum(losses) / 2, delta=1e-6, msg="the average of the others")
        self.assertRegex(whole.run.reporter.console.file.getvalue(), r"Step 5 .* skipped")
        self.assertIn("2 of at most 2", whole.run.reporter.console.file.getvalue())

        for steps in (1, 2, 4, 5):
            train(f"cut_{steps}", 2, steps)
            made = train(f"cut_{steps}", 2)
            self.assert_same(whole.raw_model.state_dict(), made.raw_model.state_dict())
            self.assertEqual(made.step_stats.skipped, 2)
            again = (self.folder / f"cut_{steps}/logs/nonfinite.jsonl").read_text().splitlines()
            self.assertEqual([json.loads(line)["step"] for line in again], [2, 5], steps)
        with self.assertRaisesRegex(NonFiniteError, "Step 5 .*trainer.max_skipped_steps"):
            train("one", 1)
        self.assertEqual(checkpoint.load_newest(self.folder / "one/checkpoints")[0]["epoch"], 1)

    def test_of_several_processes_those_are_named_that_began_it(self):
        made, nan = trainer(self.folder / "two"), float("nan")
        batch = Batch(torch.zeros(0), torch.zeros(0), torch.zeros(0), "noise", ["a.mp4"])
        step = Step(0, 1, torch.tensor(2.0), 1, torch.tensor(nan), 0.1, batch.paths, batch.bad)
        for losses, named in (((2.0, nan, 3.0), [1]), ((2.0, 3.0), [0, 1])):
            found = [(loss, nan, [f"{rank}.mp4"]) for rank, loss in enumerate(losses)]
            with mock.patch.object(made.run.dist, "gather", return_value=found):
                made.step_stats.submit(step)
                with self.assertRaisesRegex(NonFiniteError, "Step 1 ") as raised:
                    made.step_stats.drain()
            self.assertEqual([rank for rank in range(3) if f"{rank}.mp4" in str(raised.exception)], named)

    def test_weights_that_are_not_finite_are_not_saved(self):
        made = trainer(self.folder / "inf", save_every_steps=1)
        step = made.optimizer.step

        def overflow(spoiled: torch.Tensor) -> None:
            step(spoiled)
            if made.global_step == 1:
                with torch.no_grad():
                    made.raw_model.heads[0].projector.bias[0] = float("inf")

        made.optimizer.step = overflow
        with self.assertRaisesRegex(NonFiniteError, "trainer.optim.gradient_clip"):
            made.fit()
        self.assertEqual(checkpoint.load_newest(made.run.directory.checkpoints)[0]["step"], 1)

    def test_fp16_that_overflows_however_it_is_scaled(self):
        made = trainer(self.folder / "half", amp_dtype="float16", max_epochs=40)
        training_step = made.task.training_step

        def overflowing(model: torch.nn.Module, batch: Batch) -> StepOutput:
            output = training_step(model, batch)
            steep = torch.autograd.graph.saved_tensors_hooks  # the loss is fine, its gradient is not
            with steep(lambda tensor: tensor, lambda tensor: tensor * float("inf")):
                return dataclasses.replace(output, loss=output.loss * model.heads[0].projector.bias[0].exp())

        made.task.training_step = overflowing
        before = {name: value.clone() for name, value in made.raw_model.state_dict().items()}
        with self.assertRaisesRegex(NonFiniteError, "amp_dtype=bfloat16"):
            made.fit()
        self.assert_same(before, made.raw_model.state_dict())

    def spoil(self, made: Trainer, step: int, by: float = float("nan")) -> None:
        training_step = made.task.training_step

        def spoilt(model: torch.nn.Module, batch: Batch) -> StepOutput:
            output = training_step(model, batch)
            if made.global_step + 1 != step:
                return output
            # Of an infinite loss the gradient may well be finite.
            loss = output.loss * by if by != by else output.loss + by
            return dataclasses.replace(
                output, loss=loss, sums={name: value * by for name, value in output.sums.items()}
            )

        made.task.training_step = spoilt  # type: ignore[method-assign]

    def stop_after(self, made: Trainer, step: int) -> None:
        """Ctrl-C in the step after this one."""
        train_step = made.train_step

        def stopping(batch: Batch) -> None:
            if made.global_step == step:
                raise KeyboardInterrupt
            train_step(batch)

        made.train_step = stopping  # type: ignore[method-assign]

    def watch(self, made: Trainer) -> dict[int, dict[str, torch.Tensor]]:
        """The weights after each step, by number."""
        seen, train_step = {}, made.train_step

        def watched(batch: Batch) -> None:
            train_step(batch)
            seen[made.global_step + 1] = {name: value.clone() for name, value in made.raw_model.state_dict().items()}

        made.train_step = watched  # type: ignore[method-assign]
        return seen

    def test_a_short_batch_stops_with_the_files(self):
        for count, bad in ((1, (0,)), (4, tuple(range(12)))):
            made = trainer(self.folder / f"short_{count}", train=Noise(12, bad=bad), log_freq=100)
            before = {name: value.clone() for name, value in made.raw_model.state_dict().items()}
            with self.assertRaisesRegex(UserError, rf"{count} files of one batch .*bad_samples\.jsonl"):
                made.fit()
        self.assert_same(before, made.raw_model.state_dict())  # the first batch was the short one

    def test_a_step_never_waits_for_the_device(self):
        for name, options in (
            ("plain", {}),
            ("clipped", {"gradient_clip": 1.0, "ema_decay": 0.9}),
            ("micro_batches", {"micro_batches": 2}),
        ):
            made = trainer(self.folder / name, **options)
            made.optimizer = ScheduledOptimizer(
                made.raw_model, made.optimizer.groups, functools.partial(torch.optim.AdamW, fused=True)
            )
            batch = next(made.train.batches((0, 0), epochs=1))
            with Waits() as waits:
                made.train_step(batch)
            self.assertEqual(waits.found, [])
        with Waits() as waits:
            float(made.step_stats._pending[0][0].loss)
        self.assertEqual(waits.found, ["aten._local_scalar_dense"], "it would be found")

    def test_another_number_of_steps_is_another_run(self):
        self.fit("run")
        with self.assertRaisesRegex(UserError, "trainer.limit_train_batches"):
            trainer(self.folder / "run", limit=2)

    def test_a_broken_newest_checkpoint_is_passed_over_with_a_word(self):
        whole = self.fit("broken")
        (self.folder / "broken/checkpoints/checkpoint.pt").write_bytes(b"junk")
        made = trainer(self.folder / "broken")
        self.assertEqual(made.state.epoch, 1)
        self.assertIn("checkpoint.pt", made.run.reporter.console.file.getvalue())
        made.fit()
        self.assert_same(whole, made.raw_model.state_dict())

    def test_compiled_equals_eager(self):
        eager = self.fit("eager", max_epochs=1)
        # The real back end takes a minute to generate code; the capture, and so the same switch, is tested without it.
        with mock.patch("torch.compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True)):
            compiled = self.fit("compiled", max_epochs=1, compile=True)
        self.assert_same(eager, compiled, delta=1e-5)

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
                build.check_compiler(torch.device("cpu"))
        for said in (
            "CppCompileError: see below\nx.cpp:27:10: fatal error: Python.h: No such file",
            "Python.h: TritonMissing",
        ):
            with (
                mock.patch("torch.compile", return_value=mock.Mock(side_effect=TorchDynamoException(said))),
                self.assertRaisesRegex(UserError, "trainer.compile.*Python.h"),
            ):
                build.check_compiler(torch.device("cpu"))

    def test_one_process_of_a_node_tries_the_compiler(self):
        settings = mock.Mock()
        with mock.patch.object(build, "check_compiler") as tried, mock.patch.object(build, "held_bytes", lambda _: 0):
            settings.launcher.gpus_per_node = 2
            for local_rank in (0, 1, 2):
                build.check_device(settings, torch.device("cpu"), local_rank)
        tried.assert_called_once_with(torch.device("cpu"))

    def test_reduced_precision(self):
        for options in ({"amp_dtype": "bfloat16"}, {"amp_dtype": "float16"}):
            with self.subTest(options):
                made = trainer(self.folder / str(options), max_epochs=1, **options)
                made.fit()
                self.assertTrue(
                    all(p.dtype == torch.float32 and p.isfinite().all() for p in made.raw_model.parameters())
                )


if __name__ == "__main__":
    unittest.main()
