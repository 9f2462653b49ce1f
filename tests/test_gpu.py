"""`make gpu` without a GPU: what only a GPU runs, on a stand-in; failures and interruptions; the tables and the charts."""

import contextlib
import fcntl
import io
import json
import signal
import subprocess
import sys
from unittest import mock

import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import checks, device, recipe, speed, tables
from omnivision.data.batch import Batch
from tests.fixtures import Folder
from tests.models import test_mae


class StandIn(Folder):
    """torch.cuda as a stand-in, with 80 GB of memory."""

    def setUp(self):
        super().setUp()
        self.cuda = mock.MagicMock(**{
            "mem_get_info.return_value": (60 * 10**9, 80 * 10**9), "get_device_name.return_value": "NVIDIA H200",
            "memory_allocated.return_value": 10**9, "max_memory_allocated.return_value": 3 * 10**9,
            "memory_reserved.return_value": 10**9, "get_device_properties.return_value.uuid": "1234",
        })  # fmt: skip
        self.cuda.version = "13.0"
        for module in (device, checks, speed):
            self.enterContext(mock.patch.object(module, "ON_GPU", True))
        self.enterContext(mock.patch.object(torch, "cuda", self.cuda))
        self.enterContext(contextlib.redirect_stdout(io.StringIO()))

    def test_memory_and_waits(self):
        self.assertEqual(device.peak_memory(lambda: None), 2 * 10**9)
        self.assertEqual(device.free_memory(), int(60e9 * device.MARGIN))
        self.assertGreaterEqual(device.timed(lambda: None, 3)(), 0)
        device.sync_debug_mode("error")
        self.cuda.set_sync_debug_mode.assert_called_once_with("error")
        with device.little_memory(3 * 10**9):
            pass
        shares = [call.args[0] for call in self.cuda.set_per_process_memory_fraction.call_args_list]
        self.assertEqual(shares, [0.05, 1.0])

    def test_description(self):
        answer = mock.Mock(stdout="580.1, 1980 MHz, 1980 MHz, 3201 MHz, 700 W\n")
        with mock.patch("subprocess.run", return_value=answer) as run:
            found = device.describe()
        self.assertEqual(
            (found["device"], found["driver_version"], found["power.limit"]), ("NVIDIA H200", "580.1", "700 W")
        )
        self.assertIn("--id=GPU-1234", run.call_args.args[0])
        with mock.patch("subprocess.run", side_effect=subprocess.TimeoutExpired("nvidia-smi", 20)):
            self.assertNotIn("driver_version", device.describe())

    def test_the_largest_batch_is_linear_in_memory(self):
        measured = speed.Speed(quick=True)
        sizes = iter([1.8e9, 2.6e9, 4.2e9, 7.4e9])  # bytes for 8 and 32 clips, of ours and of a peer that takes more
        with (
            mock.patch.object(speed, "peak_memory", lambda run: int(next(sizes))),
            mock.patch.object(speed.Geometry, "step", return_value=lambda: None),
        ):
            found = measured.largest_batch("vittiny")
        self.assertEqual(found % speed.BATCH, 0)
        free = 60e9 * device.MARGIN - 7.4e9
        self.assertAlmostEqual(found, speed.BATCH + free / (4.8e9 / 24), delta=speed.BATCH)

    def test_a_batch_that_does_not_fit_after_all_is_made_smaller(self):
        measured = speed.Speed(quick=True)
        compare = mock.Mock(side_effect=(torch.OutOfMemoryError("no"), None))
        with mock.patch.multiple(measured, compare=compare, largest_batch=lambda size: 100):
            measured.largest_batches()
        self.assertEqual([call.args[0].batch for call in compare.call_args_list], [100, 85])

    def test_a_size_that_does_not_fit_hides_no_other(self):
        measured = speed.Speed(quick=True)
        measured.sizes = ["vittiny", "vitsmall"]
        with mock.patch.object(measured, "compare", side_effect=(torch.OutOfMemoryError("no"), None)) as compare:
            measured.pretraining()
        self.assertEqual((compare.call_count, len(measured.failed)), (2, 1))

    def test_what_no_longer_fits_the_time_is_left_out(self):
        measured = speed.Speed(quick=True)
        measured.deadline = 0
        for part in (measured.largest_batches, measured.downstream, measured.narrow_heads):
            part()
        self.assertEqual(list(measured.report.facts.values()).count("left out, no time"), 3)
        self.assertEqual(measured.steps, [])

    def test_a_batch_travels_on_its_own_stream(self):
        batch = Batch(torch.zeros(2, 3), torch.zeros(2), torch.zeros(2), "a", ["x", "y"])
        stream = mock.Mock()
        with mock.patch.object(torch.Tensor, "record_stream") as recorded:
            moved = batch.to(torch.device("cpu"), stream)
        self.assertEqual(recorded.call_count, 3, "video, label and index")
        self.cuda.current_stream().wait_stream.assert_called_once_with(stream)
        self.assertEqual(len(moved), 2)

    def test_batches_travel_beside_the_computation(self):
        def event(name: str, start: float, end: float) -> mock.Mock:
            made = mock.Mock(device_type=torch.autograd.DeviceType.CUDA, time_range=mock.Mock(start=start, end=end))
            made.name = name
            return made

        copy = "Memcpy HtoD (Pinned -> Device)"
        events = [event("gemm", 0, 10), event(copy, 8, 12), event(copy, 10, 11), event("Memcpy HtoD (Pageable)", 1, 2)]
        self.assertEqual(checks.copies_beside_kernels(events), 1)
        batch = mock.Mock()
        for pinned, beside in ((2, 2), (1, 2), (2, 1)):
            made, trace = checks.Checks(self.folder), mock.MagicMock()
            trace.__enter__.return_value.events.return_value = events[:1] + events[1:2] * beside
            tensors = {name: mock.Mock(**{"is_pinned.return_value": name < pinned}) for name in (0, 1)}
            batch._tensors.return_value = tensors
            with (
                mock.patch.object(checks, "profile", return_value=trace),
                mock.patch.object(checks.Trainer, "train_step"),
                mock.patch.object(checks.Checks, "run", lambda *_: checks.Trainer.train_step(mock.Mock(), batch)),
                mock.patch.object(checks.Checks, "starts", {"mae": ""}),
            ):
                checks.transfers(made)
            verdicts = ["ok" if count == 2 else "failed" for count in (pinned, beside)]
            self.assertEqual([row.verdict for row in made.rows], verdicts)

    def test_a_row_that_only_a_gpu_has(self):
        made = checks.Checks(self.folder)
        with (
            mock.patch.object(checks.Checks, "run"),
            mock.patch.object(checks, "read_summary", return_value={"steps": 18}),
            mock.patch.object(checks.Checks, "starts", {"mae": "", "ft": ""}),
        ):
            checks.no_waiting(made)
        self.assertEqual([(row.found, row.verdict) for row in made.rows], [("none in 54 steps", "ok")])


