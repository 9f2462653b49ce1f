"""The documentation: it builds, knows every setting and command, and what it tells people to type does what it says."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import nbformat
import numpy as np
from nbclient import NotebookClient

from omnivision.config.schema import setting_hints
from omnivision.tools.main import COMMANDS
from tests import runs
from tests import stage_runs as stages
from tests.fixtures import Folder
from tests.runs import ROOT

DOCS = ROOT / "docs"
# Smaller than what people type, so that a test need not wait.
QUICKER = {
    "small_data_ft ": "small_data_ft epochs=2 ",
    "launcher.experiment_log_dir=": "num_workers=0 image_size=48 short_side=54 num_frames=4 "
    "trainer.limit_train_batches=2 launcher.experiment_log_dir=",
}


def blocks(file: Path) -> list[tuple[str, str]]:
    """Language and text of the code blocks of a page."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", file.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


class Typed(Folder):
    """A folder like a checkout, with clips of one's own and data of the demo's names."""

    def setUp(self):
        super().setUp()
        for folder in ("config", "omnivision"):
            shutil.copytree(ROOT / folder, self.folder / folder, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "train_app_submitit.py", self.folder)
        data = self.folder / "demo/data"
        videos = stages.write_videos(data / "synthetic", 12)
        for number, video in enumerate(videos):
            target = self.folder / "clips" / ("jump", "run")[number % 2] / f"{number // 2 + 1:03}.mp4"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(video)
        (data / "class_names.txt").write_text("".join(f"action {number}\n" for number in range(6)))
        for split in ("train", "val"):
            np.save(data / f"synthetic/{split}_paths.npy", np.array([Path(video).name for video in videos] * 3))
            np.save(data / f"synthetic/{split}_labels.npy", np.arange(36) % 6)
            rows = [f"{n}.mp4,{('run', 'jump')[n % 2]},{('park', 'gym')[n % 3 // 2]},{n / 24}" for n in range(24)]
            (data / f"synthetic/{split}.csv").write_text("\n".join(["path,action,place_type,turns", *rows]) + "\n")
        for number, video in enumerate(videos, start=12):
            (data / f"synthetic/{number}.mp4").symlink_to(video)
        (data / "synthetic/val").mkdir()
        (data / "synthetic/val/00.mp4").symlink_to(videos[0])
        shutil.copytree(ROOT / "examples/starter", self.folder / "examples/starter")

    def type(self, command: str) -> str:
        for old, new in QUICKER.items():
            command = command.replace(old, new)
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = os.environ | stages.ONE_THREAD | {"PATH": path, "PYTHONPATH": str(self.folder), "COLUMNS": "100"}
        options = {"cwd": self.folder, "env": environment, "capture_output": True, "text": True, "timeout": 300}
        result = subprocess.run(["sh", "-e"], input=command, **options)
        self.assertEqual(result.returncode, 0, f"{command}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}")
        return result.stdout

    def follow(self, page: str) -> str:
        """Do what a page says: write its files (named in a comment of theirs), run its Python and its commands."""
        output = ""
        for language, text in blocks(DOCS / page):
            named = re.match(r"(?:# @package \S+\n)?# (\S+\.(?:py|yaml))\n", text)
            if named:
                (self.folder / named[1]).parent.mkdir(parents=True, exist_ok=True)
                (self.folder / named[1]).write_text(text)
            elif language == "python":
                subprocess.run([sys.executable, "-c", text], cwd=self.folder, check=True)
            else:
                self.assertEqual(language, "sh", "a block that nobody tries")
                output += self.type(text)
        return output

    def test_ones_own_videos(self):
        """The way that README shows, from a folder of clips to predictions."""
        way = next(text for language, text in blocks(ROOT / "README.md") if "omnivision prepare clips" in text)
        self.assertIn(("sh", way), blocks(DOCS / "index.md"), "both show the same way")
        install, _, rest = way.partition("\n")
        self.assertTrue(
            install.startswith("python3 -m venv .venv && . .venv/bin/activate && pip install -e ."), "done here"
        )
        output = self.type(rest)
        self.assertRegex(output, "out/val_paths.npy.*2 samples of 2 classes")
        self.assertRegex(output, r"lr .* -> peak .* -> ")
        self.assertRegex(output, r"jump +█* .* %")
        self.assertIn("<h1>mine</h1>", (self.folder / "report.html").read_text())
        summary = runs.read_summary(self.folder / "runs/mine")
        self.assertEqual((summary["status"], summary["epochs"]), ("finished", 2))

    def test_pages_about_additions(self):
        for page, run, output in (
            ("add_a_dataset.md", "mae_mine", "Finished"),
            ("add_a_model.md", "tiny", r"VideoClassifier: 1\d\d\.\d+ M parameters"),
            ("add_a_mask.md", "checkerboard", r"hides 48 of 64 tokens"),
            ("add_a_task.md", "bright", "Finished"),
            ("labels.md", "numbers", r"(?s)mAP .*turns +\d\.\d"),
        ):
            with self.subTest(page):
                self.assertRegex(self.follow(page), output)
                self.assertEqual(runs.read_summary(self.folder / "runs" / run)["status"], "finished")
        self.assertEqual(runs.read_summary(self.folder / "runs/mine")["run"]["sources"], ["mine"])


