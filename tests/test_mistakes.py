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
from omnivision.utils.errors import EXIT_FAULT, EXIT_INTERRUPTED
from tests.runs import ROOT

STAGE_1 = ("+experiments=omnimae/omnimain_train_video", "+trainer=mae_k150_config")
HERE = ("submitit.use_cluster=false", "launcher.num_nodes=1", "launcher.gpus_per_node=1", "trainer.mode=dry")

# What is typed after a good command, and parts of what is printed.
AFTER_STAGE_1: list[tuple[list[str], tuple[str, ...]]] = [
    # Unknown settings, with the argument and what was meant.
    (["epoch=3"], ("epoch (argument epoch=3)", "mean epochs?")),
    (["+epoch=3"], ("epoch (argument +epoch=3)", "mean epochs?")),
    (["trainer.optim.gradient_clp=1"], ("mean trainer.optim.gradient_clip?",)),
    (["++trainer.distributed.strateg=fsdp"], ("mean trainer.distributed.strategy?",)),
    (["trainer.seed=3"], ("mean trainer.seed_value?",)),
    (["optim.gradient_clip=1"], ("mean trainer.optim.gradient_clip?",)),
    (["num_nodes=2"], ("mean launcher.num_nodes?",)),
    (["data.num_workers=2"], ("num_workers?",)),
    (["~trainer.modes"], ("trainer.modes", "mean trainer.mode?")),
    (["++trainer.callbacks=[]"], ("trainer.callbacks (argument",)),
    (["trainer.data.repeats.k150=2"], ("+trainer.data.repeats.k150=2",)),
    (["trainer.data.view.scale=[0.2,1]"], ("+trainer.data.view.scale=[0.2,1]",)),
    # Config groups.
    (["trainer/model=vitbas"], ("trainer/model/vitbas", "(argument trainer/model=vitbas)", "mean vitbase?")),
    (["trainer/model=VITBASE"], ("mean vitbase?",)),
    (["trainer/model=vitbase.yml"], ("mean vitbase?",)),
    (["trainer/modl=vitbase"], ("trainer/modl", "mean trainer/model?")),
    (["++trainer/model=vitbase"], ("trainer/model",)),
    (["trainer/model={a:1}"], ("trainer/model",)),
    (["trainer/nosuch=a"], ("trainer/nosuch",)),
    (["trainer=ucf101"], ("mean mae_ft_ucf101_config?",)),
    (["+trainer=mae_in1k_k150_config"], ("trainer",)),
    (["trainer/checkpoint=no_heads"], ("+trainer/checkpoint=no_heads",)),
    (["trainer/model=vitbase_ft"], ("trainer/model=vitbase.",)),
    # Values.
    (["batch_size=abc"], ("batch_size (argument batch_size=abc)",)),
    (["trainer.logging.also={a:1}"], ("trainer.logging.also",)),
    (["trainer.model=[]"], ("trainer.model=[]",)),
    (["epochs=${foo}"], ("epochs", "foo")),
    (["launcher.experiment_log_dir="], ("launcher.experiment_log_dir",)),
    (["launcher.experiment_log_dir=/dev/null"], ("launcher.experiment_log_dir",)),
    # Syntax, sweeps and flags.
    (["pretrained_checkpoint_path=runs/lr=3/x"], ("pretrained_checkpoint_path=runs/lr=3/x",)),
    (["batch_size=8,16"], ("batch_size=8,16", "-m")),
    (["batch_size=choice(8,16)"], ("batch_size", "-m")),
    (["-m", "epochs=range(1,100000000)"], ("epochs=range(1,100000000)", "10000")),
    (["-m", "epochs=range(0)"], ("epochs=range(0)",)),
    (["batch_size", "8"], ("batch_size",)),
    (["=4"], ("=4",)),
    (["trainer.freeze=[trunk"], ("trainer.freeze=[trunk",)),
    (["--batch_size", "8"], ("--batch_size", "mean batch_size=")),
    (["--seed=1"], ("--seed=1", "mean trainer.seed_value=1")),
    (["--cfg", "jbo"], ("--cfg", "jbo")),
    (["--config-dir", "/nowhere"], ("--config-dir", "/nowhere")),
    (["--config-dir", ""], ("--config-dir",)),
    (["--config-dir"], ("--config-dir",)),
    (["--config-path", "/nowhere"], ("--config-path",)),
    (["--experimental-rerun", __file__], ("--experimental-rerun",)),
]
RUN = "launcher.experiment_log_dir=run"
ALONE: list[tuple[list[str], tuple[str, ...]]] = [
    ([], ("Missing: epochs, ", "+experiments=", "+trainer=")),
    (["+experiments=omnimae/omnimain_train_video_ft"], ("+trainer=mae_ft_ucf101_config", RUN.partition("=")[0])),
    (["+trainer=mae_ft_k150_config"], ("+experiments=omnimae/omnimain_train_video_ft",)),
    (["+trainer=mae_k150_config"], ("+experiments=omnimae/omnimain_train_video ",)),
    (
        ["+experiments=omnimae/omnimain_train_video_ft", "+trainer=mae_k150_config", "pretrained_checkpoint_path=null", RUN],
        ("+trainer=mae_ft_k150_config, or +experiments=omnimae/omnimain_train_video.",),
    ),
    (["+experiments=omnimae/omnimain_train_vide", STAGE_1[1]], ("mean omnimain_train_video?",)),
    (["experiments=omnimae/omnimain_train_video"], ("+experiments=omnimae/omnimain_train_video",)),
    ([STAGE_1[0], "trainer=mae_k150_config"], ("+trainer=mae_k150_config",)),
    (["trainer/model=vitbase"], ("trainer/model=vitbase",)),
]  # fmt: skip
FILES: dict[str, tuple[str, ...]] = {  # of a site: what it holds, and parts of what is printed
    "epoch: 3\n": ("epoch ", "mean epochs?"),
    "submitit:\n  partitoin: gpu\n": ("submitit.partitoin", "mean submitit.partition?"),
    "trainer:\n  model: {_target_: omnivision.models.mae.Autoencoder}\n": ("trainer.model._target_",),
    "defaults: [/trainer/model: vitbas]\n": ("trainer/model/vitbas", "mean vitbase?"),
    "epochs: [3\n": ("lab.yaml",),
    "trainer: {trust_targets: [logging]}\n": ("trainer.trust_targets",),
    "epochs: ${\n": ("configuration file",),
    "- a\n- b\n": ("site/lab",),
    "submitit:\n\tpartition: x\n": ("lab.yaml", "line 3"),
    "trainer:\n  data: {sources: {k150: '${datasets.k15}'}}\n": ("trainer.data.sources.k150", "datasets.k15"),
    "trainer: null\n": ("trainer",),
    "batch_size: null\n": ("batch_size ", "null"),
    "batch_size: 010\n": ("batch_size ", "'010'"),
    "clip_duration: 1:30\n": ("clip_duration ", "'1:30'"),
    "trainer/model: vitbase\n": ("trainer/model ",),
    "defaults: [lab]\n": ("includes itself",),
}
# What Hydra would run or write for a file is neither: its part of a configuration is not used.
HYDRA = (
    "{callbacks: {x: {_target_: logging.FileHandler, filename: /tmp/never}}}",
    "{run: {dir: /tmp/never}}",
    "{output_subdir: x}",
    "{launcher: {_target_: logging.FileHandler}}",
    "{job_logging: {version: 1, handlers: {h: {class: logging.FileHandler, filename: /tmp/never}}, root: {handlers: [h]}}}",
)