class Failures(Folder):
    def setUp(self):
        super().setUp()
        self.output = self.enterContext(contextlib.redirect_stdout(io.StringIO()))
        self.errors = self.enterContext(contextlib.redirect_stderr(io.StringIO()))
        self.enterContext(mock.patch("signal.signal"))
        self.out = self.folder / "out"

    def verdicts(self, *which: object) -> list[str]:
        written = mock.Mock()
        with mock.patch.object(checks, "CHECKS", which):
            checks.run_checks(True, written)
        return [row["verdict"] for row in written.call_args.args[0]["rows"]]

    def main(self, *arguments: str) -> object:
        with mock.patch.object(sys, "argv", ["gpu", "--quick", "--out", str(self.out), *arguments]):
            try:
                return command.main()
            except SystemExit as end:
                return end.code

    def test_a_wrong_weight_is_found(self):
        published = test_mae.published_model

        def wrong(dtype: torch.dtype) -> torch.nn.Module:
            model = published(dtype)
            with torch.no_grad():
                model.trunk.blocks[1].attn.qkv.weight[7] += 0.5
            return model

        with mock.patch.object(test_mae, "published_model", wrong):
            self.assertIn("failed", self.verdicts(checks.parity))

    def test_an_exception_fails_a_check_and_the_next_one_runs(self):
        broken, after = mock.Mock(side_effect=ValueError("no")), mock.Mock()
        broken.__name__, after.__name__ = "broken", "after"
        self.assertEqual(self.verdicts(broken, after), ["failed"])
        after.assert_called_once()

    def test_an_interrupted_run_ends_the_checks(self):
        for code in (130, 143):
            with mock.patch("tests.stage_runs.run_in_process", return_value=mock.Mock(returncode=code)):
                with self.assertRaises(KeyboardInterrupt) as stop:
                    device.run_command(["launcher.experiment_log_dir=a"])
                self.assertEqual(stop.exception.args, (code - 128,))
                device.run_command([], code)

    def test_without_a_gpu_only_small_sizes_run(self):
        with (
            mock.patch.object(sys, "argv", ["gpu", "--out", str(self.out)]),
            mock.patch("torch.cuda.is_available", return_value=False),
        ):
            self.assertEqual((command.main(), self.out.exists()), (2, False))

    def test_bad_arguments(self):
        with mock.patch.object(recipe, "run_recipe"):
            for minutes in ("nan", "inf", "0", "-5", "1e5", "x"):
                self.assertEqual(self.main(f"--recipe={minutes}"), 2)
            self.assertEqual(self.main("checks", "--recipe", "1"), 2)
        self.assertEqual(self.main("--out", ""), 2)

    def test_a_folder_that_cannot_be_written_to(self):
        self.out.touch()
        self.assertEqual(self.main(), 1)
        self.out.unlink()
        (self.out / "checks.json").mkdir(parents=True)
        self.assertEqual(self.main(), 1)
        (self.out / "checks.json").rmdir()
        with open(self.out / ".lock", "w") as other, mock.patch.object(command, "run_in_child", return_value=[]):
            fcntl.flock(other, fcntl.LOCK_EX)
            self.assertEqual(self.main(), 1)
        self.assertEqual(self.errors.getvalue().count("error: "), 3)

    def test_our_side_must_work_and_a_peer_may_not(self):
        for method, failed in (("ours", 1), ("huggingface", 0)):
            measured = speed.Speed(quick=True)
            with (
                mock.patch.object(speed.Geometry, method, side_effect=ValueError("no")),
                mock.patch.object(speed, "kernels", return_value=""),
                mock.patch.object(speed, "peak_memory", return_value=0),
            ):
                measured.pretraining()
            self.assertEqual((len(measured.failed), len(measured.steps)), (failed, 1))

    def test_how_a_part_ends(self):
        child = mock.Mock(**{"wait.return_value": -9}, pid=2**22 + 1)  # above the largest of Linux
        with mock.patch("subprocess.Popen", return_value=child):
            self.assertEqual(command.run_in_child("checks", True, self.folder), ["checks (signal 9)"])
            child.wait.side_effect = subprocess.TimeoutExpired("checks", 1), 0
            self.assertIn("checks (ended after", command.run_in_child("checks", True, self.folder)[0])
            child.wait.side_effect = KeyboardInterrupt, 0, 0
            with self.assertRaises(KeyboardInterrupt):
                command.run_in_child("checks", True, self.folder)
            child.terminate.assert_called_once()

    def test_an_interruption_keeps_the_results(self):
        results = {"quick": True, "machine": {"device": "CPU"}, "rows": []}

        def part(*_: object) -> list[str]:
            (self.out / "checks.json").write_text(json.dumps(results))
            raise KeyboardInterrupt(signal.SIGTERM)

        with mock.patch.object(command, "run_in_child", part):
            self.assertEqual(self.main(), 143)
        self.assertIn("A rehearsal on the CPU", (self.out / "table.md").read_text())

    def test_the_exit_code_and_the_table(self):
        row = {"what": "a thing", "found": "2", "expected": "at most 1", "verdict": "failed"}
        steps = [
            {"step": "ours, vittiny, batch 2", "seconds": 0.5, "clips per second": 4.0, "% of the matmul rate": 40.0},
            {"step": "Hugging Face, vittiny, batch 2", "seconds": 0.5, "clips per second": 4.0},
        ]
        measured = {
            "machine": {"device": "CPU"}, "facts": {"a": {"b": 1 / 3}}, "steps": steps, "ratios": [],
            "profiles": {"ours": "mm"}, "failed": ["data"],
        }  # fmt: skip
        results = {"checks": {"machine": {"device": "CPU"}, "rows": [row]}, "speed": measured}

        def part(name: str, *_: object) -> list[str]:
            (self.out / f"{name}.json").write_text(json.dumps(results[name]))
            return []

        self.out.mkdir()
        (self.out / "speed.json").write_text("of an earlier run")
        with mock.patch.object(command, "run_in_child", part):
            self.assertEqual(self.main("checks"), 1)
            self.assertIn("failed: a thing\n", self.errors.getvalue())
            self.assertEqual(self.main(), 1)
        self.assertIn("a thing; data", self.errors.getvalue())
        text = (self.out / "table.md").read_text()
        self.assertIn("| a thing | 2 | at most 1 | **failed** |", text)
        self.assertIn("| ours, vittiny, batch 2 | 0.5 | 4 | 40 |  |", text)
        self.assertIn("| a, b | 0.3333 |", text)
        self.assertTrue((self.out / "steps.png").is_file())
        with mock.patch.dict(sys.modules, {"matplotlib.figure": None}):
            tables.write_charts(results, self.folder)
        self.assertFalse((self.folder / "steps.png").exists())

    def test_the_recipe_deletes_only_its_own_folder(self):
        (self.out / "recipe").mkdir(parents=True)
        for name in ("recipe/mine", "recipe.md"):
            (self.out / name).touch()
        self.assertEqual(self.main("--recipe", "1"), 1)
        self.assertTrue((self.out / "recipe/mine").exists())
        self.assertFalse((self.out / "recipe.md").exists())

    def test_the_recipe(self):
        def trained(run: recipe.Recipe, name: str, seed: int) -> None:
            if (name, seed) == ("probe", 2):
                raise device.UserError("seed_2/probe ended with exit code 70")
            run.rows.append({"run": name, "seed": seed, "passes": 10, "top1": None if name == "mae" else 50.0 * seed})

        with (
            mock.patch.object(recipe, "QUICK_SEEDS", recipe.SEEDS),
            mock.patch.object(recipe, "write_demo_data"),
            mock.patch.object(recipe.Recipe, "train", trained),
        ):
            self.assertEqual(self.main("--recipe", "1"), 1)
        text = (self.out / "recipe.md").read_text()
        self.assertIn("| finetune | align_synthetic | 12 | 10 | 50.0, 100.0 | 75.0 | 16.7 |", text)
        self.assertIn("of 6 validation videos", text)
        self.assertEqual(len(json.loads((self.out / "recipe.json").read_text())["runs"]), 14)