class Site(unittest.TestCase):
    def test_builds_without_a_warning(self):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
            quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
            result = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True, timeout=300)
            self.assertEqual(result.returncode, 0, result.stderr)
            self.assertNotIn("WARNING", result.stderr)
            settings = (Path(folder) / "settings.html").read_text()
            free = ("datasets", "submitit.additional_parameters")  # names below are the user's own
            groups = {name.rpartition(".")[0] for name in setting_hints()}
            for name in setting_hints():
                if (
                    "." in name
                    and ".NAME." not in name
                    and name not in groups
                    and not name.startswith((*free, "trainer.data.image."))
                ):
                    self.assertIn(f"<code>{name}</code>", settings)
            commands = (Path(folder) / "commands.html").read_text()
            self.assertEqual([name for name in COMMANDS if f"omnivision {name}" not in commands], [])
            self.assertNotRegex(settings + commands, r'(src|href)="https?://(?!squidfunk|www.mkdocs)')

    def test_pages_written_from_the_code_are_current(self):
        """On every machine."""
        with mock.patch("os.sched_getaffinity", lambda _: set(range(7))), mock.patch("os.cpu_count", lambda: 7):
            pages = runpy.run_path(str(DOCS / "generate.py"))["pages"]()
        for page, text in pages.items():
            self.assertEqual(page.read_text(encoding="utf-8"), text, "run: python docs/generate.py")
            for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):  # rows of equally many cells
                self.assertEqual(len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}), 1, table)

    def test_pages_are_in_the_index_and_links_lead_somewhere(self):
        listed = (ROOT / "mkdocs.yml").read_text()
        self.assertEqual([page.name for page in DOCS.glob("*.md") if page.name not in listed], [])
        for page in [ROOT / "README.md", *DOCS.glob("*.md")]:
            text = page.read_text(encoding="utf-8")
            for target in re.findall(r"\]\(([^)#]+)", re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.DOTALL)):
                if "://" not in target:
                    self.assertTrue((page.parent / target).exists(), f"{page.name}: {target}")


class Notebook(unittest.TestCase):
    def test_opens_a_checkpoint_and_reconstructs_a_clip(self):
        with tempfile.TemporaryDirectory() as name:
            folder, video = Path(name), runs.real_videos()[0]
            result = runs.run(folder / "mae", *runs.write_split(folder, [video] * 8), "epochs=1", "clip_duration=0.9")
            self.assertEqual(result.returncode, 0, result.stderr)
            notebook = nbformat.read(DOCS / "reconstruct.ipynb", as_version=4)
            nbformat.validate(notebook)
            extra = {"CHECKPOINT": str(folder / "mae"), "VIDEO": video, "PYTHONPATH": str(ROOT), "HOME": name}
            with mock.patch.dict(os.environ, extra | stages.ONE_THREAD):
                NotebookClient(notebook, timeout=200, resources={"metadata": {"path": name}}).execute()
            outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
            kinds = {kind for output in outputs for kind in output.get("data", {})}
            self.assertLessEqual({"image/png", "image/gif"}, kinds)
            self.assertRegex("".join(output.get("text", "") for output in outputs), r"95% hidden: \d+\.\d")


if __name__ == "__main__":
    unittest.main()