class Invalid(unittest.TestCase):
    def run_command(self, *arguments: str) -> tuple[int, str, str]:
        out, err = io.StringIO(), io.StringIO()
        with mock.patch.dict(os.environ), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            with self.assertRaises(SystemExit) as ended:
                train.main(arguments)
        return ended.exception.code, out.getvalue(), err.getvalue()

    def refusal(self, *arguments: str) -> str:
        """What the command says, which must be one paragraph, exit code 1 and no traceback."""
        code, out, err = self.run_command(*arguments)
        shown = out.partition("\n\n")[0]
        if shown.startswith("This run would stop"):  # what the settings alone do not show
            self.assertEqual((code, err), (1, ""))
            return shown
        self.assertEqual((code, out), (1, ""), err)
        self.assertTrue(err.startswith("error: "), err)
        self.assertNotIn("Traceback", err)
        return err

    def assert_refused(self, arguments: list[str], parts: tuple[str, ...]) -> None:
        with self.subTest(arguments):
            said = self.refusal(*arguments)
            for part in parts:
                self.assertIn(part, said)

    def test_on_the_command_line(self):
        with tempfile.TemporaryDirectory() as folder:
            for arguments, parts in AFTER_STAGE_1:
                self.assert_refused([*STAGE_1, f"launcher.experiment_log_dir={folder}/run", *HERE, *arguments], parts)
            for arguments, parts in ALONE:
                self.assert_refused(arguments, parts)
            self.assertEqual(os.listdir(folder), [], "nothing is left")

    def site(self, folder: str, name: str, text: str) -> list[str]:
        (Path(folder) / "site" / name).parent.mkdir(parents=True, exist_ok=True)
        (Path(folder) / "site" / name).write_text(text)
        return ["--config-dir", folder, *STAGE_1, "+site=lab", f"launcher.experiment_log_dir={folder}/run", *HERE]

    def test_in_a_file_of_ones_own(self):
        for text, parts in FILES.items():
            with tempfile.TemporaryDirectory() as folder, self.subTest(text):
                self.assert_refused(self.site(folder, "lab.yaml", f"# @package _global_\n{text}"), parts)

    def test_files_without_their_first_line_or_of_another_kind(self):
        for name, text, part in (
            ("lab.yml", "# @package _global_\n", "site/lab"),
            ("lab.yaml/x", "", "site/lab"),
            ("lab.yaml", "\ufeff# @package _global_\nepochs: 3\n", "@package _global_"),
            ("lab.yaml", "# @package _globl_\nepochs: 3\n", "_globl_"),
            ("lab.yaml", "epochs: 3\n", "@package _global_"),
        ):
            with tempfile.TemporaryDirectory() as folder, self.subTest(name + text):
                self.assert_refused(self.site(folder, name, text), (part,))

    def test_nothing_of_hydra_is_run_or_written(self):
        for text in HYDRA:
            with tempfile.TemporaryDirectory() as folder, self.subTest(text):
                arguments = self.site(folder, "lab.yaml", f"# @package _global_\nhydra: {text}\nepoch: 3\n")
                self.assert_refused(arguments, ("mean epochs?",))
                self.assertEqual(os.listdir(folder), ["site"])
                self.assertFalse(Path("/tmp/never").exists())

    def test_of_two_arguments_the_last_is_named(self):
        said = self.refusal(*STAGE_1, "launcher.experiment_log_dir=/x", *HERE, "++epoch=3", "++epoch=4")
        self.assertIn("(argument ++epoch=4)", said)

    def test_an_interruption_that_a_library_made_an_error_of(self):
        try:
            try:
                raise KeyboardInterrupt
            except KeyboardInterrupt as stroke:
                raise RuntimeError("of a library") from stroke
        except RuntimeError as error:
            self.assertEqual(exit_code_and_reason(unwrap_keyboard_interrupt(error))[0], EXIT_INTERRUPTED)
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
        command = [sys.executable, "train_app_submitit.py", *STAGE_1, "epoch=3"]
        for wanted in ("0", "1"):
            environment = os.environ | {"OMNIVISION_TRACEBACK": wanted}
            made = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
            self.assertEqual((made.returncode, "Traceback" in made.stderr), (1, wanted == "1"), made.stderr)


if __name__ == "__main__":
    unittest.main()
