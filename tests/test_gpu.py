"""`make gpu` without a GPU: what only a GPU runs, on a stand-in; failures are told; the table and the charts."""

import contextlib
import io
import json
import sys
from unittest import mock

import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import checks, device, speed, tables
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
        with device.little_memory(0.1):
            pass
        shares = [call.args[0] for call in self.cuda.set_per_process_memory_fraction.call_args_list]
        self.assertEqual(shares, [0.1, 1.0])

    def test_description(self):
        answer = mock.Mock(stdout="580.1, 1980 MHz, 1980 MHz, 3201 MHz, 700 W\n")
        with mock.patch("shutil.which", return_value="/nvidia-smi"), mock.patch("subprocess.run", return_value=answer):
            found = device.describe()
        self.assertEqual(
            (found["device"], found["driver_version"], found["power.limit"]), ("NVIDIA H200", "580.1", "700 W")
        )

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
        kinds = torch.autograd.DeviceType
        events = [
            mock.Mock(device_type=kinds.CUDA),
            mock.Mock(device_type=kinds.CUDA),
            mock.Mock(device_type=kinds.CPU),
        ]
        for event, name in zip(events, ("Memcpy HtoD (Pinned -> Device)", "gemm", "Memcpy HtoD"), strict=True):
            event.name = name
        trace = mock.MagicMock()
        trace.__enter__.return_value.events.return_value = events
        for is_computing in (True, False):
            made = checks.Checks(self.folder)
            self.cuda.Event.return_value.query.return_value = not is_computing
            with (
                mock.patch.object(checks, "profile", return_value=trace),
                mock.patch.object(checks.Checks, "run"),
                mock.patch.object(checks.Checks, "starts", {"mae": ""}),
                mock.patch.object(torch.Tensor, "pin_memory", lambda tensor: tensor),
                mock.patch.object(torch.Tensor, "record_stream"),
            ):
                checks.transfers(made)
            self.assertEqual([row.passed for row in made.rows], [True, is_computing])
        self.assertEqual(made.rows[0].found, "1 of 1 copies")

    def test_a_row_that_only_a_gpu_has(self):
        made = checks.Checks(self.folder)
        with mock.patch.object(checks.Checks, "run"), mock.patch.object(checks.Checks, "starts", {"mae": "", "ft": ""}):
            checks.no_waiting(made)
        self.assertEqual([row.passed for row in made.rows], [True])


class Failures(Folder):
    def setUp(self):
        super().setUp()
        self.output = self.enterContext(contextlib.redirect_stdout(io.StringIO()))
        self.enterContext(contextlib.redirect_stderr(io.StringIO()))

    def rows(self, *which: object) -> list[bool | None]:
        written = mock.Mock()
        with mock.patch.object(checks, "CHECKS", which):
            checks.run_checks(True, written)
        return [row["passed"] for row in written.call_args.args[0]["rows"]]

    def test_a_wrong_weight_is_found(self):
        published = test_mae.published_model

        def wrong(dtype: torch.dtype) -> torch.nn.Module:
            model = published(dtype)
            with torch.no_grad():
                model.trunk.blocks[1].attn.qkv.weight[7] += 0.5
            return model

        with mock.patch.object(test_mae, "published_model", wrong):
            self.assertIn(False, self.rows(checks.parity))

    def test_an_exception_fails_a_check_and_the_next_one_runs(self):
        broken, after = mock.Mock(side_effect=ValueError("no")), mock.Mock()
        broken.__name__, after.__name__ = "broken", "after"
        self.assertEqual(self.rows(broken, after), [False])
        after.assert_called_once()

    def test_without_a_gpu_only_small_sizes_run(self):
        with (
            mock.patch.object(sys, "argv", ["gpu", "--out", str(self.folder / "new")]),
            mock.patch("torch.cuda.is_available", return_value=False),
            self.assertRaises(SystemExit) as ended,
        ):
            command.main()
        self.assertEqual((ended.exception.code, (self.folder / "new").exists()), (2, False))

    def test_the_exit_code_and_the_table(self):
        row = {"what": "a thing", "found": "2", "expected": "at most 1", "passed": False}
        steps = [
            {"step": "ours, vittiny, batch 2", "seconds": 0.5, "clips per second": 4.0, "% of the matmul rate": 40.0}
        ]
        measured = {
            "machine": {"device": "CPU"}, "facts": {"a": {"b": 1}}, "steps": steps, "ratios": [], "profiles": {"ours": "mm"},
            "failed": ["data"],
        }  # fmt: skip
        results = {"checks": {"machine": {"device": "CPU"}, "rows": [row]}, "speed": measured}

        def part(words: list[str], **_: object) -> mock.Mock:
            (self.folder / f"{words[3]}.json").write_text(json.dumps(results[words[3]]))
            return mock.Mock(returncode=0)

        (self.folder / "speed.json").write_text("of an earlier run")
        arguments = ["gpu", "--quick", "--out", str(self.folder)]
        with (
            mock.patch.object(sys, "argv", arguments),
            mock.patch("subprocess.run", part),
            contextlib.redirect_stderr(io.StringIO()) as errors,
        ):
            self.assertEqual(command.main(), 1)
        self.assertIn("a thing, data", errors.getvalue())
        text = (self.folder / "table.md").read_text()
        self.assertIn("| a thing | 2 | at most 1 | **failed** |", text)
        self.assertIn("| ours, vittiny, batch 2 | 0.5 | 4 | 40 |  |", text)
        self.assertTrue((self.folder / "steps.png").is_file())
        self.assertEqual(tables.write_table({}, self.folder), "\n\n")
