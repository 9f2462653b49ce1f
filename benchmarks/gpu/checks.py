"""Is training on this device right? Small runs of the real command and the published figures, beside the CPU."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
import re
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.geometry import CAN_COMPILE
from benchmarks.gpu.device import DEVICE, ON_GPU, describe, little_memory, peak_memory, run_command, sync_debug_mode
from benchmarks.harness import machine
from omnivision.data.batch import Batch
from omnivision.distributed.fsdp import apply_fsdp
from omnivision.distributed.process_group import wrap_ddp
from omnivision.models.mae import reconstruction_loss
from omnivision.models.patches import normalize_pixels
from omnivision.models.vit import Block
from omnivision.tasks.reconstruct import Reconstruct
from omnivision.training.step_stats import StepStats
from omnivision.training.trainer import Trainer
from omnivision.utils.errors import EXIT_FAULT
from tests import stage_runs
from tests.models import test_classifier, test_mae
from tests.parity_formula import error, gradient_error, record, stated, token_mask
from tests.runs import load_weights, read_metrics, read_summary

DATASETS = {"mae": "k150", "ft": "ucf101", "lp": "ucf101", "average": "ucf101"}
VIDEOS = 24
EPOCHS = 3  # of VIDEOS / 4 steps
# Relative bounds. fp32: the published figures'. Half precision: some units in the last place (bf16 2^-8, fp16 2^-11).
PARITY = {"fp32": 1e-5, "bf16": 3e-2, "fp16": 4e-3}
GRADIENTS = {"fp32": 1e-4, "bf16": 6e-2, "fp16": 1e-2}
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
AMP = {"bf16": "bfloat16", "fp16": "float16"}
STEPS = 1e-4  # between losses on the two devices, after some steps in fp32
NO_DROP_PATH = "trainer.model.trunk.drop_path=0"  # devices and compilers draw other random numbers


NOT_HERE = "not here"  # needs a GPU, or a compiler
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts, for deterministic matrix products


@dataclass
class Row:
    """One thing that was checked."""

    what: str
    found: str
    expected: str
    verdict: str  # ok, rehearsed (ok on a CPU), failed, reported (no bound), NOT_HERE


@dataclass
class Checks:
    """Rows of what was checked, and the folder and data of the small runs."""

    folder: Path
    quick: bool = False
    rows: list[Row] = field(default_factory=list)

    def at_most(self, what: str, value: float, bound: float) -> None:
        self.add(what, f"{value:.2g}", f"at most {bound:g}", value <= bound)

    def add(self, what: str, found: str, expected: str, verdict: bool | str) -> None:
        if isinstance(verdict, bool):
            verdict = ("ok" if ON_GPU else "rehearsed") if verdict else "failed"
        self.rows.append(Row(what, found, expected, verdict))
        print(f"  {verdict.replace('failed', 'FAILED'):9}  {what}: {found} (expected: {expected})", flush=True)

    @functools.cached_property
    def data(self) -> dict[str, list[str]]:
        """Overrides with the splits of each dataset."""
        paths = stage_runs.write_videos(self.folder / "videos", VIDEOS)
        return {
            "k150": stage_runs.write_split(self.folder, "k150", "train", paths),
            "ucf101": stage_runs.write_split(self.folder, "ucf101", "train", paths)
            + stage_runs.write_split(self.folder, "ucf101", "val", paths[:6]),
        }

    def run(self, stage: str, name: str, *overrides: str, device: str = DEVICE.type, code: int = 0) -> Path:
        """Run a stage with a tiny model; return its run directory. Raises as `run_command` does."""
        self.result = run_command(self.command(stage, name, *overrides, device=device), code)
        return self.folder / name

    def command(self, stage: str, name: str, *overrides: str, device: str = DEVICE.type) -> list[str]:
        dataset = DATASETS[stage]
        fixed = [*self.data[dataset], f"epochs={EPOCHS}", f"trainer.accelerator={device}"]
        return stage_runs.command(stage, self.folder / name, *fixed, *overrides, dataset=dataset)

    @functools.cached_property
    def starts(self) -> dict[str, str]:
        """The overrides with which each stage starts from the one before it, trained on the CPU."""
        mae = self.run("mae", "start_mae", "epochs=1", device="cpu")
        aligned = [
            self.run("ft", f"start_{seed}", "epochs=1", f"pretrained_checkpoint_path={mae}", f"trainer.seed_value={seed}",
                     device="cpu")
            for seed in (1, 2)
        ]  # fmt: skip
        one, both = (f"pretrained_checkpoint_path={each}" for each in (aligned[0], f"[{aligned[0]},{aligned[1]}]"))
        return {"mae": "trainer.seed_value=5", "ft": f"pretrained_checkpoint_path={mae}", "lp": one, "average": both}


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run)]


def largest_difference(one: list[float], other: list[float]) -> float:
    """Return the largest relative difference; infinite for lists of other lengths."""
    if len(one) != len(other) or not one:
        return math.inf
    return max(abs(a - b) / max(abs(a), 1e-12) for a, b in zip(one, other, strict=True))


def weight_difference(one: Path, other: Path) -> float:
    """Return the largest absolute difference between the weights of two runs."""
    first, second = load_weights(one), load_weights(other)
    return max(float((first[name].float() - second[name].float()).abs().max()) for name in first)


# ---- the published figures ----------------------------------------------------------------------------------------


def parity(checks: Checks) -> None:
    """Predictions, losses and gradients against the published implementation's, from the same weights."""
    case = record("mae")["video"]
    variant = next(each for each in case["losses"] if each["settings"]["unnormalize_img"] is not None)
    video, mask = stated(case["input"]).to(DEVICE), token_mask(case["mask"]).to(DEVICE)
    classes = record("classifier")["video"]
    clip = stated(classes["input"]).to(DEVICE)
    for name, dtype in DTYPES.items():
        model = test_mae.published_model(torch.float32).to(DEVICE)
        with torch.autocast(DEVICE.type, dtype, enabled=dtype is not None):
            prediction = model(video, mask)
            target = test_mae.target_of(video, prediction.masked_idx, variant["settings"])
            loss = reconstruction_loss(prediction.pixels, target)
        loss.backward()
        checks.at_most(f"MAE loss in {name}", abs(float(loss.detach()) / variant["loss"][1] - 1), PARITY[name])
        checks.at_most(f"MAE gradients in {name}", gradient_error(model, variant["grad_l2_norms"]), GRADIENTS[name])
        classifier = test_classifier.published_model(torch.float32).to(DEVICE)
        with torch.autocast(DEVICE.type, dtype, enabled=dtype is not None):
            logits = classifier(clip)
        checks.at_most(
            f"classifier's logits in {name}", error(logits.cpu(), classes["expected"]["logits"]), PARITY[name]
        )


