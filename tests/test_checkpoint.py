"""Checkpoints: atomic, verified, weights only; and what happens to broken ones."""

import io
import itertools
import os
import pickle
import shutil
import tempfile
import threading
import time
import unittest
import zipfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from omnivision.checkpoint import checkpointer as checkpoint
from omnivision.utils.errors import StopRequested, UserError


class Canary:
    """Unpickling this creates a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def state(step: int, **more: object) -> dict:
    """What a checkpoint of a run holds, by and large."""
    kinds: dict = {key: {} for key in ("model", "optimizer", "scaler", "meter", "last", "architecture")}
    counts = {"format": checkpoint.FORMAT, "epoch": 0, "step": step, "steps_per_epoch": 9, "skipped": 0}
    return dict.fromkeys(checkpoint.KEYS) | kinds | counts | {"sources": [], "experiment": "{}"} | more


class Folder(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.folder = Path(temporary.name)


class Saving(Folder):
    def test_the_newest_comes_back_and_the_one_before_is_kept(self):
        for step in (1, 2, 3):
            checkpoint.save(state(step, model={"w": torch.full((5,), float(step))}), self.folder, [])
        found, path, problems = checkpoint.load_newest(self.folder)
        self.assertEqual((found["step"], path.name, problems), (3, "checkpoint.pt", []))
        self.assertEqual(checkpoint.safe_load(self.folder / "previous.pt")["step"], 2)
        for name in ("checkpoint.pt", "previous.pt"):
            checkpoint.verify(self.folder / name)
        self.assertEqual([p.name for p in self.folder.iterdir() if p.name.startswith(".")], [], "no temporary files")

    def test_at_every_moment_what_is_there_is_what_a_manifest_says(self):
        checked = []

        def replace(source: Path, target: Path, real: object = os.replace) -> None:
            real(source, target)
            for file in self.folder.glob("*.pt"):
                if file.with_name(f"{file.name}.json").exists():  # the very first one gets its own afterwards
                    checkpoint.verify(file)
                    checked.append(file.name)

        with mock.patch("os.replace", replace):
            for step in (1, 2, 3):
                checkpoint.save(state(step), self.folder, ["best.pt"])
        self.assertEqual(set(checked), {"best.pt", "checkpoint.pt", "previous.pt"})

    def test_at_no_moment_can_a_kill_cost_what_there_was(self):
        seen = []

        def killed_here() -> None:
            found = checkpoint.load_newest(self.folder)
            seen.append((None, []) if found is None else (found[0]["step"], found[2]))

        def stopped_at(real: Any) -> Any:
            def stopping(*given: Any) -> Any:
                killed_here()
                made = real(*given)
                killed_here()
                return made

            return stopping

        for name in ("os.replace", "os.link"):
            patch = mock.patch(name, stopped_at(getattr(os, name.partition(".")[2])))
            patch.start()
            self.addCleanup(patch.stop)
        for step in (1, 2, 3):
            seen.clear()
            checkpoint.save(state(step), self.folder, ["best.pt"])
            before = None if step == 1 else step - 1
            self.assertEqual([problems for _, problems in seen if problems], [])
            self.assertLessEqual({found for found, _ in seen}, {before, step})
            self.assertEqual(checkpoint.load_newest(self.folder)[0]["step"], step)

    def test_why_it_could_not_be_written_is_told(self):
        for error in (
            OSError(28, "No space left on device"),
            checkpoint.CorruptCheckpointError("x is incomplete"),
        ):
            with self.assertRaisesRegex(
                UserError, rf"written to {self.folder}: .* GB are free\).*trainer.checkpoint.save_dir"
            ):
                with checkpoint.report_write_errors(self.folder):
                    raise error

    def test_parts_that_no_checkpoint_refers_to_go_with_a_save(self):
        (self.folder / "shards_1_ab").mkdir()
        checkpoint.save(state(1), self.folder, [])
        self.assertFalse((self.folder / "shards_1_ab").exists())

    def test_further_names(self):
        checkpoint.save(state(1), self.folder, ["best.pt", "checkpoint_1.pt"])
        checkpoint.save(state(2), self.folder, [])
        self.assertEqual(checkpoint.safe_load(self.folder / "best.pt")["step"], 1)
        checkpoint.verify(self.folder / "checkpoint_1.pt")

    def test_without_hard_links(self):
        with mock.patch("os.link", side_effect=OSError):
            checkpoint.save(state(1), self.folder, ["best.pt"])
            checkpoint.save(state(2), self.folder, [])
        self.assertEqual(checkpoint.safe_load(self.folder / "best.pt")["step"], 1)
        self.assertEqual(checkpoint.safe_load(self.folder / "previous.pt")["step"], 1)

    def test_a_failed_save_leaves_what_was_there(self):
        checkpoint.save(state(1), self.folder, [])
        with mock.patch("torch.save", side_effect=OSError(28, "No space left on device")):
            with self.assertRaises(OSError):
                checkpoint.save(state(2), self.folder, [])
        found, _, _ = checkpoint.load_newest(self.folder)
        self.assertEqual(found["step"], 1)
        self.assertEqual([p.name for p in self.folder.iterdir() if p.name.startswith(".")], [])

    def test_what_was_not_written_as_it_was_meant_replaces_nothing(self):
        checkpoint.save(state(1), self.folder, [])
        write = torch.save
        for damage in (lambda data: data[:-9], lambda data: data.replace(b"\x00\x00\x80?" * 9, b"\x00\x00\x80@" * 9)):

            def save(what: object, file: io.IOBase, damage=damage) -> None:
                whole = io.BytesIO()
                write(what, whole)
                assert damage(whole.getvalue()) != whole.getvalue()
                file.write(damage(whole.getvalue()))

            with mock.patch("torch.save", save):
                with self.assertRaises(checkpoint.CorruptCheckpointError):
                    checkpoint.save(state(2, model={"w": torch.ones(100)}), self.folder, ["best.pt"])
            found, _, problems = checkpoint.load_newest(self.folder)
            self.assertEqual((found["step"], problems, (self.folder / "best.pt").exists()), (1, [], False))

    def test_what_interrupts_a_save_is_what_is_raised(self):
        for reason in (OSError(28, "No space left on device"), KeyboardInterrupt(), StopRequested("SIGTERM")):
            with self.subTest(type(reason)):
                file = mock.Mock(write=mock.Mock(side_effect=itertools.chain([64], itertools.repeat(reason))))
                opened = mock.MagicMock()
                opened.__enter__.return_value, opened.__exit__.return_value = file, False
                with mock.patch("omnivision.checkpoint.checkpointer.open", return_value=opened, create=True):
                    with self.assertRaises(type(reason)):
                        checkpoint.save(state(1, model={"w": torch.zeros(1_000_000)}), self.folder, [])


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
                checkpoint.save(state(1, model={"w": torch.rand(1000)}), folder, [])
                checkpoint.save(state(2, model={"w": torch.rand(1000)}), folder, [])
                latest = folder / "checkpoint.pt"
                data = latest.read_bytes()
                latest.unlink()
                latest.write_bytes(damage(data))
                found, path, problems = checkpoint.load_newest(folder)
                self.assertEqual((found["step"], path.name), (1, "previous.pt"))
                self.assertIn("checkpoint.pt", problems[0])

    def test_a_newest_that_cannot_be_read_or_has_no_proper_manifest(self):
        def unreadable(path: Path, real: Any = checkpoint.sha256) -> str:
            if path.name == "checkpoint.pt":
                raise OSError(5, "Input/output error", str(path))
            return real(path)

        def flipped() -> None:  # and nobody says what it was
            manifest.unlink()
            data = bytearray((self.folder / "checkpoint.pt").read_bytes())
            place = data.index(b"\x00\x00\x80?" * 9)
            data[place] ^= 1
            (self.folder / "checkpoint.pt").unlink()  # whose other name previous.pt may be
            (self.folder / "checkpoint.pt").write_bytes(data)

        manifest = self.folder / "checkpoint.pt.json"
        for spoil, read in (
            (lambda: manifest.write_text("[" * 100_000), checkpoint.sha256),
            (lambda: (manifest.unlink(), manifest.mkdir()), checkpoint.sha256),
            (lambda: (manifest.unlink(), os.mkfifo(manifest)), checkpoint.sha256),
            (lambda: None, unreadable),
            (flipped, checkpoint.sha256),
        ):
            for file in self.folder.iterdir():
                file.rmdir() if file.is_dir() else file.unlink()
            for step in (1, 2):
                checkpoint.save(state(step, model={"w": torch.ones(100)}), self.folder, [])
            spoil()
            with mock.patch.object(checkpoint, "sha256", read):
                found, path, problems = checkpoint.load_newest(self.folder)
            self.assertEqual((found["step"], path.name, len(problems)), (1, "previous.pt", 1))

    def test_when_all_are_broken_nothing_starts_over(self):
        checkpoint.save(state(1), self.folder, [])
        (self.folder / "checkpoint.pt").write_bytes(b"junk")
        with self.assertRaises(checkpoint.CorruptCheckpointError):
            checkpoint.load_newest(self.folder)

    def test_going_on_after_a_broken_newest_keeps_the_good_one_until_there_is_a_better(self):
        for broken in ("checkpoint.pt", "checkpoint.pt.json"):
            with self.subTest(broken):
                folder = self.folder / broken
                checkpoint.save(state(1), folder, [])
                checkpoint.save(state(2), folder, [])
                (folder / broken).unlink()
                (folder / broken).write_bytes(b"junk")
                self.assertEqual(checkpoint.load_newest(folder)[0]["step"], 1)
                # Killed at the last moment of the next save: the good one is still there.
                with mock.patch("omnivision.checkpoint.checkpointer.os.replace", side_effect=[None, KeyboardInterrupt]):
                    with self.assertRaises(KeyboardInterrupt):
                        checkpoint.save(state(3), folder, [])
                self.assertEqual(checkpoint.safe_load(folder / "previous.pt")["step"], 1)
                checkpoint.save(state(3), folder, [])
                self.assertEqual(checkpoint.load_newest(folder)[0]["step"], 3)
                checkpoint.save(state(4), folder, [])
                self.assertEqual(checkpoint.safe_load(folder / "previous.pt")["step"], 3)

    def test_a_lost_newest_is_told(self):
        checkpoint.save(state(1), self.folder, [])
        (self.folder / "checkpoint.pt").unlink()  # its manifest tells of it
        with self.assertRaisesRegex(checkpoint.CorruptCheckpointError, "checkpoint.pt is missing"):
            checkpoint.load_newest(self.folder)
        checkpoint.save(state(2), self.folder, [])
        checkpoint.save(state(3), self.folder, [])
        (self.folder / "checkpoint.pt").unlink()
        found, path, problems = checkpoint.load_newest(self.folder)
        self.assertEqual((found["step"], path.name, len(problems)), (2, "previous.pt", 1))

    def test_a_link_that_leads_nowhere_and_a_folder_in_its_place(self):
        (self.folder / "link").mkdir()
        (self.folder / "link/checkpoint.pt").symlink_to("/nowhere/checkpoint.pt")
        (self.folder / "folder/checkpoint.pt").mkdir(parents=True)
        for name in ("link", "folder"):
            with (
                self.subTest(name),
                self.assertRaisesRegex(checkpoint.CorruptCheckpointError, "is missing or not a file"),
            ):
                checkpoint.load_newest(self.folder / name)

    def test_what_loads_but_is_no_checkpoint_of_a_run(self):
        for content in ({"model": {}}, [1, 2], state(1, model={"w": 0})):
            torch.save(content, self.folder / "checkpoint.pt")
            with self.assertRaisesRegex(checkpoint.CorruptCheckpointError, "not a checkpoint of a run"):
                checkpoint.load_newest(self.folder)

    def test_an_archive_that_says_it_goes_on_elsewhere(self):
        """Found by random damage: the zip library does not answer whether it is an archive, it raises."""
        file = self.folder / "several_disks.pt"
        torch.save({"w": torch.zeros(9)}, file)
        data = bytearray(file.read_bytes())
        disks = data.index(b"PK\x06\x07") + 16
        self.assertEqual(data[disks], 1)
        data[disks] = 2
        file.write_bytes(data)
        with self.assertRaises(zipfile.BadZipFile):
            zipfile.is_zipfile(file)
        with self.assertRaises(checkpoint.CorruptCheckpointError):
            checkpoint.read(file)
        checkpoint.verified_digest(file)  # it is no archive, so that nothing in it can be verified

    def test_one_of_another_version(self):
        checkpoint.save(state(1, format=checkpoint.FORMAT + 1), self.folder, [])
        with self.assertRaisesRegex(checkpoint.CorruptCheckpointError, "format .*got 3"):
            checkpoint.load_newest(self.folder)

    def test_a_pickle_is_refused_and_not_run(self):
        canary = self.folder / "canary"
        evil = self.folder / "evil.pt"
        torch.save({"model": Canary(str(canary))}, evil)
        with self.assertRaises(checkpoint.CorruptCheckpointError):
            checkpoint.safe_load(evil)
        evil.write_bytes(pickle.dumps(Canary(str(canary))))
        with self.assertRaises(checkpoint.CorruptCheckpointError):
            checkpoint.safe_load(evil)
        self.assertFalse(canary.exists())

    def test_weights_of_another_model(self):
        model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        other = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)).state_dict() | {"extra": torch.zeros(1)}
        with self.assertRaisesRegex(
            UserError, r"not in this model: extra; .*of another shape: 0\.bias \(4,\) instead of \(2,\)"
        ):
            checkpoint.load_model(model, other, Path("x.pt"))
        for name, value in model.state_dict().items():
            self.assertTrue(torch.equal(value, before[name]))


class Lag(unittest.TestCase):
    def test_another_machine_waits_until_it_sees_the_same_checkpoint(self):
        with tempfile.TemporaryDirectory() as name:
            there, here = Path(name) / "there", Path(name) / "here"  # two machines' views of one folder
            there.mkdir()
            (there / "checkpoint.pt").write_bytes(b"weights")
            (there / "checkpoint.pt.json").write_text("a manifest")
            shows = threading.Timer(0.5, lambda: shutil.copytree(there, here))
            shows.start()
            began = time.monotonic()
            checkpoint.wait_until_visible(checkpoint.stat_latest(there), here, seconds=20)
            self.assertGreaterEqual(time.monotonic() - began, 0.4)
            self.assertEqual(checkpoint.stat_latest(here), checkpoint.stat_latest(there))
            shows.join()
            checkpoint.wait_until_visible(("another one", 7), here, seconds=0.3)  # not for ever


if __name__ == "__main__":
    unittest.main()
