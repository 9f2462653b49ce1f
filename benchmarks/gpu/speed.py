"""How fast is training on this device? Steps beside a measured matmul rate and Hugging Face's VideoMAE, and whole runs."""

from __future__ import annotations

import functools
import gc
import os
import tempfile
import time
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
from benchmarks.gpu.device import DEVICE, ON_GPU, describe, free_memory, peak_memory, synchronize, timed
from benchmarks.harness import Ratio, Report, interleaved
from benchmarks.loading import batches_per_second, prepared
from benchmarks.steps import cross_entropy
from omnivision.models.classifier import VideoClassifier, train_mode
from omnivision.models.vit import VisionTransformer
from tests import stage_runs
from tests.runs import read_metrics

BATCH = 32
LARGEST = 512  # batch to try
SECONDS = 240.0  # for everything; compiling takes most of them, and what no longer fits is left out
GOALS = {"vitbase": 45.0, "vitlarge": 50.0}  # % of the matmul rate, compiled
COMPILED, SHIPPED = (
    1.2,
    1.5,
)  # times as fast as Hugging Face, compiled against compiled, and compiled against as shipped
WAITING = 5.0  # % of the time, on prepared videos
VIEWS = 4


class Speed:
    """The measurements of one run, collected in a report with a table of steps."""

    def __init__(self, quick: bool) -> None:
        self.quick, self.deadline = quick, time.monotonic() + SECONDS
        self.report = Report("speed", f"Training on {describe()['device']}, bf16", "s")
        self.steps: list[dict[str, Any]] = []
        self.profiles: dict[str, str] = {}
        self.rate = matmul_rate(1024 if quick else 8192)
        self.report.facts["matrix product in bf16, TFLOP/s"] = round(self.rate / 1e12, 2)
        self.ways = [False, True] if ON_GPU or (CAN_COMPILE and not quick) else [False]
        self.rounds = 2 if quick else 3

    # ---- steps ----------------------------------------------------------------------------------------------------

    def pretraining(self) -> None:
        """Steps of MAE, ours and Hugging Face's, at batch 32 and at the largest that fits."""
        small = 2 if self.quick else BATCH
        for size in ("vittiny",) if self.quick else GOALS:
            self.compare(self.geometry(size, small), goals=True)
        for size in ("vittiny",) if self.quick else GOALS:
            if self.has_time(f"{size}, the largest batch", needed=120):
                self.compare(self.geometry(size, self.largest_batch(size, small)), goals=False)

    def has_time(self, what: str, needed: float) -> bool:
        """Return whether enough of the time is left; if not, the report says so."""
        if left_out := time.monotonic() + needed > self.deadline:
            self.report.facts[what] = "left out, no time"
        return not left_out

    def geometry(self, size: str, batch: int) -> Geometry:
        frames, image = (4, 64) if self.quick else (16, 224)
        return Geometry(size, batch, frames, image, DEVICE)

    def largest_batch(self, size: str, batch: int) -> int:
        """Return the largest batch that both sides have memory for, by the memory of two smaller ones."""
        if not ON_GPU:
            return batch + 1
        peaks = []
        for number in (batch // 4, batch):
            shape, most = self.geometry(size, number), 0
            for make in (shape.ours, shape.huggingface):
                model = make()
                most = max(most, peak_memory(shape.step(model, torch.bfloat16)))
                del model
                release()
            peaks.append(most)
        clip = (peaks[1] - peaks[0]) / (batch - batch // 4)
        fits = int((free_memory() - peaks[1]) / clip) + batch
        return max(batch, min(LARGEST, fits // BATCH * BATCH))

    def compare(self, shape: Geometry, goals: bool) -> None:
        """Time all sides of a shape in turn."""
        name = f"{shape.size}, batch {shape.batch}"
        sides: dict[str, Callable[[], None]] = {}
        models: dict[str, nn.Module] = {"ours": shape.ours()}
        if self.report.works("Hugging Face", shape.huggingface):
            models["Hugging Face"] = shape.huggingface()
        for side, model in models.items():
            for compiled in self.ways:
                if compiled and side != "ours" and not goals:
                    continue  # compiling takes long
                sides[f"{side}, {name}{', compiled' * compiled}"] = shape.step(model, torch.bfloat16, compiled)
        memory = {}
        for side, run in sides.items():
            run()  # compiles, and makes the optimizer's state
            memory[side] = peak_memory(run)
        operations = shape.count()[0]
        self.time(sides, shape.batch, memory, operations, shape.size)
        ours, best = f"ours, {name}", f"ours, {name}{', compiled' * self.ways[-1]}"
        peer = f"Hugging Face, {name}"
        if goals:
            used = [100 * operations / seconds / self.rate for seconds in self.report.seconds[best]]
            self.report.ratios.append(Ratio(f"matmul rate used by {best}", used, GOALS.get(shape.size), "%"))
        self.report.times_as_fast(f"{best}, against Hugging Face as shipped", best, peer, SHIPPED if goals else None)
        if best != ours:
            self.report.times_as_fast(f"{ours}, against Hugging Face, neither compiled", ours, peer)
            both = f"{best}, against Hugging Face, both compiled"
            self.report.times_as_fast(both, best, f"{peer}, compiled", COMPILED if goals else None)
        if (goals and any(ratio.reached is False for ratio in self.report.ratios[-4:])) or self.quick:
            self.profiles[best] = kernels(sides[best])
        del sides, models
        release()

    def time(
        self,
        sides: dict[str, Callable[[], Any]],
        batch: int,
        memory: dict[str, int] | None = None,
        operations: float | None = None,
        size: str = "",
    ) -> None:
        """Time sides in turn, and add their rows to the table of steps."""
        turns = {side: timed(run, times=1 if self.quick else 5) for side, run in sides.items()}
        self.report.seconds |= interleaved(turns, self.rounds)
        for side in sides:
            seconds = self.report.median(side)
            row = {"step": side, "size": size, "seconds": seconds, "clips per second": batch / seconds}
            if operations is not None:
                row["% of the matmul rate"] = 100 * operations / seconds / self.rate
            if memory and memory[side]:
                row["memory, GB"] = memory[side] / 1e9
            self.steps.append(row)
            print(f"  {side}: {seconds:.4f} s, {batch / seconds:.1f} clips per second", flush=True)

    def downstream(self) -> None:
        """Steps of fine-tuning and probing, and an evaluation with six views."""
        size, frames, image, batch = ("vittiny", 4, 64, 2) if self.quick else ("vitbase", 16, 224, 16)
        video = torch.randint(0, 256, (batch, 3, frames, image, image), dtype=torch.uint8, device=DEVICE)
        label = torch.arange(batch, device=DEVICE)
        sides: dict[str, Callable[[], Any]] = {}
        for name, frozen in (("fine-tuning", False), ("probing", True)):
            model = VideoClassifier(VisionTransformer(*SIZES[size][0], num_frames=frames, image_size=image), [101])
            model.to(DEVICE).trunk.requires_grad_(not frozen)
            train_mode(model)
            for compiled in self.ways:
                run: Any = torch.compile(model) if compiled else model
                name_of_side = f"{name}, {size}, batch {batch}{', compiled' * compiled}"
                sides[name_of_side] = step(model, cross_entropy(run, video, label), torch.bfloat16)
        sides[f"six views, {size}, {batch // 2} videos"] = functools.partial(
            scores, model.eval(), video[: batch // 2].repeat(6, 1, 1, 1, 1)
        )
        self.time(sides, batch)

    # ---- data -----------------------------------------------------------------------------------------------------

    def data(self, folder: Path) -> None:
        """How many cores feed this device: the loader on all cores beside steps, and runs of both together."""
        cores = len(os.sched_getaffinity(0))
        seconds, copies = (4, 8) if self.quick else (10, 64)
        raw = videos.make(folder, 340, 256, seconds, copies=copies)
        large = videos.make(folder, 1280, 720, seconds=4, copies=4)
        kinds = {
            "340 x 256": raw,
            "340 x 256, prepared": repeated(prepared(folder, raw[:1]), copies),
            "1280 x 720": repeated(large, copies),
            "1280 x 720, prepared": repeated(prepared(folder, large[:1], short_side=256), copies),
        }
        fastest: dict[str, float] = {}
        for row in self.steps:
            if row["step"].startswith("ours"):
                fastest[row["size"]] = max(fastest.get(row["size"], 0), row["clips per second"])
        self.report.facts["clips per second of the loader on one core"] = rates = {}
        for kind, paths in kinds.items():
            data = videos.pretraining_samples(videos.split(folder, "raw", paths))
            batches = batches_per_second(data, cores, 8 if self.quick else 20 * cores)
            rates[kind] = round(8 * batches / cores, 1)
        self.report.facts["cores that feed one device"] = {
            kind: {model: round(need / rate, 1) for model, need in fastest.items()} for kind, rate in rates.items()
        }
        for kind in ("340 x 256", "340 x 256, prepared"):
            for model in ("vitmicro",) if self.quick else GOALS:
                if self.has_time(f"a run of {model}, {kind}", needed=20):
                    self.whole_run(folder, kind, kinds[kind], model, cores)

    def whole_run(self, folder: Path, kind: str, paths: list[Path], model: str, cores: int) -> None:
        """Run the training command on real videos, and add its rate and its share of time waiting for data."""
        name = f"{model}, {kind}"
        batch, steps = (8, 6) if self.quick else (64, 40)
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
        result = stage_runs.run_in_process(settings)
        if result.returncode:
            raise RuntimeError(result.stderr[-2000:])
        last = read_metrics(run)[-1]  # of the second half, without the start
        waiting = 100 * last["data_wait"]
        goal = WAITING if "prepared" in kind and not self.quick else None
        self.report.ratios.append(Ratio(f"waiting for data, {name}, {cores} cores", [waiting], goal, "%", at_most=True))
        self.report.facts[f"clips per second of a run, {name}"] = round(last["clips_per_second"], 1)
        print(f"  {name}: {last['clips_per_second']:.1f} clips per second, {waiting:.1f} % waiting", flush=True)

    # ---- attention ------------------------------------------------------------------------------------------------

    def narrow_heads(self) -> None:
        """The decoder's attention (heads of 24) alone: kernels of torch, and heads padded to 32."""
        shape = (1, 2, 64, 24) if self.quick else (BATCH, 16, 1568, 24)
        q, k, v = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        backends = {
            "torch's choice": None,
            "flash": SDPBackend.FLASH_ATTENTION,
            "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
            "cuDNN": SDPBackend.CUDNN_ATTENTION,
        }
        sides: dict[str, Callable[[], None]] = {}
        for name, backend in backends.items():
            for width in (24, 32):
                run = functools.partial(attend, q, k, v, width, backend)
                side = f"attention with heads of 24, {name}{', padded to 32' * (width == 32)}"
                if self.report.works(side, run):
                    sides[side] = run
        if self.ways[-1]:
            from torch.nn.attention.flex_attention import flex_attention

            run = functools.partial(attend_flex, torch.compile(flex_attention), q, k, v)
            if self.report.works("FlexAttention", run):
                sides["attention with heads of 24, FlexAttention, padded to 32"] = run
        turns = {side: timed(run, times=1 if self.quick else 20) for side, run in sides.items()}
        self.report.seconds |= interleaved(turns, self.rounds)
        for side in list(sides)[1:]:
            self.report.times_as_fast(f"{side}, against torch's choice", side, next(iter(sides)))


def matmul_rate(size: int) -> float:
    """Return the operations per second of a large matrix product in bf16; the best of five."""
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    run = timed(lambda: a @ b, times=1 if size < 4096 else 20)
    return 2 * size**3 / min(run() for _ in range(6))


@torch.no_grad()
def scores(model: nn.Module, video: Tensor) -> Tensor:
    with torch.autocast(DEVICE.type, torch.bfloat16):
        return model(video, 0)


def attend(q: Tensor, k: Tensor, v: Tensor, width: int, backend: SDPBackend | None) -> None:
    """Run attention forward and backward, with heads padded with zeros to `width`."""
    scale = q.shape[-1] ** -0.5
    if width > q.shape[-1]:
        q, k, v = (F.pad(each, (0, width - each.shape[-1])) for each in (q, k, v))
    backends = [backend] if backend is not None else list(SDPBackend.__members__.values())[1:]
    with sdpa_kernel(backends):
        result = F.scaled_dot_product_attention(q, k, v, scale=scale)
    result.sum().backward()  # the padding adds zeros


def attend_flex(attention: Any, q: Tensor, k: Tensor, v: Tensor) -> None:
    padded = [F.pad(each, (0, 32 - q.shape[-1])) for each in (q, k, v)]
    attention(*padded, scale=q.shape[-1] ** -0.5).sum().backward()


def kernels(run: Callable[[], None], rows: int = 20) -> str:
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


def run_speed(quick: bool) -> dict[str, Any]:
    """Measure everything; a part that fails is a fact of the report, and the next one goes ahead."""
    speed = Speed(quick)
    with tempfile.TemporaryDirectory() as name:
        parts = (speed.pretraining, functools.partial(speed.data, Path(name)), speed.narrow_heads, speed.downstream)
        for part in parts:
            start = time.monotonic()
            print(f"{getattr(part, 'func', part).__name__}", flush=True)
            speed.report.works(f"{getattr(part, 'func', part).__name__} ended early", part)
            print(f"  {time.monotonic() - start:.0f} s", flush=True)
            release()
    report = speed.report
    return {
        "machine": report.machine | describe(),
        "facts": report.facts,
        "steps": speed.steps,
        "seconds": report.seconds,
        "ratios": [vars(ratio) | {"row": ratio.row()} for ratio in report.ratios],
        "profiles": speed.profiles,
    }
