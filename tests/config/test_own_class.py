"""Classes of one's own, and memory that is not enough: one paragraph with the way out, and predictions once trusted."""

import contextlib
import io
import json
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import omnivision
from omnivision.config.instantiate import target_problems
from omnivision.launch.exit import exit_code_and_reason, print_error
from omnivision.models import architecture
from omnivision.models.classifier import VideoClassifier
from omnivision.models.vit import VisionTransformer
from omnivision.tasks.base import Task
from omnivision.tools import main
from omnivision.training import build
from omnivision.utils.errors import EXIT_FAULT, UserError, is_out_of_memory
from omnivision.utils.io import safe_load
from tests import stage_runs as stages

MODULES = {
    "ownmodels": """
import torch
from torch import nn
from omnivision.models.patches import normalize_pixels

class Tiny(nn.Module):
    def __init__(self, classes, trunk=None):
        super().__init__()
        self.norm = nn.LayerNorm(3)
        self.heads = nn.ModuleList(nn.Linear(3, count) for count in classes)

    def forward(self, video, head=0, depth=None):
        return self.heads[head](self.norm(normalize_pixels(video, channel_dim=1).mean((2, 3, 4))))

class Greedy(Tiny):
    def __init__(self, classes, trunk=None):
        super().__init__(classes)

    def forward(self, video, head=0, depth=None):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

class Raises(nn.Module):
    def __init__(self, size=3):
        raise KeyError("no such size")

class RaisesLater(nn.Module):
    def __init__(self, classes):
        raise RuntimeError("boom")
""",
    "ownimport": "import nothing_of_that_name\n",
    "ownsyntax": "def f(:\n",
    "ownfault": "1 / 0\n",
}