def stages(checks: Checks) -> None:
    """Every stage beside the CPU, from the same weights and batches."""
    for stage, start in checks.starts.items():
        runs = [
            checks.run(stage, f"{stage}_{name}", start, NO_DROP_PATH, device=device)
            for name, device in (("there", "cpu"), ("here", DEVICE.type))
        ]
        checks.at_most(f"{stage}: losses beside the CPU's", largest_difference(*map(losses, runs)), STEPS)


# ---- precision ----------------------------------------------------------------------------------------------------


def half_precision(checks: Checks) -> None:
    """Losses in half precision beside fp32."""
    plain = losses(checks.run("mae", "fp32", checks.starts["mae"]))
    for name, dtype in AMP.items():
        amp = ["trainer.optim.amp.enabled=true", f"trainer.optim.amp.amp_dtype={dtype}"]
        found = losses(checks.run("mae", name, checks.starts["mae"], *amp))
        checks.at_most(f"losses in {name} beside fp32", largest_difference(plain, found), 5e-2)


def loss_scale(checks: Checks) -> None:
    """fp16 from a loss scale that overflows: steps are skipped until it fits, then it grows again."""
    scales: list[float] = []
    changed: list[bool] = []
    step = Trainer.train_step

    def watched(trainer: Trainer, batch: Any) -> None:
        if not scales:
            trainer.scaler = torch.amp.GradScaler(
                DEVICE.type, init_scale=2.0**60, backoff_factor=2.0**-12, growth_interval=3
            )
        before = [parameter.detach().clone() for parameter in trainer.raw_model.parameters()]
        step(trainer, batch)
        scales.append(float(trainer.scaler.get_scale()))
        after = trainer.raw_model.parameters()
        changed.append(any(not torch.equal(old, new) for old, new in zip(before, after, strict=True)))

    amp = ["trainer.optim.amp.enabled=true", "trainer.optim.amp.amp_dtype=float16"]
    with mock.patch.object(Trainer, "train_step", watched):
        checks.run("mae", "overflow", *amp)
    skipped = changed.index(True) if any(changed) else len(changed)
    found = f"{skipped} of {len(changed)}"
    checks.add("fp16: first steps, whose gradients overflow, skipped", found, "some", 0 < skipped < len(changed))
    falls = all(later < earlier for earlier, later in itertools.pairwise(scales[:skipped]))
    grows = any(later > earlier for earlier, later in itertools.pairwise(scales[skipped:]))
    found = f"{scales[0]:.0e}, {min(scales):.0e}, {scales[-1]:.0e}"
    checks.add("fp16: loss scale at the start, lowest, at the end", found, "falls, then grows", falls and grows)


