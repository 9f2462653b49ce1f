"""Checkpoints: atomic, verified, weights only; damaged ones give way to the one before."""

import io
import itertools
import os
import pickle
import shutil
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
from tests import fixtures

ONES = {"w": torch.ones(1000)}


class Canary:
    """Unpickling this creates a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def state(step: int, **more: object) -> dict:
    """The contents of a run's checkpoint, in outline."""
    counts = {"format": checkpoint.FORMAT, "epoch": 0, "step": step, "steps_per_epoch": 9, "skipped": 0}
    return {"model": {}, "optimizer": {}, "last": {}, "sources": [], "experiment": "{}"} | counts | more


class Folder(fixtures.Folder):
    def save(self, *steps: int, folder: Path | None = None, aliases: tuple[str, ...] = (), **more: object) -> None:
        for step in steps:
            checkpoint.save(state(step, **more), folder or self.folder, list(aliases))

    def assert_newest(
        self, step: int, name: str = "checkpoint.pt", problems: int = 0, folder: Path | None = None
    ) -> None:
        found, path, messages = checkpoint.load_newest(folder or self.folder)
        self.assertEqual((found["step"], path.name, len(messages)), (step, name, problems), messages)

    def replace(self, file: Path, data: bytes) -> None:
        file.unlink()  # its other name may be previous.pt
        file.write_bytes(data)


class Saving(Folder):
    def test_newest_and_previous_checkpoint_are_kept(self):
        self.assertIsNone(checkpoint.load_newest(self.folder))
        (self.folder / "shards_1_ab").mkdir()
        self.save(1, aliases=("best.pt", "checkpoint_1.pt"))
        self.save(2, 3)
        self.assert_newest(3)
        for name, step in (("previous.pt", 2), ("best.pt", 1), ("checkpoint_1.pt", 1)):
            self.assertEqual(checkpoint.safe_load(self.folder / name)["step"], step)
            checkpoint.verify_manifest(self.folder / name)
        self.assertEqual([*self.folder.glob(".*"), *self.folder.glob("shards_*")], [], "no temporary or unused files")

    def test_saving_without_hard_links(self):
        with mock.patch("os.link", side_effect=OSError):
            self.save(1, aliases=("best.pt",))
            self.save(2)
        for name in ("best.pt", "previous.pt"):
            self.assertEqual(checkpoint.safe_load(self.folder / name)["step"], 1)

    def test_a_kill_at_any_moment_leaves_verified_checkpoints(self):
        steps, checked = [], set()

        def look() -> None:
            newest = checkpoint.load_newest(self.folder)
            self.assertEqual([] if newest is None else newest[2], [])
            steps.append(None if newest is None else newest[0]["step"])
            for file in self.folder.glob("*.pt"):
                if file.with_name(f"{file.name}.json").exists():  # the very first one gets its own afterwards
                    checkpoint.verify_manifest(file)
                    checked.add(file.name)

        def watched(real: Any) -> Any:
            def call(*arguments: Any) -> Any:
                look()
                result = real(*arguments)
                look()
                return result

            return call

        with mock.patch("os.replace", watched(os.replace)), mock.patch("os.link", watched(os.link)):
            for step in (1, 2, 3):
                steps.clear()
                self.save(step, aliases=("best.pt",))
                self.assertLessEqual(set(steps), {None if step == 1 else step - 1, step})
                self.assert_newest(step)
        self.assertEqual(checked, {"best.pt", "checkpoint.pt", "previous.pt"})

    def test_failed_save_replaces_nothing(self):
        self.save(1)
        write = torch.save

        def damaging(damage: Any) -> Any:
            def save(content: object, file: io.IOBase) -> None:
                complete = io.BytesIO()
                write(content, complete)
                assert damage(complete.getvalue()) != complete.getvalue()
                file.write(damage(complete.getvalue()))

            return save

        for save, error in (
            (mock.Mock(side_effect=OSError(28, "No space left on device")), OSError),
            (damaging(lambda data: data[:-9]), checkpoint.CorruptCheckpointError),
            (
                damaging(lambda data: data.replace(b"\0\0\x80?" * 9, b"\0\0\x80@" * 9)),
                checkpoint.CorruptCheckpointError,
            ),
        ):
            with mock.patch("torch.save", save), self.assertRaises(error):
                self.save(2, aliases=("best.pt",), model=ONES)
            self.assert_newest(1)
            self.assertEqual({path.name for path in self.folder.iterdir()}, {"checkpoint.pt", "checkpoint.pt.json"})

    def test_the_cause_of_an_interrupted_save_is_raised(self):
        for reason in (OSError(28, "No space left on device"), KeyboardInterrupt(), StopRequested("SIGTERM")):
            file = mock.Mock(write=mock.Mock(side_effect=itertools.chain([64], itertools.repeat(reason))))
            opened = mock.MagicMock()
            opened.__enter__.return_value, opened.__exit__.return_value = file, False
            with mock.patch("omnivision.checkpoint.checkpointer.open", return_value=opened, create=True):
                with self.subTest(type(reason)), self.assertRaises(type(reason)):
                    self.save(1, model={"w": torch.zeros(1_000_000)})
        for error in (OSError(28, "No space left on device"), checkpoint.CorruptCheckpointError("incomplete")):
            with self.assertRaisesRegex(UserError, rf"{self.folder}: .* GB .*trainer.checkpoint.save_dir"):
                with checkpoint.report_write_errors(self.folder):
                    raise error


