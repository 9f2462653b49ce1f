"""Checkpoints: atomic, verified, weights only; and what happens to broken ones."""

import pickle
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path
from unittest import mock

import torch
from torch import nn

from omnivision import checkpoint
from omnivision.errors import UserError
from tests.runs import ROOT


class Canary:
    """Unpickling this creates a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


class Folder(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.folder = Path(temporary.name)


class Saving(Folder):
    def test_the_newest_comes_back_and_the_one_before_is_kept(self):
        for step in (1, 2, 3):
            checkpoint.save({"step": step, "model": {"w": torch.full((5,), float(step))}}, self.folder, [])
        state, path, problems = checkpoint.load_newest(self.folder)
        self.assertEqual((state["step"], path.name, problems), (3, "checkpoint.pt", []))
        self.assertEqual(checkpoint.safe_load(self.folder / "previous.pt")["step"], 2)
        for name in ("checkpoint.pt", "previous.pt"):
            checkpoint.verify(self.folder / name)
        self.assertEqual([p.name for p in self.folder.iterdir() if p.name.startswith(".")], [], "no temporary files")

    def test_further_names(self):
        checkpoint.save({"step": 1}, self.folder, ["best.pt", "checkpoint_1.pt"])
        checkpoint.save({"step": 2}, self.folder, [])
        self.assertEqual(checkpoint.safe_load(self.folder / "best.pt")["step"], 1)
        checkpoint.verify(self.folder / "checkpoint_1.pt")

    def test_without_hard_links(self):
        with mock.patch("os.link", side_effect=OSError):
            checkpoint.save({"step": 1}, self.folder, ["best.pt"])
            checkpoint.save({"step": 2}, self.folder, [])
        self.assertEqual(checkpoint.safe_load(self.folder / "best.pt")["step"], 1)
        self.assertEqual(checkpoint.safe_load(self.folder / "previous.pt")["step"], 1)

    def test_a_failed_save_leaves_what_was_there(self):
        checkpoint.save({"step": 1}, self.folder, [])
        with mock.patch("torch.save", side_effect=OSError(28, "No space left on device")):
            with self.assertRaises(OSError):
                checkpoint.save({"step": 2}, self.folder, [])
        state, _, _ = checkpoint.load_newest(self.folder)
        self.assertEqual(state["step"], 1)
        self.assertEqual([p.name for p in self.folder.iterdir() if p.name.startswith(".")], [])

    def test_killed_while_saving(self):
        """SIGKILL at many moments of a loop of saves: the newest is always whole and never older than the last done."""
        program = (
            "import sys, torch\nfrom pathlib import Path\nfrom omnivision import checkpoint\n"
            "for step in range(1, 10**6):\n"
            "    checkpoint.save({'step': step, 'w': torch.full((300_000,), float(step))}, Path(sys.argv[1]), ['best.pt'])\n"
            "    print(step, flush=True)\n"
        )
        for attempt in range(4):
            folder = self.folder / str(attempt)
            process = subprocess.Popen(
                [sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE, text=True, cwd=ROOT
            )
            assert process.stdout is not None
            for _ in range(3):
                process.stdout.readline()
            time.sleep(0.003 * attempt)
            process.send_signal(signal.SIGKILL)
            done = [int(line) for line in process.stdout.read().split()] or [3]
            process.stdout.close()
            process.wait()
            state, _, problems = checkpoint.load_newest(folder)
            self.assertEqual(problems, [])
            self.assertGreaterEqual(state["step"], done[-1])
            self.assertTrue(torch.equal(state["w"], torch.full((300_000,), float(state["step"]))))
            checkpoint.verify(folder / "best.pt")


class Loading(Folder):
    def test_nothing_there(self):
        self.assertIsNone(checkpoint.load_newest(self.folder))

    def test_a_broken_newest_is_named_and_the_one_before_is_used(self):
        damages = {
            "cut": lambda data: data[: len(data) // 2],
            "flipped": lambda data: data[:700] + bytes([data[700] ^ 255]) + data[701:],
            "holed": lambda data: data[:600] + bytes(200) + data[800:],
            "empty": lambda data: b"",
        }
        for name, damage in damages.items():
            with self.subTest(name):
                folder = self.folder / name
                checkpoint.save({"step": 1, "w": torch.rand(1000)}, folder, [])
                checkpoint.save({"step": 2, "w": torch.rand(1000)}, folder, [])
                latest = folder / "checkpoint.pt"
                data = latest.read_bytes()
                latest.unlink()
                latest.write_bytes(damage(data))
                state, path, problems = checkpoint.load_newest(folder)
                self.assertEqual((state["step"], path.name), (1, "previous.pt"))
                self.assertIn("checkpoint.pt", problems[0])

    def test_when_all_are_broken_nothing_starts_over(self):
        checkpoint.save({"step": 1}, self.folder, [])
        (self.folder / "checkpoint.pt").write_bytes(b"junk")
        with self.assertRaises(checkpoint.BrokenCheckpoint):
            checkpoint.load_newest(self.folder)

    def test_a_pickle_is_refused_and_not_run(self):
        canary = self.folder / "canary"
        evil = self.folder / "evil.pt"
        torch.save({"model": Canary(str(canary))}, evil)
        with self.assertRaises(checkpoint.BrokenCheckpoint):
            checkpoint.safe_load(evil)
        evil.write_bytes(pickle.dumps(Canary(str(canary))))
        with self.assertRaises(checkpoint.BrokenCheckpoint):
            checkpoint.safe_load(evil)
        self.assertFalse(canary.exists())

    def test_weights_of_another_model(self):
        model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        state = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)).state_dict() | {"extra": torch.zeros(1)}
        with self.assertRaisesRegex(
            UserError, r"not in this model: extra; .*of another shape: 0\.bias \(4,\) instead of \(2,\)"
        ):
            checkpoint.load_model(model, state, Path("x.pt"))
        for name, value in model.state_dict().items():
            self.assertTrue(torch.equal(value, before[name]))


if __name__ == "__main__":
    unittest.main()