# ---- the step -----------------------------------------------------------------------------------------------------


def compiled(checks: Checks) -> None:
    """`trainer.compile=true`: no graph breaks, the same losses."""
    if not (ON_GPU or CAN_COMPILE):
        checks.add("losses, compiled beside eager", "no C++ compiler", f"at most {STEPS:g}", NOT_HERE)
        return
    from torch._dynamo.utils import counters

    counters.clear()
    for stage in ("mae",) if checks.quick else ("mae", "ft"):
        start = checks.starts[stage]
        settings = [start, NO_DROP_PATH]
        plain = checks.run(stage, f"{stage}_eager", *settings)
        made = checks.run(stage, f"{stage}_compiled", *settings, "trainer.compile=true")
        checks.at_most(
            f"{stage}: losses, compiled beside eager", largest_difference(losses(plain), losses(made)), STEPS
        )
    breaks = sum(counters["graph_break"].values())
    checks.add("graph breaks of compiled runs", str(breaks), "0", breaks == 0)


def activation_checkpointing(checks: Checks) -> None:
    """The same losses with less memory."""
    setting = "trainer.model.trunk.activation_checkpointing=true"
    with deterministic():
        plain = checks.run("mae", "kept", checks.starts["mae"])
        made = checks.run("mae", "recomputed", checks.starts["mae"], setting)
    difference = largest_difference(losses(plain), losses(made))
    checks.at_most("losses with activation checkpointing beside without, deterministic algorithms", difference, 1e-6)
    memory = []
    for on in (False, True):
        model = test_mae.VisionTransformer(384, 8, 6, num_frames=8, image_size=112, activation_checkpointing=on).to(
            DEVICE
        )
        video = torch.rand(16 if ON_GPU else 1, 3, 8, 112, 112, device=DEVICE)
        memory.append(peak_memory(functools.partial(backward, model, video)))
    share = f"{memory[1] / memory[0]:.2f}" if ON_GPU else "not measured"
    what = "memory of a step with activation checkpointing, as a share of that without"
    checks.add(what, share, "less than 1", memory[1] < memory[0] if ON_GPU else NOT_HERE)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Let the GPU add in a fixed order: with default algorithms, two runs of the same command differ."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def backward(model: nn.Module, video: Tensor) -> None:
    model(video).sum().backward()


def no_waiting(checks: Checks) -> None:
    """The host waits for the device in no step but those that are logged or save."""
    patches = contextlib.ExitStack()
    epoch, steps = Trainer.train_epoch, 0

    def strict(trainer: Trainer, batches: Iterator[Any]) -> None:
        sync_debug_mode("error")
        try:
            epoch(trainer, batches)
        finally:
            sync_debug_mode("default")

    def lenient(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            sync_debug_mode("default")
            try:
                return method(*arguments, **more)
            finally:
                sync_debug_mode("error")

        return call

    with patches:
        patches.enter_context(mock.patch.object(Trainer, "train_epoch", strict))
        for owner, name in ((Trainer, "_log_step"), (StepStats, "_record_skipped")):
            patches.enter_context(mock.patch.object(owner, name, lenient(getattr(owner, name))))
        normalize_pixels(torch.zeros(1, 3, 1, 1, 1, dtype=torch.uint8, device=DEVICE), 1)  # copies its constants once
        more = ["trainer.logging.log_freq=1000", "trainer.optim.gradient_clip=1", "trainer.ema_decay=0.9"]
        for stage, dtype in (("mae", "bfloat16"), ("mae", "float16"), ("ft", "bfloat16")):
            amp = ["trainer.optim.amp.enabled=true", f"trainer.optim.amp.amp_dtype={dtype}"]
            run = checks.run(stage, f"{stage}_{dtype}_strict", checks.starts[stage], *more, *amp)
            steps += read_summary(run)["steps"]
    found = f"none in {steps} steps" if ON_GPU else "not measured"
    checks.add("waits of the host for the GPU in training steps", found, "none", True if ON_GPU else NOT_HERE)


def transfers(checks: Checks) -> None:
    """Every batch of a run travels from pinned memory on a stream of its own, in a trace beside a kernel."""
    step, pinned = Trainer.train_step, []

    def watched(trainer: Trainer, batch: Batch) -> None:
        tensors = batch._tensors().values()
        is_own_stream = trainer.context.dist.copy_stream is not None
        pinned.extend(is_own_stream and tensor.is_pinned() for tensor in tensors)
        if ON_GPU:
            torch.cuda._sleep(100_000_000)  # cycles: a kernel of 50 ms, as of a larger model's step
        step(trainer, batch)

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if ON_GPU else [])]
    with mock.patch.object(Trainer, "train_step", watched), profile(activities=activities) as trace:
        checks.run("mae", "traced", checks.starts["mae"], "num_workers=1", "trainer.logging.log_freq=1000")
    count, beside = len(pinned), copies_beside_kernels(trace.events())
    rows = {
        "travel from pinned memory on a stream of their own": sum(pinned),
        "travel beside a kernel, in a trace": beside,
    }
    for what, found in rows.items():
        verdict = found >= count > 0 if ON_GPU else NOT_HERE
        checks.add(
            f"tensors of batches that {what}", f"{found} of {count}" if ON_GPU else "not measured", "all", verdict
        )


