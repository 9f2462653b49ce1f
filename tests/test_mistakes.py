"""Mistakes that people make on the command line and in files of their own: each is one paragraph with the way out."""

import contextlib
import io
import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import train_app_submitit
from omnivision.launch.exit import exit_code_and_reason, unwrap_keyboard_interrupt
from omnivision.utils.errors import EXIT_FAULT, EXIT_INTERRUPTED
from tests.runs import ROOT

STAGE_1 = ("+experiments=omnimae/omnimain_train_video", "+trainer=mae_k150_config")
HERE = ("submitit.use_cluster=false", "launcher.num_nodes=1", "launcher.gpus_per_node=1", "trainer.mode=dry")

# What is typed after a good command, and what is said about it.
AFTER_STAGE_1: list[tuple[list[str], str]] = [
    # Names of settings, however they come in.
    (
        ["epoch=3"],
        r"^epoch \(argument epoch=3\) is not a setting; did you mean epochs, a whole number at least 1 .*\(200 here\)\?$",
    ),
    (["+epoch=3"], r"^epoch \(argument \+epoch=3\) is not .* mean epochs, a whole number"),
    (["++epoch=3"], r"^epoch \(argument \+\+epoch=3\) is not .* mean epochs, a whole number"),
    (["trainer.optim.gradient_clp=1"], r"mean trainer.optim.gradient_clip, a number greater than 0 or null\?"),
    (["++trainer.distributed.strateg=fsdp"], r"mean trainer.distributed.strategy, one of ddp, fsdp \(ddp here\)\?"),
    (["trainer.optim.lr=3e-4"], r"did you mean lr\b"),
    (["weight_decay=0.1"], r"weight decay is a schedule, trainer.optim.options.weight_decay"),
    (["trainer.seed=3"], r"mean trainer.seed_value, a whole number at least 0"),
    (
        ["datasets.k15.train.paths=/x"],
        r"mean datasets.k150.train.paths\? A new one is added with \+\+datasets.k15.train.paths=",
    ),
    (["++datasets.k150.train.path=/x"], r"mean datasets.k150.train.paths, a text or a list"),
    (["++trainer.callbacks=[]"], r"^trainer.callbacks .* is not a setting; trainer has accelerator, "),
    (["~trainer.modes"], r"^~trainer.modes removes what is not there. Did you mean ~trainer.mode\?"),
    # As other trainers call them, in other places, and names below which everything is free.
    (["num_nodes=2"], r"did you mean launcher.num_nodes, a whole number at least 1 \(1 here\)\?$"),
    (["pretrained=x"], r"did you mean pretrained_checkpoint_path, a text or a list or null\?$"),
    (["seed=1"], r"did you mean trainer.seed_value, a whole number"),
    (["--seed", "1"], r"did you mean trainer.seed_value=1\?$"),
    (["--lr", "1e-3"], r"^--lr is no option; .*did you mean lr=1e-3\?"),
    (["--resume", "runs/x"], r"a run resumes when the same command is given again"),
    (["warmup_epochs=5"], r"warm-up is the first part of the schedule trainer.optim.options.lr"),
    (["optim.gradient_clip=1"], r"mean trainer.optim.gradient_clip, a number greater than 0 or null\?"),
    (
        ["model.depth=3"],
        r"mean trainer.model.(trunk|decoder).depth \(\d+ here\)\?|mean trainer.model.(trunk|decoder).depth\?",
    ),
    (["data.num_workers=2"], r"mean trainer.data.num_workers, a whole number"),
    (["launcher.partition=x"], r"mean submitit.partition, a text or null\?"),
    (
        ["trainer.data.repeats.k150=2"],
        r"not set by .* A new one is added with \+\+trainer.data.repeats.k150=",
    ),
    (["trainer.optim.optimizer.lr=1"], r"did you mean lr\b"),
    (
        ["++trainer.optim.options.lrr=[]"],
        r"lrr is a schedule for what torch.optim.AdamW does not take; did you mean lr\?",
    ),
    (
        ["++trainer.data.view._partial_=true"],
        r"_partial_ \(.*\) is not an argument of omnivision.data.views.PretrainView",
    ),
    (["trainer.model=vitbase"], r"A file of choices is named with a slash: trainer/model=NAME\."),
    (["trainer.mode=DRY"], r"did you mean dry\?"),
    # Choices among files.
    (
        ["trainer/model=vitbas"],
        r"no configuration trainer/model/vitbas \(argument trainer/model=vitbas\). Did you mean vitbase\?",
    ),
    (["trainer/model=vitbase.yml"], r"Did you mean vitbase\?"),
    (["trainer/modl=vitbase"], r"^trainer/modl .*did you mean trainer/model\?"),
    (["++trainer/model=vitbase"], r"^\+\+ is for settings, and trainer/model=vitbase is a choice among files"),
    (["trainer/model="], r"^trainer/model= is a choice among files; expected the name of one"),
    (["trainer/model={a:1}"], r"^trainer/model=\{a:1\} is a choice among files"),
    (
        ["trainer/nosuch=a"],
        r"trainer/nosuch \(argument trainer/nosuch=a\) is not a group of choices; the groups are exp",
    ),
    (
        ["+trainer/nosuch=a"],
        r"trainer/nosuch \(argument \+trainer/nosuch=a\) is not a group of choices; the groups are",
    ),
    (["trainer=abc"], r"no configuration trainer/abc \(argument trainer=abc\). trainer has"),  # nothing is near
    (["trainer=ucf101"], r"Did you mean mae_ft_ucf101_config\?"),
    (["+trainer=mae_in1k_k150_config"], r"Keep one of \+trainer=mae_k150_config, \+trainer=mae_in1k_k150_config\."),
    (["hydra/launcher=nope"], r"no hydra/launcher/nope. How runs are launched is said by launcher.\* and submitit.\*"),
    (["trainer/model=VITBASE"], r"Did you mean vitbase\?"),
    (["trainer/checkpoint=no_heads"], r"that this stage does not make. Write \+trainer/checkpoint=no_heads"),
    (["trainer/model=vitbase_ft"], r"Choose trainer/model=vitbase\.$"),
    # Objects that are built.
    (
        ["trainer.model._target_=omnivision.models.mae.MaskedAutoencodr"],
        r"which does not exist; did you mean omnivision.models.mae.MaskedAutoencoder\?$",
    ),
    (["trainer.optim.optimizer._target_=torch.optim.AdamWW"], r"does not exist; did you mean torch.optim.AdamW\?$"),
    (["trainer.optim.optimizer._target_=os.system"], r"expected a class of omnivision.data, .*trust_targets"),
    (
        ["+trainer.model.foo=1"],
        r"^trainer.model.foo \(argument .*\) is not an argument of .*MaskedAutoencoder\(trunk: VisionTransformer, dec",
    ),
    (
        ["trainer.data.view.scale=[0.2,1]"],
        r"scale .*is an argument of omnivision.data.views.PretrainView. Add it with \+\+trainer.data.view.scale=VALUE",
    ),
    (
        ["++trainer.data.view.sclae=[0.2,1]"],
        r"not an argument of omnivision.data.views.PretrainView\(size: int, .*did you mean scale\?",
    ),
    (["++trainer.optim.optimizer.lrr=1"], r"trainer.optim.optimizer.lrr .*AdamW\(.*betas.*; did you mean lr\?"),
    (["trainer.optim.optimizer.fused=maybe"], r"trainer.optim.optimizer.fused is 'maybe'.*expected true or false"),
    # Values.
    (["batch_size=abc"], "^batch_size is 'abc' .*expected a whole number"),
    (["epochs=" + "9" * 400], "^epochs is 9+\\.\\.\\. .*expected a number at least 1"),
    (["mask_ratio=1" + "0" * 400], "expected a number that a computer holds"),
    (["mask_ratio=0"], "expected a number greater than 0 and below 1"),
    (["mask_ratio=90%"], r"^mask_ratio is '90%' \(str\); expected a number\.$"),
    (["mask_ratio=0,9"], r"A fraction has a point: mask_ratio=0.9\.$"),
    (["clip_duration=inf"], "expected a finite number greater than 0"),
    (["trainer.ema_decay=1"], "greater than 0 and below 1"),
    (["trainer.model.trunk.depth=1000000"], "depth is 1000000; expected a whole number from 1 to 1000"),
    (["batch_size='8'"], "in quotes it is a text; leave them out"),
    (["batch_size="], "^batch_size is '' .*expected a whole number"),
    (["epochs=0"], "^epochs is 0 .*expected a number at least 1"),
    (["trainer.mode=tran"], "one of train, train_only, val, dry; did you mean train"),
    (["trainer.accelerator=gpu"], "did you mean cuda"),
    (["trainer.compile=yes"], "expected true or false"),
    (["num_frames=15"], "Try num_frames=14"),
    (["lr_scale_factor=0"], "a shell divides whole numbers"),
    (["epochs=2e2"], r"^epochs is 200.0 \(float\); expected a whole number \(write 200\)\.$"),
    (["trainer.model=[]"], r"^trainer.model=\[\] does not fit; expected an object"),
    (["trainer.logging.also={a:1}"], r"does not fit; expected a list\.$"),
    (
        ["++trainer.model._target_=5"],
        r"^trainer.model._target_ is 5 \(int\); expected a text, the full name of a class\.$",
    ),
    (["epochs=${mask_ration}"], r"Interpolation key 'mask_ration' not found. Did you mean \$\{mask_ratio\}\?$"),
    (["epochs=${foo}"], r"^epochs cannot be resolved: Interpolation key 'foo' not found.$"),
    (["launcher.experiment_log_dir="], "Was it a shell variable that is not set"),
    # What the shell and Hydra make of signs.
    (["pretrained_checkpoint_path=runs/lr=3/x"], r"""Write 'pretrained_checkpoint_path="runs/lr=3/x"'."""),
    (["batch_size=8,16"], r"holds a comma.*append -m; for a list write 'batch_size=\[8,16\]'"),
    (["-m", "epochs=range(1,100000000)"], "means 99999999 runs; expected at most 10000"),
    (
        ["-m", "batch_size=8,16", "launcher.experiment_log_dir=/tmp/never${batchsize}"],
        r"not found. Did you mean \$\{batch_size\}",
    ),
    (["-m", "epochs=range(0)"], "The sweep has no runs"),
    (["batch_size=choice(8,16)"], r"^batch_size=choice\(8,16\) means several values.*append -m"),
    (["batch_size", "=", "8"], "without spaces around the equals sign"),
    (["batch_size", "8"], "'batch_size' is no setting of a value; expected KEY=VALUE"),
    (["batch_size: 8"], "is written as in a file; expected KEY=VALUE: batch_size=8"),
    (["--batch_size", "8"], "did you mean batch_size=8"),
    (["--batch-size=8"], "did you mean batch_size=8"),
    ([""], "^An argument is empty"),
    (["=4"], "^'=4' has no name of a setting before ="),
    (["épochs=3"], "no name of a setting before =; expected letters"),
    (["trainer..mode=dry"], "no name of a setting before ="),
    (["+hydra.callbacks.x._target_=os.getcwd"], "hydra.callbacks would run what a configuration names"),
    (["--config-dir"], "^--config-dir has no value"),
    (["trainer.freeze=[trunk"], "opens 1 bracket and closes 0"),
    (['trainer.mode="dry'], "opens a quotation mark that it does not close"),
    (["--cfg", "jbo"], "invalid choice: 'jbo'"),
    (["--config-dir", "/nowhere"], "there is no such folder"),
    (["--config-path", "/nowhere"], r"For your own, beside them, give --config-dir"),
    (["--cfg", "job", "--package", "nope"], "package 'nope' not found"),
    (["--experimental-rerun", __file__], "would run what a pickled file says"),
    (
        ["hydra.run.dir=/dev/null/x"],
        r"^/dev/null/x \(argument hydra.run.dir=/dev/null/x\) cannot be used: Not a directory",
    ),
    (["launcher.experiment_log_dir=/dev/null"], r"Change launcher.experiment_log_dir"),
]
RUN = "launcher.experiment_log_dir=run"
ALONE: list[tuple[list[str], str]] = [
    (
        ["+experiments=omnimae/omnimain_train_video_ft"],
        r"\+trainer=mae_ft_ucf101_config .*launcher.experiment_log_dir",
    ),
    (["+trainer=mae_ft_k150_config"], r"\+experiments=omnimae/omnimain_train_video_ft chooses a stage"),
    (["+trainer=mae_k150_config"], r"\+experiments=omnimae/omnimain_train_video chooses a stage"),
    (["trainer/model=vitbase_average_ft"], r"\+experiments=omnimae/omnimain_train_video_ensemble_ft, which"),
    (["trainer/optim=probe"], r"\+experiments=omnimae/omnimain_train_video_lp, which"),
    (
        ["+experiments=omnimae/omnimain_train_video_ft", "+trainer=mae_k150_config", "pretrained_checkpoint_path=null", RUN],
        r"Choose \+trainer=mae_ft_k150_config, or \+experiments=omnimae/omnimain_train_video\.$",
    ),
    ([], r"^Missing: epochs, .*\+experiments=.* chooses a stage.*\+trainer=.* chooses data"),
    (["+experiments=omnimae/omnimain_train_video"], r"\+trainer=mae_k150_config chooses data and task"),
    (["+experiments=omnimae/omnimain_train_vide", "+trainer=mae_k150_config"], r"Did you mean omnimain_train_video\?"),
    (["experiments=omnimae/omnimain_train_video"], r"Write \+experiments=omnimae/omnimain_train_video to make it"),
    ([STAGE_1[0], "trainer=mae_k150_config"], r"Write \+trainer=mae_k150_config to make it"),
    ([STAGE_1[0], "+trainer=mae_k15_config"], r"\(argument \+trainer=mae_k15_config\). Did you mean mae_k150_config\?"),
    (["trainer/model=vitbase"], "Choose a stage first"),
]  # fmt: skip
FILES = {  # of a site: what it holds, and what is said about it
    "epoch: 3\n": r"^epoch \(.*/site/lab.yaml, line 2\) is not a setting; did you mean epochs",
    "submitit:\n  partitoin: gpu\n": r"submitit.partitoin \(.*lab.yaml, line 3\) .* mean submitit.partition, a text or null\?",
    "trainer:\n  model: {_target_: omnivision.models.mae.Autoencoder}\n": r"_target_ \(.*lab.yaml, line 3\) is .*did you mean",
    "defaults: [/trainer/model: vitbas]\n": r"trainer/model/vitbas \(.*lab.yaml\). Did you mean vitbase\?",
    "epochs: [3\n": r"lab.yaml",
    "hydra: {callbacks: {x: {_target_: logging.FileHandler, filename: /tmp/never}}}\n": "hydra.callbacks would run",
    "hydra: {run: {dir: /tmp/never}}\n": r"^hydra.run.dir is '/tmp/never' in a file; expected '.'.*Take it out",
    "hydra: {output_subdir: x}\n": "hydra.output_subdir is 'x' in a file",
    "hydra: {job: {env_set: {PATH: x}}}\n": "hydra.job.env_set is",
    "hydra: {launcher: {_target_: logging.FileHandler}}\n": "hydra.launcher is",
    "hydra:\n  job_logging: {version: 1, handlers: {h: {class: logging.FileHandler, filename: /tmp/never}}, "
    "root: {handlers: [h]}}\nepoch: 3\n": "mean epochs",
    "trainer: {trust_targets: [logging]}\n": r"^trainer.trust_targets is \['logging'\] in a file; expected it on the command",
    "trainer: &a\n  x: *a\n": r"lab.yaml holds an anchor .*that refers to itself",
    "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
    + "".join(
        f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcde", "bcdef", strict=True)
    ): "more than 100000",
    "defaults: [lab]\n": "A configuration file includes itself",
    "epochs: ${\n": r"^A configuration cannot be read \(",
    "- a\n- b\n": r"^site/lab.yaml is a list where names with values are expected",
    "epochs 3\n": r"^epochs 3 \(.*lab.yaml, line 2\) is not a setting; did you mean epochs",
    "submitit:\n\tpartition: x\n": r"lab.yaml, line 3, column 1: found .* YAML indents with spaces",
    "defaults: [{override /trainer/modl: vitbase}]\n": r"^trainer/modl is not a group of choices \(override .* did you mean",
    "trainer:\n  data: {sources: {k150: '${datasets.k15}'}}\n": r"line 3\) cannot be .*Did you mean \$\{datasets.k150\}\?",
    "trainer: null\n": r"^trainer is empty, or no group of settings, in a file of this run: trainer.mode .* has no place",
    "batch_size: null\n": r"^batch_size \(.*lab.yaml, line 2\) is null; expected a whole number",
    "trainer.mode: dry\n": r"^'trainer.mode' has a dot, and levels of a file are indented. Write trainer: \{mode: ...\}",
    "trainer/model: vitbase\n": r"it belongs into defaults: \[/trainer/model: NAME\]",
    "batch_size: 010\n": r"^batch_size \(.*lab.yaml, line 2\) is '010'.*plain decimal",
}


