"""How fast is training on this device? Steps beside a measured matmul rate and Hugging Face's VideoMAE, and whole runs."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from benchmarks import videos
from benchmarks.geometry import CAN_COMPILE, SIZES, Geometry, step
from benchmarks.gpu.device import DEVICE, ON_GPU, describe, free_memory, peak_memory, run_command, synchronize, timed
from benchmarks.harness import Ratio, Report, interleaved
from benchmarks.loading import batches_per_second, prepared
from benchmarks.steps import cross_entropy
from omnivision.models.classifier import VideoClassifier, train_mode
from omnivision.models.vit import VisionTransformer
from tests import stage_runs
from tests.runs import read_metrics

BATCH = 32
LARGEST = 512  # batch to try
SECONDS = 270.0  # for everything; compiling takes most of them, and what no longer fits is left out
GOALS = {"vitbase": 45.0, "vitlarge": 50.0}  # % of the matmul rate, compiled
COMPILED = 1.2  # times as fast as Hugging Face, both compiled
SHIPPED = 1.5  # compiled, against Hugging Face as shipped
SHIPPED_PEER = "Hugging Face as shipped"
PEER = "Hugging Face, positions on the device"  # see positions_to_device
WAITING = 5.0  # % of the time, on prepared videos
VIEWS = 4

Run = Callable[[], object]


class Speed:
    """The measurements of one run, collected in a report with a table of steps."""

    def __init__(self, quick: bool) -> None:
        self.quick, self.deadline = quick, time.monotonic() + SECONDS
        self.report = Report("speed", f"Training on {describe()['device']}, bf16", "s")
        self.steps: list[dict[str, Any]] = []
        self.profiles: dict[str, str] = {}
        self.failed: list[str] = []
        self.rate = matmul_rate(128 if quick else 8192)
        self.report.facts["matrix product in bf16, TFLOP/s"] = self.rate / 1e12
        self.has_peer = self.report.works("transformers", importlib.import_module, "transformers")
        if not self.has_peer:
            print("transformers does not load: goals beside Hugging Face are not measured", file=sys.stderr)
        self.ways = [False, True] if ON_GPU or (CAN_COMPILE and not quick) else [False]
        self.rounds = 2 if quick else 3
        self.sizes = ["vittiny"] if quick else list(GOALS)

    def has_time(self, what: str, needed: float) -> bool:
        """Return whether enough of the time is left; if not, the report says so."""
        if left_out := time.monotonic() + needed > self.deadline:
            self.report.facts[what] = "left out, no time"
        return not left_out

    # ---- steps ----------------------------------------------------------------------------------------------------

    def pretraining(self) -> None:
        """Steps of MAE, ours and Hugging Face's, eager and compiled."""
        batch = 2 if self.quick else BATCH
        for size in self.sizes:
            if not self.compare_if_it_fits(size, batch, self.ways):
                self.failed.append(f"{size}, batch {batch} (out of memory)")

    def largest_batches(self) -> None:
        """Steps of MAE at the largest batch that fits, not compiled."""
        for size in self.sizes:
            if self.has_time(f"{size}, the largest batch", needed=40):
                batch = self.largest_batch(size)
                if not any(self.compare_if_it_fits(size, int(share * batch), [False]) for share in (1, 0.85)):
                    self.failed.append(f"{size}, the largest batch (out of memory)")

    def compare_if_it_fits(self, size: str, batch: int, ways: list[bool]) -> bool:
        """Compare, and return whether the memory was enough. Memory is free again when the error is gone."""
        fits = False
        with contextlib.suppress(torch.OutOfMemoryError):
            self.compare(self.geometry(size, batch), ways)
            fits = True
        release()
        return fits

    def geometry(self, size: str, batch: int) -> Geometry:
        frames, image = (4, 64) if self.quick else (16, 224)
        return Geometry(size, batch, frames, image, DEVICE)

    def largest_batch(self, size: str) -> int:
        """Return the largest batch that both sides have memory for together, by the memory of two smaller ones."""
        if not ON_GPU:
            return 3
        small, peaks, held = BATCH // 4, [], 0
        for batch in (small, BATCH):
            shape, most, held = self.geometry(size, batch), 0, 0
            for make in (shape.ours, shape.huggingface)[: 1 + self.has_peer]:
                model = make()
                run = shape.step(model, torch.bfloat16)
                run()  # makes the optimizer's state
                most = max(most, peak_memory(run))
                held += 12 * sum(parameter.numel() for parameter in model.parameters())  # fp32 weights, two moments
                del model, run
                release()
            peaks.append(most)
        # Of each clip the activations of one side, and the inputs of both: bytes for ours, floats for theirs.
        clip = (peaks[1] - peaks[0]) / (BATCH - small) + 5 * shape.video[0].numel()
        fits = int((free_memory() - held - peaks[1]) / clip) + BATCH
        return max(BATCH, min(LARGEST, fits // BATCH * BATCH))

    def compare(self, shape: Geometry, ways: list[bool]) -> None:
        """Time ours and Hugging Face's in turn; ours must work. Raises OutOfMemoryError."""
        name = f"{shape.size}, batch {shape.batch}"
        sides: dict[str, Run] = {}
        memory: dict[str, int] = {}
        for compiled in ways:
            for make in (shape.ours, shape.huggingface)[: 1 + self.has_peer]:
                is_ours = make == shape.ours
                is_shipped = len(ways) > 1 and not compiled
                side = f"{'ours' if is_ours else SHIPPED_PEER if is_shipped else PEER}, {name}{', compiled' * compiled}"
                try:
                    model = make()
                    if not (is_ours or is_shipped):
                        positions_to_device(model)
                    run = shape.step(model, torch.bfloat16, compiled)
                    run()  # compiles, and makes the optimizer's state
                    memory[side] = peak_memory(run)
                    sides[side] = run
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:
                    self.report.facts[side] = f"left out: {type(error).__name__}: {error}".splitlines()[0]
                    print(f"  {side}: {self.report.facts[side]}", flush=True)
                    if is_ours:
                        traceback.print_exc()
                        self.failed.append(side)
        operations = shape.count()[0]
        self.time(sides, dict.fromkeys(sides, shape.batch), memory, operations, shape.size)
        self.add_ratios(shape, name, operations, ways)
        best = f"ours, {name}{', compiled' * ways[-1]}"
        is_slow = any(ratio.reached is False and best in ratio.what for ratio in self.report.ratios)
        if best in sides and (self.quick or is_slow):
            self.profiles[best] = kernels(sides[best])

    def add_ratios(self, shape: Geometry, name: str, operations: float, ways: list[bool]) -> None:
        """Compare the sides of a shape; goals are for compiled steps of full sizes."""
        ours, shipped, peer = f"ours, {name}", f"{SHIPPED_PEER}, {name}", f"{PEER}, {name}"
        best, has_goals = f"{ours}{', compiled' * ways[-1]}", ways[-1] and not self.quick
        if best in self.report.seconds:
            used = [100 * operations / seconds / self.rate for seconds in self.report.seconds[best]]
            goal = GOALS[shape.size] if has_goals else None
            self.report.ratios.append(Ratio(f"matmul rate used by {best}", used, goal, "%"))
        if len(ways) == 1:
            self.report.times_as_fast(f"{best}, against {PEER}", best, peer)
            return
        self.report.times_as_fast(f"{best}, against {SHIPPED_PEER}", best, shipped, SHIPPED if has_goals else None)
        self.report.times_as_fast(f"{ours}, against {SHIPPED_PEER}, neither compiled", ours, shipped)
        both = f"{best}, against {PEER}, both compiled"
        self.report.times_as_fast(both, best, f"{peer}, compiled", COMPILED if has_goals else None)

    def time(
        self,
        sides: dict[str, Run],
        clips: dict[str, int],
        memory: dict[str, int] | None = None,
        operations: float | None = None,
        size: str = "",
    ) -> None:
        """Time sides in turn, and add their rows to the table of steps."""
        turns = {side: timed(run, times=1 if self.quick else 5) for side, run in sides.items()}
        self.report.seconds |= interleaved(turns, self.rounds, warm_up=0)
        for side in sides:
            seconds = self.report.median(side)
            row = {"step": side, "size": size, "seconds": seconds, "clips per second": clips[side] / seconds}
            if operations is not None:
                row["% of the matmul rate"] = 100 * operations / seconds / self.rate
            if memory and memory[side]:
                row["memory beyond weights, GB"] = memory[side] / 1e9
            self.steps.append(row)
            print(f"  {side}: {seconds:.4f} s, {row['clips per second']:.1f} clips per second", flush=True)

    def downstream(self) -> None:
        """Steps of fine-tuning and probing, and an evaluation with six views; not compiled."""
        if not self.has_time("fine-tuning, probing, evaluation", needed=20):
            return
        size, frames, image, batch = ("vittiny", 4, 64, 2) if self.quick else ("vitbase", 16, 224, 16)
        video = torch.randint(0, 256, (batch, 3, frames, image, image), dtype=torch.uint8, device=DEVICE)
        label = torch.arange(batch, device=DEVICE)
        sides: dict[str, Run] = {}
        for name, frozen in (("fine-tuning", False), ("probing", True)):
            model = VideoClassifier(VisionTransformer(*SIZES[size][0], num_frames=frames, image_size=image), [101])
            model.to(DEVICE).trunk.requires_grad_(not frozen)
            train_mode(model)
            sides[f"{name}, {size}, batch {batch}"] = step(model, cross_entropy(model, video, label), torch.bfloat16)
        self.time(sides, dict.fromkeys(sides, batch))
        evaluated = f"evaluation, six views of {batch} videos, {size}"
        run = functools.partial(scores, model.eval(), video.repeat(6, 1, 1, 1, 1))
        self.time({evaluated: run}, {evaluated: 6 * batch})

    # ---- data -----------------------------------------------------------------------------------------------------

    def data(self, folder: Path) -> None:
        """How many cores feed this device: runs on real videos, and the loader on all cores beside steps."""
        cores = len(os.sched_getaffinity(0))
        seconds, copies = (4, 8) if self.quick else (10, 64)
        raw = videos.make(folder, 340, 256, seconds, copies=copies)
        kinds = {"340 x 256": raw, "340 x 256, prepared": repeated(prepared(folder, raw[:1]), copies)}
        for model, needed in {"vitmicro": 0}.items() if self.quick else {"vitbase": 30, "vitlarge": 60}.items():
            for kind, paths in reversed(kinds.items()):
                if self.has_time(f"a run of {model}, {kind}", needed):
                    self.whole_run(folder, kind, paths, model, cores)
        large = videos.make(folder, 1280, 720, seconds=4, copies=4)
        kinds["1280 x 720"] = repeated(large, copies)
        kinds["1280 x 720, prepared"] = repeated(prepared(folder, large[:1], short_side=256), copies)
        fastest: dict[str, float] = {}
        for row in self.steps:
            if row["step"].startswith("ours"):
                fastest[row["size"]] = max(fastest.get(row["size"], 0), row["clips per second"])
        rates: dict[str, float] = {}
        for kind, paths in kinds.items():
            if self.has_time(f"the loader, {kind}", needed=10):
                data = videos.pretraining_samples(videos.split(folder, "raw", paths))
                rates[kind] = 8 * batches_per_second(data, cores, 8 if self.quick else 4 * cores) / cores
        if self.quick:
            return  # starting took most of the time
        self.report.facts["clips per second of the loader on one core"] = rates
        self.report.facts["cores that feed one device"] = {
            kind: {model: need / rate for model, need in fastest.items()} for kind, rate in rates.items()
        }

    def whole_run(self, folder: Path, kind: str, paths: list[Path], model: str, cores: int) -> None:
        """Run the training command on real videos, and add its rate and its share of time waiting for data."""
        name = f"{model}, {kind}"
        # Its second half is longer than what workers have prefetched while the first step compiled.
        batch, steps = (8, 6) if self.quick else (BATCH, 8 * cores)
        files = [str(path) for path in paths] * (batch * steps // len(paths) // VIEWS + 1)
        run = folder / name.replace(" ", "_").replace(",", "")
        settings = [
            *stage_runs.write_split(folder, "k150", "train", files),
            "+experiments=omnimae/omnimain_train_video", "+trainer=mae_k150_config", f"trainer/model={model}",
            f"launcher.experiment_log_dir={run}", f"batch_size={batch}", f"num_workers={cores}", "epochs=1",
            f"trainer.limit_train_batches={steps}", f"trainer.logging.log_freq={steps // 2}", "trainer.mode=train_only",
            "trainer.logging.pictures_every_epochs=null", "submitit.use_cluster=false", "launcher.num_nodes=1",
            "launcher.gpus_per_node=1", f"trainer.accelerator={DEVICE.type}", f"trainer.compile={str(ON_GPU).lower()}",
            "lr=1e-4", *(["image_size=32", "short_side=40", "num_frames=4"] if self.quick else []),
        ]  # fmt: skip
        run_command(settings)
        if self.quick:
            return  # starting took most of the time
        last = read_metrics(run)[-1]  # of the second half, without the start
        waiting = 100 * last["data_wait"]
        goal = WAITING if "prepared" in kind else None
        self.report.ratios.append(Ratio(f"waiting for data, {name}, {cores} cores", [waiting], goal, "%", at_most=True))
        self.report.facts[f"clips per second of a run, {name}"] = last["clips_per_second"]
        print(f"  {name}: {last['clips_per_second']:.1f} clips per second, {waiting:.1f} % waiting", flush=True)

    # ---- attention ------------------------------------------------------------------------------------------------

    def narrow_heads(self) -> None:
        """The decoder's attention (heads of 24) alone: kernels of torch, and heads padded to 32."""
        if not self.has_time("attention with heads of 24", needed=30):
            return
        batch, heads, tokens = (1, 2, 64) if self.quick else (BATCH, 16, 1568)
        qkv = torch.randn(batch, tokens, 3, heads, 24, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        backends: dict[str, SDPBackend | None] = {"torch's choice": None}
        if ON_GPU:
            backends |= {
                "flash": SDPBackend.FLASH_ATTENTION,
                "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
                "cuDNN": SDPBackend.CUDNN_ATTENTION,
            }
        sides: dict[str, Run] = {}
        for name, backend in backends.items():
            for width in (24, 32):
                side = f"attention with heads of 24, {name}{', padded to 32' * (width == 32)}"
                run = functools.partial(attend, qkv, width, attention_of(backend))
                if self.report.works(side, run):
                    sides[side] = run
        if self.ways[-1]:
            from torch.nn.attention.flex_attention import flex_attention

            run = functools.partial(attend, qkv, 32, torch.compile(flex_attention))
            if self.report.works("FlexAttention", run):
                sides["attention with heads of 24, FlexAttention, padded to 32"] = run
        if self.quick:
            return
        turns = {side: timed(run, times=20) for side, run in sides.items()}
        self.report.seconds |= interleaved(turns, self.rounds, warm_up=0)
        first = "attention with heads of 24, torch's choice"
        for side in [name for name in sides if name != first]:
            self.report.times_as_fast(f"{side}, against torch's choice", side, first)


def matmul_rate(size: int) -> float:
    """Return the operations per second of a large matrix product in bf16; the best of five."""
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    run = timed(lambda: a @ b, times=1 if size < 4096 else 20)
    return 2 * size**3 / min(run() for _ in range(6))


@torch.no_grad()
def scores(model: nn.Module, video: Tensor) -> Tensor:
    with torch.autocast(DEVICE.type, torch.bfloat16):
        return model(video, 0)


def attention_of(backend: SDPBackend | None) -> Callable[..., Tensor]:
    """Return torch's attention by one backend, or by that of its choice."""

    def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        with sdpa_kernel(backend) if backend is not None else contextlib.nullcontext():
            return F.scaled_dot_product_attention(q, k, v, scale=scale)

    return attention


def attend(qkv: Tensor, width: int, attention: Callable[..., Tensor]) -> None:
    """Run attention forward and backward as a block does, with heads padded with zeros to `width`."""
    head = qkv.shape[-1]
    parts = qkv.permute(2, 0, 3, 1, 4).unbind()  # of one projection: (B, heads, N, D / heads)
    padded = [F.pad(part, (0, width - head)) if width > head else part for part in parts]
    attention(*padded, scale=head**-0.5)[..., :head].sum().backward()
    qkv.grad = None


def positions_to_device(model: nn.Module) -> None:
    """Move the position tables of Hugging Face's VideoMAE, which are no buffers and travel at each step, to the device."""
    for part in model.modules():
        if isinstance(table := getattr(part, "position_embeddings", None), Tensor):
            part.position_embeddings = table.to(DEVICE)


def kernels(run: Run, rows: int = 20) -> str:
    """Return the kernels of a step by time, as a table."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if ON_GPU else [])]
    with profile(activities=activities) as trace:
        run()
        synchronize()
    order = "self_cuda_time_total" if ON_GPU else "self_cpu_time_total"
    return trace.key_averages().table(sort_by=order, row_limit=rows, max_name_column_width=60)


def repeated(paths: list[Path], copies: int) -> list[Path]:
    return (paths * copies)[:copies]


def release() -> None:
    """Free what compiled graphs and cycles hold of the GPU's memory."""
    torch._dynamo.reset()
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()


def run_speed(quick: bool, write: Callable[[dict[str, Any]], None]) -> None:
    """Measure everything and `write` the results after each part; a part that fails is noted, and the next one goes ahead."""
    speed = Speed(quick)
    report = speed.report
    with tempfile.TemporaryDirectory() as name:
        parts: dict[str, Run] = {
            "pretraining steps": speed.pretraining,
            "attention": speed.narrow_heads,
            "data": functools.partial(speed.data, Path(name)),
            "downstream": speed.downstream,
            "largest batches": speed.largest_batches,
        }
        for what, part in parts.items():
            start = time.monotonic()
            print(what, flush=True)
            try:
                part()
            except Exception:
                traceback.print_exc()
                speed.failed.append(what)
            print(f"  {time.monotonic() - start:.0f} s", flush=True)
            release()
            write({
                "quick": quick,
                "machine": report.machine | describe(),
                "facts": report.facts,
                "steps": speed.steps,
                "seconds": report.seconds,
                "ratios": [vars(ratio) | {"row": ratio.row()} for ratio in report.ratios],
                "profiles": speed.profiles,
                "failed": speed.failed,
            })  # fmt: skip