def copies_beside_kernels(events: Iterable[Any]) -> int:
    """Return how many copies from pinned memory to the device overlap with a kernel in a trace."""
    on_gpu = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [event.time_range for event in on_gpu if not event.name.startswith(("Memcpy", "Memset"))]
    copies = [event.time_range for event in on_gpu if event.name.startswith("Memcpy HtoD (Pinned")]
    return sum(any(copy.start < kernel.end and kernel.start < copy.end for kernel in kernels) for copy in copies)


# ---- several processes, resuming ----------------------------------------------------------------------------------


def interrupted(checks: Checks, name: str, step: int, *overrides: str) -> Path:
    """Run stage 1, interrupt it in a step, and resume it."""
    settings = [checks.starts["mae"], "trainer.checkpoint.save_every_steps=1", *overrides]
    train_step = Trainer.train_step

    def interrupting(trainer: Trainer, batch: Any) -> None:
        if trainer.global_step == step:
            raise KeyboardInterrupt
        train_step(trainer, batch)

    with mock.patch.object(Trainer, "train_step", interrupting):
        checks.run("mae", name, *settings, code=130)
    return checks.run("mae", name, *settings)


def strategies(checks: Checks) -> None:
    """DDP and FSDP around one process (over NCCL on a GPU), interrupted and resumed, beside a run without them."""
    plain = losses(checks.run("mae", "unwrapped", checks.starts["mae"]))
    for strategy in ("ddp", "fsdp"):
        with wrapped(strategy):
            run = interrupted(checks, strategy, VIDEOS // 4 + 2)
        checks.at_most(f"{strategy}, resumed: losses beside one process", largest_difference(plain, losses(run)), STEPS)


@contextlib.contextmanager
def wrapped(strategy: str) -> Iterator[None]:
    """Wrap the model of a single process as those of several are."""

    def wrap(trainer: Trainer) -> None:
        dist = trainer.context.dist
        if strategy == "ddp":
            several: Any = mock.Mock(world_size=2, device=dist.device)
            trainer.model = wrap_ddp(trainer.model, several, trainer.comms_dtype)
        else:
            blocks: list[nn.Module] = [part for part in trainer.raw_model.modules() if isinstance(part, Block)]
            apply_fsdp(trainer.raw_model, blocks, dist, trainer.comms_dtype, trainer.amp_dtype)
            trainer.optimizer.rebind_parameters(trainer.raw_model)

    with tempfile.NamedTemporaryFile() as file, mock.patch.object(Trainer, "wrap_model", wrap):
        backend = "nccl" if ON_GPU else "gloo"
        torch.distributed.init_process_group(backend, init_method=f"file://{file.name}2", rank=0, world_size=1)
        try:
            yield
        finally:
            torch.distributed.destroy_process_group()


def resuming(checks: Checks) -> None:
    """A run interrupted in mid-epoch and resumed, beside an uninterrupted one."""
    what = "weights of a run resumed in mid-epoch beside an uninterrupted one's"
    with deterministic():
        straight = checks.run("mae", "straight", checks.starts["mae"])
        difference = weight_difference(straight, interrupted(checks, "resumed", VIDEOS // 4 + 3))
    found = f"differ by {difference:.2g}" if difference else "bit-equal"
    checks.add(f"{what}, deterministic algorithms", found, "bit-equal", difference == 0)
    first, again = (checks.run("mae", name, checks.starts["mae"]) for name in ("straight_default", "again_default"))
    difference = weight_difference(first, interrupted(checks, "resumed_default", VIDEOS // 4 + 3))
    found = f"differ by {difference:.2g}; two uninterrupted ones by {weight_difference(first, again):.2g}"
    checks.add(f"{what}, default algorithms", found, "no bound", "reported")


# ---- faults -------------------------------------------------------------------------------------------------------


def non_finite(checks: Checks) -> None:
    """A step whose loss is not finite changes nothing and is reported."""
    step, kept = Trainer.train_step, []
    task_step = Reconstruct.training_step

    def watched(trainer: Trainer, batch: Any) -> None:
        spoils = trainer.global_step == 2

        def spoiled(task: Reconstruct, model: nn.Module, part: Any) -> Any:
            output = task_step(task, model, part)
            object.__setattr__(output, "loss", output.loss * (math.nan if spoils else 1))
            return output

        before = [parameter.detach().clone() for parameter in trainer.raw_model.parameters()]
        with mock.patch.object(Reconstruct, "training_step", spoiled):
            step(trainer, batch)
        after: Iterator[Tensor] = trainer.raw_model.parameters()
        kept.append(all(torch.equal(old, new) for old, new in zip(before, after, strict=True)))

    with mock.patch.object(Trainer, "train_step", watched):
        run = checks.run("mae", "non_finite", "trainer.max_skipped_steps=1")
    expected = [number == 2 for number in range(len(kept))]
    # The first step of a warm-up has a learning rate of 0.
    skipped = [str(number) for number, was_kept in enumerate(kept[1:], start=2) if was_kept]
    found = f"step {', '.join(skipped) or 'none'} of {len(kept)}"
    checks.add("steps skipped, when the loss of step 3 is NaN", found, "step 3 alone", kept[1:] == expected[1:])
    told = "Step 3" in checks.result.stdout and (run / "logs/nonfinite.jsonl").is_file()
    found = "step 3" if told else "nothing"
    checks.add("a NaN loss, as the log and nonfinite.jsonl tell it", found, "step 3", told)


def out_of_memory(checks: Checks) -> None:
    """Too large a batch ends in one paragraph that names the settings to lower."""
    backward = Trainer._backward

    def failing(trainer: Trainer, *arguments: Any) -> Any:
        if ON_GPU:
            return backward(trainer, *arguments)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    large = ["batch_size=24", "image_size=224", "short_side=224", "trainer.model.trunk.depth=40"]
    with little_memory(), mock.patch.object(Trainer, "_backward", failing):
        run = checks.run("mae", "memory", *large, code=EXIT_FAULT)
    reason = str(read_summary(run)["exit_reason"])
    named = re.findall(r"trainer[\w.]+\w|batch_size", reason)
    passed = "batch_size" in named and "Traceback" not in checks.result.stderr
    checks.add("settings that the message of a run out of memory names", ", ".join(named), "batch_size, too", passed)


CHECKS: tuple[Callable[[Checks], None], ...] = (
    parity, stages, half_precision, loss_scale, compiled, activation_checkpointing, no_waiting, transfers, strategies,
    resuming, non_finite, out_of_memory,
)  # fmt: skip


def run_checks(quick: bool, write: Callable[[dict[str, Any]], None]) -> None:
    """Run all checks and `write` the rows after each; an exception is a failed row, and the next check goes ahead."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with tempfile.TemporaryDirectory() as name:
        checks, facts = Checks(Path(name), quick), machine() | describe()
        for check in CHECKS:
            start = time.monotonic()
            print(f"{check.__name__}: {(check.__doc__ or '').partition(chr(10))[0]}", flush=True)
            try:
                check(checks)
            except Exception as problem:
                traceback.print_exc()
                text = f"{type(problem).__name__}: {problem}".splitlines()[0]
                checks.add(check.__name__, text, "no exception", False)
            print(f"  {time.monotonic() - start:.0f} s", flush=True)
            write({"quick": quick, "machine": facts, "rows": [asdict(row) for row in checks.rows]})
