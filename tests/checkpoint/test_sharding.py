"""`trainer.distributed.strategy=fsdp`: what is split gives the numbers of what is not, and is saved in parts."""

import json
import shutil
import tempfile
import unittest
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException

from omnivision.checkpoint import sharded
from omnivision.checkpoint import state_dict_file as weights
from omnivision.config.validate import validate_config
from omnivision.distributed.process_group import Dist, RankInfo
from omnivision.tools.main import main as omnivision
from omnivision.utils.errors import UserError
from omnivision.utils.io import CorruptCheckpointError, sha256
from tests import runs
from tests import stage_runs as stages
from tests.checkpoint.test_checkpoint import Folder

EPOCHS, STEPS = 3, 9
FSDP = "trainer.distributed.strategy=fsdp"


class Runs(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        cls.data = [
            *runs.write_split(cls.folder, runs.real_videos() * 16),  # 48 samples
            f"epochs={EPOCHS}", "batch_size=16", "trainer.ema_decay=0.9", "trainer.optim.gradient_clip=0.05",
            "trainer.optim.accumulation_steps=2", "trainer.logging.pictures_every_epochs=1",
        ]  # fmt: skip

    def run_here(self, name: str, processes: int, *settings: str) -> Path:
        command = runs.command(self.folder / name, *self.data, f"launcher.gpus_per_node={processes}", *settings)
        result = stages.run_in_process(command[2:])
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertNotIn("Warning", result.stderr)
        return self.folder / name

    def test_fsdp_resumes_with_other_world_sizes_and_equals_ddp(self):
        ddp = runs.read_metrics(self.run_here("ddp", 2))
        split = self.folder / "split"
        runs.run_and_kill(
            split, 3, *self.data, "launcher.gpus_per_node=2", FSDP, "trainer.checkpoint.save_every_steps=2"
        )
        saved = runs.read_metrics(split)[-1]["step"]
        found = list((split / "checkpoints").glob("shards_*/shard-*.safetensors"))
        self.assertGreaterEqual(len(found), 2)
        small = (split / "checkpoints/checkpoint.pt").stat().st_size
        self.assertLess(small, sum(file.stat().st_size for file in found), "the tensors are in the parts")
        state = torch.load(split / "checkpoints/checkpoint.pt", weights_only=True)
        self.assertNotIn("trunk.norm.weight", state["model"])

        runs.run_and_kill(
            split, 6, *self.data, "launcher.gpus_per_node=4", FSDP, "trainer.checkpoint.save_every_steps=2"
        )
        self.assertEqual(runs.read_metrics(split)[saved - 1]["step"], saved)
        folders = {file.name for file in (split / "checkpoints").glob("shards_*")}
        used = {
            torch.load(file, weights_only=True)["shards"]["folder"] for file in (split / "checkpoints").glob("*.pt")
        }
        self.assertLessEqual(used, folders)
        self.assertLessEqual(len(folders - used), 1, "that of a save that was killed, at most")
        copied = self.folder / "copied"
        shutil.copytree(split, copied)

        self.run_here("split", 2, FSDP)
        self.run_here("copied", 1)  # the parts come together in one process
        for name in ("split", "copied"):
            lines = runs.read_metrics(self.folder / name)
            self.assertEqual([line["step"] for line in lines], list(range(1, STEPS + 1)))
            for one, other in zip(ddp, lines, strict=True):
                self.assertAlmostEqual(one["loss"], other["loss"], delta=1e-5 * one["loss"], msg=f"{name} {one}")
                self.assertAlmostEqual(one["grad_norm"], other["grad_norm"], delta=1e-4 * one["grad_norm"])
        self.assertTrue((split / "pictures/last.png").exists())

        whole = weights.read_weights(self.folder / "ddp").with_weights()
        for name in ("split", "copied"):
            again = weights.read_weights(self.folder / name).with_weights()
            self.assertEqual(set(again.state), set(whole.state))
            for tensor in whole.state:
                difference = (whole.state[tensor] - again.state[tensor]).abs().max()
                self.assertLess(difference, 2e-5, f"{name} {tensor}")
        exported = self.folder / "exported.safetensors"
        self.assertEqual(omnivision(["export", str(split), str(exported), "--to", "safetensors"]), 0)
        trunk = weights.read_weights(exported).state["trunk.blocks.0.mlp.fc1.weight"]
        self.assertTrue(
            torch.equal(trunk, weights.read_weights(split).with_weights().state["trunk.blocks.0.mlp.fc1.weight"])
        )

    def test_fsdp_in_half_precision_equals_ddp(self):
        """Norms are not rounded, as autocast does not round them; products are, and so is what goes over the wire."""

        def norms(name: str, *settings: str) -> list[float]:
            run = self.run_here(name, 2, "epochs=1", "trainer.optim.amp.enabled=true", *settings)
            self.losses[name] = [line["loss"] for line in runs.read_metrics(run)]
            return [line["grad_norm"] for line in runs.read_metrics(run)]

        self.losses: dict[str, list[float]] = {}
        for dtype in ("bfloat16", "float16"):
            amp, ddp, fsdp = f"trainer.optim.amp.amp_dtype={dtype}", f"{dtype}_ddp", f"{dtype}_fsdp"
            for one, other in zip(norms(ddp, amp), norms(fsdp, amp, FSDP), strict=True):
                self.assertAlmostEqual(one, other, delta=1e-4 * one, msg=dtype)
            for one, other in zip(self.losses[ddp], self.losses[fsdp], strict=True):
                self.assertAlmostEqual(one, other, delta=1e-5 * one, msg=dtype)
        whole = norms("whole_wire", "trainer.optim.amp.amp_dtype=bfloat16", "trainer.distributed.comms_dtype=null")
        rounded = [line["grad_norm"] for line in runs.read_metrics(self.folder / "bfloat16_ddp")]
        self.assertNotEqual(whole, rounded)
        for one, other in zip(whole, rounded, strict=True):
            self.assertAlmostEqual(one, other, delta=1e-3 * one)

    def test_muon_begun_by_one_process_continues_with_fsdp(self):
        muon = "trainer/optim=muon", "trainer.optim.gradient_clip=null", "trainer.distributed.comms_dtype=null"
        ddp = runs.read_metrics(self.run_here("muon_ddp", 2, *muon))
        self.run_here("muon_fsdp", 1, *muon, "epochs=2")
        more = "epochs=3", "trainer.checkpoint.allow_changes=true"
        fsdp = runs.read_metrics(self.run_here("muon_fsdp", 2, FSDP, *muon, *more))
        for line, expected in zip(fsdp[:4], ddp, strict=False):  # the schedule for two epochs soon differs
            self.assertAlmostEqual(line["loss"], expected["loss"], delta=0.02 * expected["loss"])
        self.assertEqual(fsdp[-1]["step"], STEPS)

    def test_average_with_fsdp_is_refused(self):
        with self.assertRaisesRegex(UserError, "^trainer.distributed.strategy .*ddp"):
            validate_config(stages.compose_config(*stages.command("average", self.folder / "x", FSDP)))


class Shards(Folder):
    """Shards that are not those of the checkpoint."""

    def setUp(self):
        super().setUp()
        self.source = self.folder / "shards_3_ab"
        self.source.mkdir()
        self.shard = self.source / "shard-00001-model-00001-of-00001.safetensors"
        save_file({"model/a": torch.ones(3), "optimizer/state/0/exp_avg": torch.ones(2)}, self.shard)

    def state(self, **changes: object) -> dict:
        entry = {"size": self.shard.stat().st_size, "sha256": sha256(self.shard)}
        shards = {"folder": self.source.name, "files": {self.shard.name: entry}} | changes
        return {"model": {"b": torch.zeros(1)}, "optimizer": {"state": {}}, "shards": shards}

    def refused(self, message: str, state: dict | None = None, **changes: object) -> None:
        with self.assertRaisesRegex(CorruptCheckpointError, message):
            sharded.load_shards(state or self.state(**changes), self.folder)

    def test_shards_are_loaded_into_their_entries(self):
        state = self.state()
        sharded.load_shards(state, self.folder)
        self.assertEqual(sorted(state), ["model", "optimizer"])
        self.assertEqual(state["model"]["a"].tolist(), [1, 1, 1])
        self.assertEqual(state["optimizer"]["state"][0]["exp_avg"].tolist(), [1, 1])
        state = {"shards": torch.ones(3), "model": {}}  # another project's
        sharded.load_shards(state, self.folder)
        self.assertIn("shards", state)

    def test_other_shards_are_refused(self):
        entry = {"size": 1, "sha256": "0"}
        for changes in ({"folder": "shards_4"}, {"folder": "../x"}, {"files": {}}, {"files": {"../a": entry}}):
            self.refused("must hold the shards", **changes)
        self.refused("must hold the shards", files={self.shard.name: entry})
        shutil.copytree(self.source, self.folder / "elsewhere" / self.source.name)
        self.refused(
            "must hold the shards", folder=f"elsewhere/{self.source.name}"
        )  # even if its files are the right ones
        with mock.patch.object(sharded, "_entry", side_effect=AssertionError):  # no file elsewhere is read
            for folder in ("..", "../x", ".", str(self.source)):
                self.refused("must hold the shards", folder=folder)
        (self.source / "more").mkdir()
        self.refused("must hold the shards")
        (self.source / "more").rmdir()
        state, data = self.state(), bytearray(self.shard.read_bytes())
        data[-1] ^= 1
        self.shard.write_bytes(data)
        self.refused("must hold the shards", state)
        self.shard.write_bytes(b"nonsense")
        self.refused("cannot be read")
        offsets = {"model/a": {"saved_offsets": [0]}}  # of a tensor of two axes
        save_file({"model/a": torch.ones(3, 3)}, self.shard, metadata={"DCP_SHARDING_INFO": json.dumps(offsets)})
        self.refused("cannot be read: [^\n]*$")

    def test_full_disk_is_reported_and_the_next_save_cleans_up(self):
        here = Dist(RankInfo(), "cpu", None, timedelta(minutes=1))
        failed = CheckpointException("x", {1: (OSError(28, "No space left on device"), None)})
        for attempt in range(2):
            with mock.patch("torch.distributed.checkpoint.save", side_effect=failed):
                with self.assertRaisesRegex(OSError, "rank 1.*No space left") as caught:
                    sharded.write({"model/a": torch.ones(3)}, self.folder, 1, here)
            self.assertEqual(caught.exception.errno, 28)
            self.assertEqual(len(list(self.folder.glob("shards_*"))), 1, attempt)

    def test_unused_shard_folders_are_removed(self):
        (self.folder / "shards_1_cd").mkdir()
        torch.save(self.state(), self.folder / "best.pt")
        (self.folder / "damaged.pt").write_bytes(b"x")
        sharded.remove_unused(self.folder)
        self.assertTrue((self.folder / "shards_1_cd").exists(), "while one cannot be read")
        (self.folder / "damaged.pt").unlink()
        sharded.remove_unused(self.folder)
        self.assertEqual([path.name for path in self.folder.glob("shards_*")], [self.source.name])


if __name__ == "__main__":
    unittest.main()