class Loading(Folder):
    def test_previous_checkpoint_is_loaded_if_the_newest_is_corrupt(self):
        latest, manifest = self.folder / "checkpoint.pt", self.folder / "checkpoint.pt.json"

        def flip_without_manifest(data: bytes) -> None:
            manifest.unlink()
            place = data.index(b"\0\0\x80?" * 9)
            self.replace(latest, data[:place] + b"\1" + data[place + 1 :])

        for name, damage in {
            "cut": lambda data: self.replace(latest, data[: len(data) // 2]),
            "flipped": lambda data: self.replace(latest, data[:700] + bytes([data[700] ^ 255]) + data[701:]),
            "holed": lambda data: self.replace(latest, data[:600] + bytes(200) + data[800:]),
            "empty": lambda data: self.replace(latest, b""),
            "flipped, no manifest": flip_without_manifest,
            "no proper manifest": lambda data: manifest.write_text("[]"),
            "a folder for a manifest": lambda data: (manifest.unlink(), manifest.mkdir()),
            "lost": lambda data: latest.unlink(),
        }.items():
            with self.subTest(name):
                shutil.rmtree(self.folder)
                self.save(1, 2, model=ONES)
                damage(latest.read_bytes())
                self.assert_newest(1, "previous.pt", problems=1)

        def unreadable(path: Path, real: Any = checkpoint.sha256) -> str:
            if path == latest:
                raise OSError(5, "Input/output error", str(path))
            return real(path)

        shutil.rmtree(self.folder)
        self.save(1, 2)
        with mock.patch.object(checkpoint, "sha256", unreadable):
            self.assert_newest(1, "previous.pt", problems=1)

    def test_folder_without_a_complete_checkpoint_raises(self):
        (self.folder / "link").mkdir()
        (self.folder / "link/checkpoint.pt").symlink_to("/nowhere/checkpoint.pt")
        (self.folder / "folder/checkpoint.pt").mkdir(parents=True)
        self.save(1, folder=self.folder / "junk")
        (self.folder / "junk/checkpoint.pt").write_bytes(b"junk")
        self.save(1, folder=self.folder / "lost")
        (self.folder / "lost/checkpoint.pt").unlink()
        self.save(1, folder=self.folder / "version", format=checkpoint.FORMAT + 1)
        for name, content in (("weights", {"model": {}}), ("list", [1, 2])):
            (self.folder / name).mkdir()
            torch.save(content, self.folder / name / "checkpoint.pt")
        for folder in self.folder.iterdir():
            with self.subTest(folder.name), self.assertRaisesRegex(checkpoint.CorruptCheckpointError, "checkpoint.pt"):
                checkpoint.load_newest(folder)

    def test_previous_checkpoint_stays_until_a_complete_one_is_saved(self):
        for damaged in ("checkpoint.pt", "checkpoint.pt.json"):
            with self.subTest(damaged):
                folder = self.folder / damaged
                self.save(1, 2, folder=folder)
                self.replace(folder / damaged, b"junk")
                self.assert_newest(1, "previous.pt", problems=1, folder=folder)
                # Killed at the last moment of the next save: the good one is still there.
                with mock.patch("omnivision.checkpoint.checkpointer.os.replace", side_effect=[None, KeyboardInterrupt]):
                    with self.assertRaises(KeyboardInterrupt):
                        self.save(3, folder=folder)
                self.assertEqual(checkpoint.safe_load(folder / "previous.pt")["step"], 1)
                self.save(3, folder=folder)
                self.assert_newest(3, folder=folder)
                self.save(4, folder=folder)
                self.assertEqual(checkpoint.safe_load(folder / "previous.pt")["step"], 3)

    def test_multi_disk_archive_is_corrupt(self):
        """Found by random damage: the zip library raises when asked whether it is an archive."""
        file = self.folder / "several_disks.pt"
        torch.save({"w": torch.zeros(9)}, file)
        data = bytearray(file.read_bytes())
        data[data.index(b"PK\x06\x07") + 16] = 2
        file.write_bytes(data)
        with self.assertRaises(zipfile.BadZipFile):
            zipfile.is_zipfile(file)
        with self.assertRaises(checkpoint.CorruptCheckpointError):
            checkpoint.read_checkpoint(file)
        checkpoint.verify_and_hash(file)  # not an archive, so that nothing in it can be verified

    def test_a_pickle_is_refused_and_not_run(self):
        canary, file = self.folder / "canary", self.folder / "evil.pt"
        for write in (
            lambda: torch.save({"m": Canary(str(canary))}, file),
            lambda: pickle.dump(Canary(str(canary)), file.open("wb")),
        ):
            write()
            with self.assertRaises(checkpoint.CorruptCheckpointError):
                checkpoint.safe_load(file)
        self.assertFalse(canary.exists())

    def test_weights_of_another_model_are_refused(self):
        model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
        other = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)).state_dict() | {"extra": torch.zeros(1)}
        with self.assertRaisesRegex(UserError, r"x\.pt .*extra.*0\.weight.*trainer/model"):
            checkpoint.load_model(model, other, Path("x.pt"))


class Lag(Folder):
    def test_other_host_waits_until_the_checkpoint_is_visible(self):
        there, here = self.folder / "there", self.folder / "here"  # two machines' views of one folder
        there.mkdir()
        (there / "checkpoint.pt").write_bytes(b"weights")
        (there / "checkpoint.pt.json").write_text("a manifest")
        copy = threading.Timer(0.5, lambda: shutil.copytree(there, here))
        copy.start()
        start = time.monotonic()
        checkpoint.wait_until_visible(checkpoint.stat_latest(there), here, seconds=20)
        self.assertGreaterEqual(time.monotonic() - start, 0.4)
        self.assertEqual(checkpoint.stat_latest(here), checkpoint.stat_latest(there))
        copy.join()
        checkpoint.wait_until_visible(("another one", 7), here, seconds=0.3)  # not for ever


if __name__ == "__main__":
    unittest.main()
