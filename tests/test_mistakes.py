"""Invalid input on the command line and in files of one's own: each is one paragraph that names what to change."""

import contextlib
import io
import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

from omnivision import train
from omnivision.config.compose import parse_command_line
from omnivision.launch.exit import exit_code_and_reason, unwrap_keyboard_interrupt
from omnivision.training import build, dry_run
from omnivision.utils.errors import EXIT_FAULT, EXIT_SIGINT
from tests.runs import ROOT

STAGE_1 = ("+experiments=omnimae/omnimain_train_video", "+trainer=mae_k150_config")
HERE = ("submitit.use_cluster=false", "launcher.num_nodes=1", "launcher.gpus_per_node=1", "trainer.mode=dry")

# What is typed after a good command (an argument, or several), and a part of what is printed.
AFTER_STAGE_1: list[tuple[str | list[str], str]] = [
    # Unknown settings: what was meant.
    ("epoch=3", "mean epochs?"),
    ("+epoch=3", "mean epochs?"),
    ("trainer.optim.gradient_clp=1", "mean trainer.optim.gradient_clip?"),
    ("trainer.seed=3", "mean trainer.seed_value?"),
    ("optim.gradient_clip=1", "mean trainer.optim.gradient_clip?"),
    ("num_nodes=2", "mean launcher.num_nodes?"),
    ("~trainer.modes", "mean trainer.mode?"),
    ("++trainer.callbacks=[]", "trainer.callbacks "),
    ("trainer.data.repeats.k150=2", "+trainer.data.repeats.k150=2"),
    # Config groups.
    ("trainer/model=vitbas", "mean vitbase?"),
    ("trainer/model=VITBASE", "mean vitbase?"),
    ("trainer/model=vitbase.yml", "mean vitbase?"),
    ("trainer/modl=vitbase", "mean trainer/model?"),
    ("++trainer/model=vitbase", "trainer/model"),
    ("trainer/model={a:1}", "trainer/model"),
    ("trainer/nosuch=a", "trainer/nosuch"),
    ("trainer=ucf101", "mean mae_ft_ucf101_config?"),
    ("+trainer=mae_in1k_k150_config", "trainer"),
    ("trainer/checkpoint=no_heads", "+trainer/checkpoint=no_heads"),
    ("trainer/model=vitbase_ft", "Set trainer/model=vitbase."),
    # Values.
    ("batch_size=abc", "batch_size "),
    ("trainer.logging.also={a:1}", "trainer.logging.also"),
    ("trainer.model=[]", "trainer.model=[]"),
    ("epochs=${foo}", "foo"),
    ("launcher.experiment_log_dir=", "launcher.experiment_log_dir"),
    ("launcher.experiment_log_dir=/dev/null", "launcher.experiment_log_dir"),
    (f"launcher.experiment_log_dir=/tmp/{'x' * 300}", "launcher.experiment_log_dir"),
    # What building the model, its optimizer and its masks says.
    ("num_frames=15", "num_frames"),
    ("image_size=230", "image_size"),
    ("trainer.model.decoder.attention=crss", "'crss'"),
    ("++trainer.model.decoder.dept=3", "trainer.model.decoder.dept"),
    ("trainer.model.decoder.share=0", "trainer.model.decoder.share"),
    ("trainer.optim.options.lr.0.scheduler.peak=-1", "trainer.optim.options.lr[0].scheduler"),
    ("trainer.optim.options.lr.0.scheduler.peak=nan", "trainer.optim.options.lr[0].scheduler"),
    ("++trainer.optim.options.lrr=${trainer.optim.options.lr}", "trainer.optim.options"),
    (["~trainer.optim.options.lr", "lr=1e-3"], "trainer.optim.options.lr"),
    ("trainer.data.mask.ratio=0.0001", "trainer.data.mask"),
    (["trainer.freeze=[nothing.*]", "pretrained_checkpoint_path=null"], "trainer.freeze"),
    # Syntax, sweeps and flags.
    ("pretrained_checkpoint_path=runs/lr=3/x", "pretrained_checkpoint_path=runs/lr=3/x"),
    ("batch_size=8,16", "batch_size=8,16"),
    (["-m", "epochs=range(1,100000000)"], "10000"),
    (["-m", "epochs=range(0)"], "epochs=range(0)"),
    (["batch_size", "8"], "batch_size"),
    ("=4", "=4"),
    ("trainer.freeze=[trunk", "trainer.freeze=[trunk"),
    (["--batch_size", "8"], "--batch_size"),
    (["--cfg", "jbo"], "jbo"),
    (["--config-dir", "/nowhere"], "/nowhere"),
    (["--config-dir", ""], "--config-dir"),
    ("--config-dir", "--config-dir"),
    (["--experimental-rerun", __file__], "--experimental-rerun"),
]
ALONE: list[tuple[list[str], str]] = [
    ([], "Missing: epochs, "),
    (["+experiments=omnimae/omnimain_train_video_ft"], "+trainer=mae_ft_ucf101_config"),
    (["+trainer=mae_ft_k150_config"], "+experiments=omnimae/omnimain_train_video_ft "),
    (["+trainer=mae_k150_config"], "+experiments=omnimae/omnimain_train_video "),
    (["+experiments=omnimae/omnimain_train_vide", STAGE_1[1]], "mean omnimain_train_video?"),
    (["experiments=omnimae/omnimain_train_video"], "+experiments=omnimae/omnimain_train_video"),
    ([STAGE_1[0], "trainer=mae_k150_config"], "+trainer=mae_k150_config"),
]
FILES: dict[str, str] = {  # of a site: what it holds, and a part of what is printed
    "epoch: 3\n": "mean epochs?",
    "submitit:\n  partitoin: gpu\n": "mean submitit.partition?",
    "trainer:\n  model: {_target_: omnivision.models.mae.Autoencoder}\n": "trainer.model._target_",
    "defaults: [/trainer/model: vitbas]\n": "mean vitbase?",
    "epochs: [3\n": "lab.yaml",
    "trainer: {trust_targets: [logging]}\n": "trainer.trust_targets",
    "epochs: ${\n": "configuration file",
    "- a\n- b\n": "site/lab",
    "submitit:\n\tpartition: x\n": "line 3",
    "trainer:\n  data: {sources: {k150: '${datasets.k15}'}}\n": "datasets.k15",
    "trainer: null\n": "trainer",
    "batch_size: null\n": "batch_size ",
    "batch_size: 010\n": "'010'",
    "trainer/model: vitbase\n": "trainer/model ",
    "defaults: [lab]\n": "includes itself",
}
# What Hydra would run or write for a file is neither: its part of a configuration is not used.
HYDRA = (
    "{callbacks: {x: {_target_: logging.FileHandler, filename: /tmp/never}}}",
    "{run: {dir: /tmp/never}}",
    "{launcher: {_target_: logging.FileHandler}}",
    "{job_logging: {version: 1, handlers: {h: {class: logging.FileHandler, filename: /tmp/never}}, root: {handlers: [h]}}}",
)