class Mistakes(unittest.TestCase):
    def told(self, *arguments: str) -> str:
        """What the script says about a command, which must be one paragraph, exit code 1 and no traceback."""
        out, err = io.StringIO(), io.StringIO()
        with (
            mock.patch.object(sys, "argv", ["train_app_submitit.py", *arguments]),
            mock.patch.dict(os.environ),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            self.assertRaises(SystemExit) as ended,
        ):
            train_app_submitit.main()
        text, shown = err.getvalue(), out.getvalue().partition("\n\n")[0]
        if shown.startswith("This run would stop"):  # what the settings alone do not show
            self.assertEqual((ended.exception.code, text), (1, ""))
            return shown
        self.assertEqual((ended.exception.code, out.getvalue()), (1, ""), text)
        self.assertTrue(text.startswith("error: ") and text.count("\n") == 1, text)
        return text.removeprefix("error: ").strip()

    def test_on_the_command_line(self):
        self.assertGreaterEqual(len(AFTER_STAGE_1) + len(ALONE) + len(FILES), 30)
        with tempfile.TemporaryDirectory() as folder:
            run = f"launcher.experiment_log_dir={folder}/run"
            for arguments, saying in AFTER_STAGE_1:
                with self.subTest(arguments):
                    self.assertRegex(self.told(*STAGE_1, run, *HERE, *arguments), saying)
            for arguments, saying in ALONE:
                with self.subTest(arguments):
                    self.assertRegex(self.told(*arguments), saying)
            self.assertEqual(os.listdir(folder), [], "nothing is left")

    def test_in_a_file_of_ones_own(self):
        for text, saying in FILES.items():
            with tempfile.TemporaryDirectory() as folder, self.subTest(text):
                (Path(folder) / "site").mkdir()
                (Path(folder) / "site/lab.yaml").write_text(f"# @package _global_\n{text}")
                run = f"launcher.experiment_log_dir={folder}/run"
                self.assertRegex(self.told("--config-dir", folder, *STAGE_1, "+site=lab", run, *HERE), saying)
                self.assertFalse(Path("/tmp/never").exists())

    def test_files_that_are_not_read_as_they_were_meant(self):
        for name, text, saying in (
            (
                "lab.yml",
                "# @package _global_\n",
                r"lab.yml ends in .yml, and only files that end in .yaml are read. Rename",
            ),
            ("lab.yaml/x", "", r"lab.yaml is a folder; expected a file"),
            (
                "lab.yaml",
                "\ufeff# @package _global_\nepochs: 3\n",
                r"does not begin with the line .* no byte order mark",
            ),
            (
                "lab.yaml",
                "# @package _globl_\nepochs: 3\n",
                r"^_globl_ \(.*lab.yaml, line 1\) is not a place for settings",
            ),
            ("lab.yaml", "epochs: 3\n", r"does not begin with the line '# @package _global_'"),
            ("lab.yaml", "", r"does not begin with the line '# @package _global_'"),
        ):
            with tempfile.TemporaryDirectory() as folder, self.subTest(name + text):
                (Path(folder) / "site" / name).parent.mkdir(parents=True)
                (Path(folder) / "site" / name).write_text(text)
                run = f"launcher.experiment_log_dir={folder}/run"
                self.assertRegex(self.told("--config-dir", folder, *STAGE_1, "+site=lab", run, *HERE), saying)

    def test_of_two_arguments_the_last_is_named(self):
        said = self.told(*STAGE_1, "launcher.experiment_log_dir=/x", *HERE, "++epoch=3", "++epoch=4")
        self.assertIn("epoch (argument ++epoch=4) is not a setting", said)

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
        for given, wanted in (
            (["a=1", "--info"], ["--info=all", "a=1"]),
            (["--info", "config", "a=1"], ["--info=config", "a=1"]),
            (["a=1", "-m", "--config-dir", "x"], ["-m", "--config-dir", "x", "a=1"]),
        ):
            self.assertEqual(train_app_submitit.flags_first(given), wanted)

    def test_a_traceback_for_those_who_want_one(self):
        command = [sys.executable, "train_app_submitit.py", *STAGE_1, "epoch=3"]
        for wanted in ("0", "1"):
            environment = os.environ | {"OMNIVISION_TRACEBACK": wanted}
            made = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
            self.assertEqual((made.returncode, "Traceback" in made.stderr), (1, wanted == "1"), made.stderr)


if __name__ == "__main__":
    unittest.main()