class Case(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        for name, text in MODULES.items():
            (cls.folder / f"{name}.py").write_text(text)
            cls.addClassCleanup(sys.modules.pop, name, None)
        path = mock.patch.object(sys, "path", [str(cls.folder), *sys.path])
        cls.enterClassContext(path)

    def command(self, *arguments: object) -> tuple[int, str, str]:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main.main([str(argument) for argument in arguments])
        return code, out.getvalue(), err.getvalue()


class Runs(Case):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        films = cls.films = stages.write_videos(cls.folder / "films", 6)
        cls.data = [
            *stages.write_split(cls.folder, "ucf101", "train", films),
            *stages.write_split(cls.folder, "ucf101", "val", films[:3]),
            "pretrained_checkpoint_path=null",
            "launcher.num_nodes=1",
            "trainer.optim.layer_decay=null",
            "++trainer.trust_targets=[ownmodels]",
        ]
        result = cls.train("run", "ownmodels.Tiny")
        assert result.returncode == 0, result.stderr

    @classmethod
    def train(cls, name: str, target: str) -> stages.Result:
        return stages.run_in_process(
            stages.command("ft", cls.folder / name, *cls.data, f"trainer.model._target_={target}")
        )

    def test_predictions_equal_those_of_the_evaluation(self):
        with np.load(self.folder / "run/predictions/ucf101.npz") as said:
            path, wanted = str(said["path"][0]), said["scores"][0]
        model = omnivision.load(self.folder / "run", trust_targets=["ownmodels"])
        self.assertTrue(np.allclose(model.scores(path), wanted, atol=1e-5))
        code, out, err = self.command("predict", self.folder / "run", path, "--trust-targets", "ownmodels", "--json")
        self.assertEqual((code, "error" in err, len(json.loads(out)[path])), (0, False, 3))

    def test_unsupported_commands_print_one_paragraph(self):
        run, film = self.folder / "run", self.films[0]
        alone = self.folder / "alone.pt"
        alone.write_bytes((run / "checkpoints/checkpoint.pt").read_bytes())
        trust = ("--trust-targets", "ownmodels")
        for arguments, saying in (
            (("predict", run, film), "--trust-targets ownmodels"),
            (("predict", run, film, "--trust-targets", "others"), "--trust-targets ownmodels"),
            (("predict", alone, film, *trust), "config.yaml"),
            (("reconstruct", run, film, "x.gif"), "--trust-targets ownmodels"),
            (("reconstruct", run, film, "x.gif", *trust), "Tiny, which has no decoder"),
            (("export", run, self.folder / "out.pt", "--to", "pt"), "ownmodels.Tiny"),
            (("export", alone, self.folder / "out", "--to", "hf"), "ownmodels.Tiny"),
            (("import", run, self.folder / "out.pt"), "ownmodels.Tiny"),
        ):
            with self.subTest(arguments):
                code, _, err = self.command(*arguments)
                self.assertEqual((code, err.count("error: "), "Traceback" in err), (1, 1, False), err)
                self.assertIn(saying, err)
        for arguments in (("runs", self.folder), ("report", self.folder, "--out", self.folder / "report")):
            code, _, err = self.command(*arguments)
            self.assertEqual((code, "Traceback" in err), (0, False), err)

    def test_step_out_of_memory_is_reported(self):
        result = self.train("greedy", "ownmodels.Greedy")
        self.assertEqual(result.returncode, EXIT_FAULT, result.stderr)
        self.assertNotIn("Traceback", result.stderr)
        error = result.stderr[result.stderr.index("error: ") :]
        self.assertEqual(error.count("\n"), 1)
        self.assertIn("trainer.optim.accumulation_steps", error)
        summary = json.loads((self.folder / "greedy/summary.json").read_text())
        self.assertEqual(summary["status"], "failed")
        self.assertIn("20.00 GiB", summary["exit_reason"])
        self.assertIn("Traceback", (self.folder / "greedy/logs/rank_0.log").read_text())


class Building(Case):
    def test_unimportable_classes_are_found_before_the_start(self):
        for target, part in (
            ("nopackage.Model", "PYTHONPATH"),
            ("ownmodels.Tine", "ownmodels.Tiny?"),
            ("ownimport.Model", "nothing_of_that_name"),
            ("ownsyntax.Model", "SyntaxError"),
            ("ownfault.Model", "ZeroDivisionError"),
        ):
            problems = target_problems({"_target_": target}, "trainer.model", [target.partition(".")[0]])
            self.assertIn(part, problems["trainer.model._target_"])
        self.assertEqual(target_problems({"_target_": "ownmodels.Tiny"}, "trainer.model", ["ownmodels"]), {})

    def test_errors_in_user_classes_are_reported(self):
        for target, more, part in (
            ("ownmodels.Raises", {}, "KeyError: 'no such size'"),
            ("ownmodels.RaisesLater", {"classes": [3]}, "boom"),
            ("ownmodels.Tiny", {"classes": [3], "depth": 2}, "'depth'"),
        ):
            with self.subTest(target), self.assertRaises(UserError) as caught:
                build.instantiate_target({"_target_": target}, "trainer.model", **more)
            for each in ("trainer.model", part):
                self.assertIn(each, str(caught.exception))


class EarlierTask(Task):
    """A user's task written for an earlier release: two of its methods had other names."""

    def epoch_figures(self, model):
        return {"brightness": 1.0}

    def pictures(self, model, batch):
        return None


class Tasks(unittest.TestCase):
    def test_methods_of_an_earlier_release_are_called(self):
        settings = mock.MagicMock()
        with mock.patch("omnivision.training.build.build_with_labels", return_value=EarlierTask()):
            task = build.build_task(settings)
        self.assertEqual(task.epoch_metrics(None), {"brightness": 1.0})
        self.assertIsNone(task.visualize(None, None))


class Memory(Case):
    ERRORS = (
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
        ),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        OSError(12, "Cannot allocate memory"),
    )

    def test_every_out_of_memory_error_has_one_message_and_exit_code(self):
        for error in self.ERRORS:
            code, reason = exit_code_and_reason(error)
            self.assertEqual(code, EXIT_FAULT)
            self.assertIn("batch_size", reason)
            with contextlib.redirect_stderr(io.StringIO()) as stderr:
                print_error(error)
            self.assertEqual(stderr.getvalue().count("\n"), 1)
            with mock.patch.object(main, "call", side_effect=error):
                code, _, err = self.command("predict", "x", "y")
            self.assertEqual((code, err.count("\n")), (EXIT_FAULT, 1))
        for other in (RuntimeError("shapes do not match"), OSError(2, "No such file"), ValueError("out of memory")):
            self.assertFalse(is_out_of_memory(other))

    def test_out_of_memory_is_not_reported_as_an_invalid_file(self):
        file = self.folder / "x.pt"
        torch.save({}, file)
        trunk = VisionTransformer(48, 1, 3, num_frames=2, image_size=16)
        described = architecture.architecture_of(VideoClassifier(trunk, [2]))
        for error in (self.ERRORS[0], self.ERRORS[2]):
            with mock.patch("torch.load", side_effect=error), self.assertRaises(type(error)) as caught:
                safe_load(file)
            self.assertNotIsInstance(caught.exception, UserError)
        with mock.patch.object(architecture, "VisionTransformer", side_effect=self.ERRORS[2]):
            with self.assertRaises(RuntimeError):
                architecture.from_architecture(described, "x")


if __name__ == "__main__":
    unittest.main()