class Invalid(unittest.TestCase):
    def refusal(self, *arguments: str) -> str:
        """What the command says, which must be one paragraph, exit code 1 and no traceback."""
        out, err = io.StringIO(), io.StringIO()
        with mock.patch.dict(os.environ), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            with (
                mock.patch.object(dry_run, "draw"),
                mock.patch.object(build, "clip_cost", return_value=None),
            ):  # are slow
                with self.assertRaises(SystemExit) as ended:
                    train.main(arguments)
        shown, said = out.getvalue().partition("\n\n")[0], err.getvalue()
        self.assertEqual(ended.exception.code, 1)
        if shown.startswith("This run would stop"):  # what the settings alone do not show
            self.assertEqual(said, "")
            return shown
        self.assertEqual(shown, "")
        self.assertTrue(said.startswith("error: "), said)
        self.assertNotIn("Traceback", said)
        return said

    def assert_refused(self, arguments: list[str], part: str) -> None:
        with self.subTest(arguments):
            self.assertIn(part, self.refusal(*arguments))

    def test_on_the_command_line(self):
        with tempfile.TemporaryDirectory() as folder:
            for arguments, part in AFTER_STAGE_1:
                more = [arguments] if isinstance(arguments, str) else arguments
                self.assert_refused([*STAGE_1, f"launcher.experiment_log_dir={folder}/run", *HERE, *more], part)
            for alone, part in ALONE:
                self.assert_refused(alone, part)
            self.assertEqual(os.listdir(folder), [], "nothing is left")

    def site(self, folder: str, name: str, text: str) -> list[str]:
        (Path(folder) / "site" / name).parent.mkdir(parents=True, exist_ok=True)
        (Path(folder) / "site" / name).write_text(text)
        return ["--config-dir", folder, *STAGE_1, "+site=lab", f"launcher.experiment_log_dir={folder}/run", *HERE]

    def test_in_a_file_of_ones_own(self):
        cases = [("lab.yaml", f"# @package _global_\n{text}", part) for text, part in FILES.items()]
        cases += [
            ("lab.yml", "# @package _global_\n", "site/lab"),
            ("lab.yaml/x", "", "site/lab"),
            ("lab.yaml", "\ufeff# @package _global_\nepochs: 3\n", "@package _global_"),
            ("lab.yaml", "# @package _globl_\nepochs: 3\n", "_globl_"),
            ("lab.yaml", "epochs: 3\n", "@package _global_"),
        ]
        for name, text, part in cases:
            with tempfile.TemporaryDirectory() as folder, self.subTest(name + text):
                self.assert_refused(self.site(folder, name, text), part)

    def test_nothing_of_hydra_is_run_or_written(self):
        for text in HYDRA:
            with tempfile.TemporaryDirectory() as folder, self.subTest(text):
                arguments = self.site(folder, "lab.yaml", f"# @package _global_\nhydra: {text}\nepoch: 3\n")
                self.assert_refused(arguments, "mean epochs?")
                self.assertEqual(os.listdir(folder), ["site"])
                self.assertFalse(Path("/tmp/never").exists())

    def test_an_interruption_that_a_library_made_an_error_of(self):
        try:
            try:
                raise KeyboardInterrupt
            except KeyboardInterrupt as stroke:
                raise RuntimeError("of a library") from stroke
        except RuntimeError as error:
            self.assertEqual(exit_code_and_reason(unwrap_keyboard_interrupt(error))[0], EXIT_SIGINT)
        self.assertEqual(exit_code_and_reason(unwrap_keyboard_interrupt(RuntimeError("x")))[0], EXIT_FAULT)
        one, other = MemoryError(), ValueError()
        one.__cause__, other.__context__ = other, one  # as `raise one from other` makes it while one is handled
        self.assertIs(unwrap_keyboard_interrupt(one), one)

    def test_flags_may_stand_anywhere(self):
        with tempfile.TemporaryDirectory() as folder:
            command = parse_command_line(["a=1", "-m", "--config-dir", folder, "b=2", "-cn", "mine"], ROOT / "config")
            self.assertEqual((command.overrides, command.multirun, command.config_name), (["a=1", "b=2"], True, "mine"))
            self.assertEqual(command.config_dirs, [Path(folder), ROOT / "config"])

    def test_a_traceback_for_those_who_want_one(self):
        environment = os.environ | {"OMNIVISION_TRACEBACK": "1"}
        command = [sys.executable, "train_app_submitit.py", *STAGE_1, "epoch=3"]
        made = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        self.assertEqual((made.returncode, "Traceback" in made.stderr), (1, True), made.stderr)


if __name__ == "__main__":
    unittest.main()
