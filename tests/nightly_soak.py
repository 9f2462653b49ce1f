"""A run for an hour (SOAK_MINUTES) with validation, restarts and faults: its memory, descriptors and threads do not grow."""

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path

from omnivision_demo.dataset import write_demo_data
from tests import runs
from tests.launch.test_launch import children

MINUTES = float(os.environ.get("SOAK_MINUTES", "60"))
SAMPLE_SECONDS = 2.0
GROWTH = 1.05  # of the median of the last quarter over that of the second one
EXIT_CODES = {"SIGTERM": 143, "SIGKILL": -9, "a killed data worker": 70, "SIGUSR2": 140}  # of each end
MEASURED = ("memory", "descriptors", "threads")


def measure(pid: int) -> tuple[float, int, int]:
    """Return MB of a process and its data workers, and its open descriptors and threads."""
    family = [pid, *(w for server in children(pid, "forkserver") for w in children(server, "forkserver"))]
    descriptors, threads = (len(os.listdir(f"/proc/{pid}/{what}")) for what in ("fd", "task"))
    return sum(proportional_memory(each) for each in family), descriptors, threads


def proportional_memory(pid: int) -> float:
    """Return MB without pages of files, whose share depends on other processes; a page of n processes counts as 1/n."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:"))) / 1000


class Soak(unittest.TestCase):
    def test_an_hour(self):
        folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        write_demo_data(folder / "data", train=20, val=5)
        run = folder / "run"
        command = [
            sys.executable, str(runs.ROOT / "train_app_submitit.py"), "+experiments=demo/align",
            "+trainer=mae_ft_demo_synthetic_config", f"data_root={folder}/data", f"launcher.experiment_log_dir={run}",
            "pretrained_checkpoint_path=null", "trainer.accelerator=cpu", "epochs=100000", "trainer.val_epoch_freq=5",
            "trainer.checkpoint.save_every_steps=50", "trainer.logging.log_freq=1",
        ]  # fmt: skip
        for end in EXIT_CODES:
            samples = self.run_until(command, folder / "output", end, 60 * MINUTES / len(EXIT_CODES))
            quarter = len(samples) // 4
            for what, values in zip(MEASURED, zip(*samples, strict=True), strict=True):
                before, after = statistics.median(values[quarter : 2 * quarter]), statistics.median(values[-quarter:])
                print(f"  soak, ended by {end}: {what} {before:.1f} -> {after:.1f}", flush=True)
                self.assertLessEqual(after, before * GROWTH, what)
        steps = runs.read_metrics(run)
        self.assertEqual([line["step"] for line in steps], list(range(1, len(steps) + 1)), "none twice, none missing")
        self.assertNotIn(None, [line["loss"] for line in steps])
        print(f"  soak: {len(steps)} steps, {len(runs.read_metrics(run, 'epoch', 'val'))} validations", flush=True)

    def run_until(self, command: list[str], output: Path, end: str, seconds: float) -> list[tuple[float, int, int]]:
        """Start a run, measure it for so many seconds, and end it."""
        samples, start = [], time.monotonic()
        with open(output, "w") as file:
            process = subprocess.Popen(command, cwd=output.parent, stdout=file, stderr=file)
            self.addCleanup(process.kill)
            while time.monotonic() - start < seconds:
                self.assertIsNone(process.poll(), output.read_text()[-2000:])
                try:
                    samples.append(measure(process.pid))
                except (FileNotFoundError, ProcessLookupError):
                    pass  # a worker ended meanwhile
                time.sleep(SAMPLE_SECONDS)
            if end == "a killed data worker":
                [server] = children(process.pid, "forkserver")
                os.kill(children(server, "forkserver")[0], signal.SIGKILL)
            else:
                process.send_signal(getattr(signal, end))
            self.assertEqual(process.wait(timeout=60), EXIT_CODES[end], output.read_text()[-2000:])
        return samples


if __name__ == "__main__":
    unittest.main()
