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

from omnivision.config.schema import setting_types
from omnivision.tools.main import COMMANDS
from tests import runs
from tests import stage_runs as stages
from tests.runs import ROOT

DOCS = ROOT / "docs"
# Smaller than what people type, so that a test need not wait.
QUICKER = {
    "small_data_ft ": "small_data_ft epochs=2 ",
    "launcher.experiment_log_dir=": "num_workers=0 image_size=32 short_side=40 num_frames=4 "
    "trainer.limit_train_batches=2 launcher.experiment_log_dir=",
}


def blocks(file: Path) -> list[tuple[str, str]]:
    """Language and text of the code blocks of a page."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", file.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


class Typed(unittest.TestCase):
    """A folder like a checkout, with clips of one's own and data of the demo's names."""

    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.folder = Path(temporary.name)
        shutil.copytree(ROOT / "config", self.folder / "config")
        shutil.copy(ROOT / "train_app_submitit.py", self.folder)
        data = self.folder / "demo/data"
        films = stages.write_films(data / "synthetic", 12)
        for number, film in enumerate(films):
            target = self.folder / "clips" / ("jump", "run")[number % 2] / f"{number // 2 + 1:03}.mp4"
            target.parent.mkdir(parents=True, exist_ok=True)
            os.symlink(film, target)
        (data / "class_names.txt").write_text("".join(f"action {number}\n" for number in range(12)))
        for split in ("train", "val"):
            np.save(data / f"synthetic/{split}_paths.npy", np.array([Path(film).name for film in films] * 3))
            np.save(data / f"synthetic/{split}_labels.npy", np.arange(36) % 12)

    def type(self, command: str) -> subprocess.CompletedProcess[str]:
        for old, new in QUICKER.items():
            command = command.replace(old, new)
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = os.environ | stages.ONE_THREAD | {"PATH": path, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
        command = command.replace("PYTHONPATH=.", f"PYTHONPATH=.:{ROOT}")
        made = subprocess.run(
            ["sh", "-e"], input=command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=300
        )
        self.assertEqual(made.returncode, 0, f"{command}\n{made.stdout[-3000:]}\n{made.stderr[-3000:]}")
        return made

    def follow(self, page: str) -> str:
        """Do what a page says: write its files (named in a comment of theirs), run its Python and its commands."""
        said = ""
        for language, text in blocks(DOCS / page):
            named = re.match(r"(?:# @package \S+\n)?# (\S+\.(?:py|yaml))\n", text)
            if named:
                (self.folder / named[1]).parent.mkdir(parents=True, exist_ok=True)
                (self.folder / named[1]).write_text(text)
            elif language == "python":
                subprocess.run([sys.executable, "-c", text], cwd=self.folder, check=True)
            else:
                self.assertEqual(language, "sh", "a block that nobody tries")
                said += self.type(text).stdout
        return said

    def test_films_of_ones_own(self):
        """The way that README shows, from a folder of clips to predictions."""
        way = next(text for language, text in blocks(ROOT / "README.md") if "omnivision prepare clips" in text)
        self.assertIn(("sh", way), blocks(DOCS / "index.md"), "both show the same way")
        install, _, rest = way.partition("\n")
        self.assertTrue(
            install.startswith("python3 -m venv .venv && . .venv/bin/activate && pip install -e ."), "done here"
        )
        said = self.type(rest).stdout
        self.assertIn("out/val_paths.npy, val_labels.npy: 2 samples of 2 classes", said)
        self.assertRegex(said, r"lr +[▁▂▃▄▅▆▇█]{60}  epoch 0 to 2")
        self.assertRegex(said, r"data +mine, train: 10 samples; \d+ of \d+ sampled files exist")
        self.assertRegex(said, r"jump +█* .* %")
        self.assertIn("Wrote report.html", said)
        self.assertIn("<h1>mine</h1>", (self.folder / "report.html").read_text())
        summary = runs.summary(self.folder / "runs/mine")
        self.assertEqual((summary["status"], summary["epochs"]), ("finished", 2))

    def test_a_dataset(self):
        self.follow("add_a_dataset.md")
        self.assertEqual(runs.summary(self.folder / "runs/mine")["run"]["sources"], ["mine"])
        self.assertEqual(runs.summary(self.folder / "runs/mae_mine")["run"]["model"], "autoencoder")

    def test_a_model(self):
        said = self.follow("add_a_model.md")
        self.assertRegex(said, r"VideoClassifier: 1\d\d\.\d+ M parameters")
        self.assertEqual(runs.summary(self.folder / "runs/tiny")["status"], "finished")

    def test_a_mask(self):
        said = self.follow("add_a_mask.md")
        self.assertRegex(said, r"hides 48 of 64 tokens")
        self.assertEqual(runs.summary(self.folder / "runs/checkerboard")["status"], "finished")

    def test_a_task(self):
        self.follow("add_a_task.md")
        self.assertEqual(runs.summary(self.folder / "runs/bright")["status"], "finished")


class Site(unittest.TestCase):
    def test_builds_without_a_warning(self):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
            quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}  # what it says of its successor
            made = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True, timeout=300)
            self.assertEqual(made.returncode, 0, made.stderr)
            self.assertNotIn("WARNING", made.stderr)
            settings = (Path(folder) / "settings.html").read_text()
            free = ("datasets", "submitit.additional_parameters")  # names below are the user's own
            groups = {name.rpartition(".")[0] for name in setting_types()}
            for name in setting_types():
                if "." in name and name not in groups and not name.startswith((*free, "trainer.data.image.")):
                    self.assertIn(f"<code>{name}</code>", settings)
            commands = (Path(folder) / "commands.html").read_text()
            for name in COMMANDS:
                self.assertIn(f"omnivision {name}", commands)
            self.assertNotRegex(settings + commands, r'(src|href)="https?://(?!squidfunk|www.mkdocs)')

    def test_pages_written_from_the_code_are_current(self):
        for page, text in runpy.run_path(str(DOCS / "generate.py"))["pages"]().items():
            self.assertEqual(page.read_text(encoding="utf-8"), text, "run: python docs/generate.py")

    def test_pages_do_not_depend_on_the_machine(self):
        """Nor on versions: of other packages' objects they list what the config files give."""
        pages = runpy.run_path(str(DOCS / "generate.py"))["pages"]
        here = pages()
        with (
            mock.patch("os.sched_getaffinity", lambda _: set(range(7))),
            mock.patch("os.cpu_count", lambda: 7),
        ):
            self.assertEqual(pages(), here)

    def test_tables_have_as_many_cells_in_each_row(self):
        text = (DOCS / "settings.md").read_text(encoding="utf-8")
        for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
            self.assertEqual(len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}), 1, table)

    def test_pages_are_all_in_the_index(self):
        listed = (ROOT / "mkdocs.yml").read_text()
        for page in DOCS.glob("*.md"):
            self.assertIn(page.name, listed)

    def test_links_lead_somewhere(self):
        for page in [ROOT / "README.md", *DOCS.glob("*.md")]:
            text = page.read_text(encoding="utf-8")
            for target in re.findall(r"\]\(([^)#]+)", re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.DOTALL)):
                if "://" not in target:
                    self.assertTrue((page.parent / target).exists(), f"{page.name}: {target}")


class Notebook(unittest.TestCase):
    def test_opens_a_checkpoint_and_reconstructs_a_clip(self):
        with tempfile.TemporaryDirectory() as name:
            folder, film = Path(name), runs.real_films()[0]
            made = runs.run(folder / "mae", *runs.write_split(folder, [film] * 8), "epochs=1", "clip_duration=0.9")
            self.assertEqual(made.returncode, 0, made.stderr)
            notebook = nbformat.read(DOCS / "reconstruct.ipynb", as_version=4)
            nbformat.validate(notebook)
            extra = {
                "CHECKPOINT": str(folder / "mae"),
                "VIDEO": film,
                "PYTHONPATH": str(ROOT),
                "HOME": name,
            } | stages.ONE_THREAD
            with unittest.mock.patch.dict(os.environ, extra):
                NotebookClient(notebook, timeout=200, resources={"metadata": {"path": name}}).execute()
            outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
            kinds = {kind for output in outputs for kind in output.get("data", {})}
            self.assertLessEqual({"image/png", "image/gif"}, kinds)
            self.assertRegex("".join(output.get("text", "") for output in outputs), r"95% hidden: \d+\.\d")


if __name__ == "__main__":
    unittest.main()
