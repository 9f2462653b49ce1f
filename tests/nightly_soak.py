"""A run for an hour (SOAK_MINUTES), with validation, restarts and faults: memory, descriptors and threads stay as they are."""

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import unittest
from dataclasses import dataclass, field
from pathlib import Path

from tests import runs
from tests.test_launch import children

MINUTES = float(os.environ.get("SOAK_MINUTES", "60"))
LOOK_SECONDS = 2.0
GROWTH = 1.05  # of the median of the last quarter over that of the second one
ENDS = {"SIGTERM": 143, "SIGKILL": -9, "a killed data worker": 70, "SIGUSR2": 140}  # and the exit code of each


@dataclass
class Looks:
    """What was seen of one start, look by look."""

    memory: list[float] = field(
        default_factory=list
    )  # MB of the process and its data workers, shared pages counted once
    descriptors: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)

    def look(self, pid: int) -> None:
        family = [pid, *(w for server in children(pid, "forkserver") for w in children(server, "forkserver"))]
        try:
            self.memory.append(sum(proportional_memory(each) for each in family))
            self.descriptors.append(len(os.listdir(f"/proc/{pid}/fd")))
            self.threads.append(len(os.listdir(f"/proc/{pid}/task")))
        except (FileNotFoundError, ProcessLookupError):
            pass  # it ended while we looked

    def quarters(self, values: list) -> tuple[float, float]:
        """Medians of the second quarter and of the last one."""
        part = len(values) // 4
        return statistics.median(values[part : 2 * part]), statistics.median(values[-part:])


def proportional_memory(pid: int) -> float:
    """MB that are no page of a file (its share depends on what else runs); a page of n processes counts as one n-th."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:"))) / 1000


class Soak(unittest.TestCase):
    def test_an_hour(self):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            films = [
                sys.executable,
                "-m",
                "omnivision.tools.main",
                "demo-data",
                str(folder / "data"),
                "--train",
                "20",
                "--val",
                "5",
            ]
            subprocess.run(films, check=True, capture_output=True, cwd=runs.ROOT)
            run, share = folder / "run", 60 * MINUTES / len(ENDS)
            command = [
                sys.executable, str(runs.ROOT / "train_app_submitit.py"), "+experiments=demo/align",
                "+trainer=mae_ft_demo_synthetic_config", f"data_root={folder}/data", f"launcher.experiment_log_dir={run}",
                "pretrained_checkpoint_path=null", "trainer.accelerator=cpu", "epochs=100000", "trainer.val_epoch_freq=5",
                "trainer.checkpoint.save_every_steps=50", "trainer.logging.log_freq=1",
            ]  # fmt: skip
            for end in ENDS:
                looks = self.one_start(command, folder, end, share)
                for what in ("memory", "descriptors", "threads"):
                    before, after = looks.quarters(getattr(looks, what))
                    print(f"  soak, ended by {end}: {what} {before:.1f} -> {after:.1f}", flush=True)
                    self.assertLessEqual(after, before * GROWTH, what)
            steps = [line["step"] for line in runs.lines(run)]
            self.assertEqual(steps, list(range(1, len(steps) + 1)), "none twice, none missing")
            self.assertTrue(all(line["loss"] is not None for line in runs.lines(run)))
            print(f"  soak: {len(steps)} steps, {len(runs.lines(run, 'epoch', 'val'))} validations", flush=True)

    def one_start(self, command: list[str], folder: Path, end: str, seconds: float) -> Looks:
        looks, began = Looks(), time.monotonic()
        with open(folder / "said", "w") as said:
            process = subprocess.Popen(command, cwd=folder, stdout=said, stderr=said)
            self.addCleanup(process.kill)
            while time.monotonic() - began < seconds:
                self.assertIsNone(process.poll(), (folder / "said").read_text()[-2000:])
                looks.look(process.pid)
                time.sleep(LOOK_SECONDS)
            if end == "a killed data worker":
                [server] = children(process.pid, "forkserver")
                os.kill(children(server, "forkserver")[0], signal.SIGKILL)
            else:
                process.send_signal(getattr(signal, end))
            self.assertEqual(process.wait(timeout=60), ENDS[end], (folder / "said").read_text()[-2000:])
        return looks


if __name__ == "__main__":
    unittest.main()
