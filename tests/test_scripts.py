"""The scripts of the stages, `utils/run_scripts/run_*.sh`: what command they make of their variables, and that it runs."""

import os
import re
import shutil
import subprocess
import sys
import unittest
from pathlib import Path
from typing import Any

from omnivision.config.schema import Settings
from omnivision.config.validate import validate_config
from omnivision.training.preflight import recipe_warnings
from tests import runs
from tests import stage_runs as stages
from tests.fixtures import Folder

SCRIPTS = runs.ROOT / "utils" / "run_scripts"
VARIABLES = (
    "EXP_DIR PRETRAINED_CHECKPOINT DATASET MODEL BATCH_SIZE NUM_NODES GPUS_PER_NODE NOMINAL_BATCH EPOCHS NUM_WORKERS"
).split()
# Script -> nodes, clips on each, lr_scale_factor, epochs, data, model: as README and the paper say.
PUBLISHED = {
    "run_mae.sh": (8, 16, 2, 200, "k150", "MaskedAutoencoder"),
    "run_align.sh": (8, 16, 2, 50, "inpk150", "VideoClassifier"),
    "run_downstream_ft.sh": (4, 8, 2, 30, "ucf101", "VideoClassifier"),
    "run_downstream_lp.sh": (4, 8, 1, 30, "ucf101", "VideoClassifier"),
    "run_downstream_average_lp.sh": (4, 8, 1, 30, "ucf101", "AveragedClassifier"),
}
PRETRAINING = "k150 inpk150 sim150 inpk150_sim150".split()
LABELLED = "ucf101 hmdb51 diving48 minissv2 ikea uav".split() + PRETRAINING
SHELLS = [shell for shell in ("sh", "dash", "bash") if shutil.which(shell)]
TINY = "image_size=32 short_side=40 num_frames=4 clip_duration=0.7 trainer.accelerator=cpu".split()


def environment(first_on_path: Path, variables: dict[str, str]) -> dict[str, str]:
    """This process's environment with none of the scripts' variables but these, and a folder first on PATH."""
    rest = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    return rest | {"PATH": f"{first_on_path}{os.pathsep}{rest['PATH']}"} | stages.ONE_THREAD | variables


class OnPath(Folder):
    """`self.call` runs a script in an empty folder of its own."""

    def setUp(self):
        super().setUp()
        self.python_folder = Path(sys.executable).parent

    def call(
        self, script: str, *overrides: str, shell: str = "sh", at: Path = SCRIPTS, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [shell, str(at / script), *overrides],
            cwd=self.folder,
            env=environment(self.python_folder, variables),
            capture_output=True,
            text=True,
            timeout=300,
        )


class Noted(OnPath):
    """With a `python` on PATH that only writes its arguments down."""

    def setUp(self):
        super().setUp()
        self.python_folder = self.folder / "bin"
        self.python_folder.mkdir()
        self.noted = self.folder / "arguments"
        python = self.python_folder / "python"
        python.write_text(f'#!/bin/sh\nfor argument; do printf "%s\\n" "$argument"; done >"{self.noted}"\nexit 7\n')
        python.chmod(0o755)

    def arguments(self, script: str, *overrides: str, **more: str) -> list[str]:
        """Return the arguments with which a script calls python, given all its variables."""
        self.noted.unlink(missing_ok=True)
        result = self.call(script, *overrides, **{"EXP_DIR": "runs/x", "PRETRAINED_CHECKPOINT": "null"} | more)
        self.assertEqual(result.returncode, 7, f"that of python; {result.stderr}")
        self.assertEqual(result.stderr, "")
        return self.noted.read_text().splitlines()

    def settings(self, script: str, *overrides: str, **more: str) -> Settings:
        return validate_config(stages.compose_config(*self.arguments(script, *overrides, **more)[1:]))


class Commands(Noted):
    def test_every_shell_reads_every_script_and_gives_the_same_command(self):
        scripts = sorted(SCRIPTS.glob("*.sh"))
        self.assertLessEqual({"common.sh", *PUBLISHED}, {script.name for script in scripts})
        for shell in SHELLS:
            for script in scripts:
                result = subprocess.run([shell, "-n", str(script)], capture_output=True, text=True)
                self.assertEqual((result.returncode, result.stderr), (0, ""), f"{shell} -n {script.name}")
        variables = {"NOMINAL_BATCH": "256", "BATCH_SIZE": "96", "NUM_NODES": "1"}
        for script in PUBLISHED:
            found = [self.arguments(script, "a=b c", shell=shell, **variables) for shell in SHELLS]
            self.assertTrue(all(one == found[0] for one in found))
            self.assertEqual(found[0][-1], "a=b c")

    def test_the_defaults_are_the_published_settings(self):
        for script, (nodes, clips, factor, epochs, dataset, model) in PUBLISHED.items():
            with self.subTest(script):
                found = self.settings(script)
                launch = found.launcher.num_nodes, found.launcher.gpus_per_node, found.batch_size
                self.assertEqual(launch, (nodes, 1, clips))
                self.assertEqual((found.trainer.optim.lr_scale_factor, found.trainer.max_epochs), (factor, epochs))
                self.assertEqual(list(found.trainer.data.sources), [dataset])
                self.assertEqual(found.trainer.model["_target_"].rpartition(".")[2], model)
                self.assertEqual(found.trainer.model["trunk"]["width"], 768)
                self.assertEqual((found.submitit.use_cluster, found.num_workers), (True, 6))
                self.assertEqual(bool(found.trainer.freeze), script == "run_downstream_lp.sh")
                # The recipe knows the same nominal batch as the script.
                arguments = self.arguments(script, "submitit.use_cluster=false")[1:]
                bare = [one for one in arguments if not one.startswith("trainer.optim.nominal_batch=")]
                self.assertEqual(len(bare), len(arguments) - 1)
                settings = validate_config(stages.compose_config(*bare))
                self.assertEqual(settings.trainer.optim.nominal_batch, found.trainer.optim.nominal_batch)
                self.assertEqual(list(recipe_warnings(settings, 0)), [])

    def test_variables_and_then_overrides_win(self):
        for script in PUBLISHED:
            with self.subTest(script):
                mae, average = script == "run_mae.sh", "average" in script
                source, value = ("[one,two]", ["one", "two"]) if average else ("null", None) if mae else ("run", "run")
                model = "vittiny" + ("" if mae else "_average_ft" if average else "_ft")
                values = ("a folder/run", source, "sim150", model, "24", "3", "2", "100", "9", "0")
                found = self.settings(
                    script, "epochs=5", "trainer.seed_value=9", **dict(zip(VARIABLES, values, strict=True))
                )
                self.assertEqual(found.launcher.experiment_log_dir, "a folder/run")
                self.assertEqual(found.pretrained_checkpoint_path, value)
                self.assertEqual(list(found.trainer.data.sources), ["sim150"])
                self.assertEqual(found.trainer.model["trunk"]["width"], 192)
                self.assertEqual((found.batch_size, found.num_workers, found.epochs), (24, 0, 5))
                self.assertEqual((found.launcher.num_nodes, found.launcher.gpus_per_node), (3, 2))
                self.assertEqual((found.lr_scale_factor, found.trainer.seed_value), (100 / 72, 9))

    def factors(self, script: str, *overrides: str, **variables: str) -> list[float]:
        """The factors of the learning rate in a command, the last of which counts."""
        given = (one.partition("=") for one in self.arguments(script, *overrides, **variables))
        return [float(value) for name, _, value in given if name == "lr_scale_factor"]

    def test_the_factor_of_the_learning_rate_is_exact(self):
        for nominal, clips, nodes in [(256, 96, 1), (64, 8, 3), (32, 48, 7), (1, 3, 1), (100003, 17, 3), (256, 16, 8)]:
            variables = {"NOMINAL_BATCH": str(nominal), "BATCH_SIZE": str(clips), "NUM_NODES": str(nodes)}
            for script in PUBLISHED:
                self.assertEqual(self.factors(script, **variables), [nominal / (clips * nodes)])
        for overrides, factor in (
            (["launcher.num_nodes=1"], 64 / 8),
            (["++launcher.num_nodes=2", "++batch_size=4"], 64 / 8),
            (["+batch_size=64"], 64 / 256),
            (["launcher.num_nodes=1", "lr_scale_factor=5"], 5),
        ):
            self.assertEqual(self.factors("run_downstream_ft.sh", *overrides)[-1], factor, overrides)
        for peak in ("lr=1e-3", "++lr=1e-3", "+lr=1e-3"):
            self.assertEqual(self.factors("run_downstream_ft.sh", peak), [])
        self.assertEqual(self.settings("run_mae.sh", "lr=1e-3").lr, 1e-3)

    def test_every_dataset_that_they_name_has_a_recipe(self):
        for script in PUBLISHED:
            beginning, names = ("mae", PRETRAINING) if script == "run_mae.sh" else ("mae_ft", LABELLED)
            comment = next(line for line in (SCRIPTS / script).read_text().splitlines() if line.startswith("DATASET="))
            self.assertEqual(set(comment.partition("# ")[2].replace(" or ", ", ").split(", ")), set(names))
            for name in names:
                self.assertTrue((runs.ROOT / "config" / "trainer" / f"{beginning}_{name}_config.yaml").is_file(), name)

    def test_a_checkout_in_a_folder_with_a_space(self):
        elsewhere = self.folder / "my checkout" / "utils" / "run_scripts"
        shutil.copytree(SCRIPTS, elsewhere)
        for script in PUBLISHED:
            found = self.arguments(script, at=elsewhere)[0]
            self.assertEqual(Path(found).resolve(), (self.folder / "my checkout" / "train_app_submitit.py").resolve())

    def test_what_must_be_set_and_what_must_be_a_number(self):
        def refuse(script: str, saying: str, **variables: str) -> None:
            for shell in SHELLS:
                with self.subTest(f"{shell} {script} {saying}"):
                    result = self.call(script, shell=shell, **variables)
                    self.assertEqual((result.returncode, result.stdout), (1, ""), result.stderr)
                    self.assertRegex(result.stderr, f"^error: {saying}.*\n$")
                    self.assertFalse(self.noted.exists(), "python was called")

        given = {"EXP_DIR": "x", "PRETRAINED_CHECKPOINT": "null"}
        for script in PUBLISHED:
            refuse(script, "EXP_DIR ", PRETRAINED_CHECKPOINT="null", EXP_DIR="")
            if script != "run_mae.sh":
                refuse(script, "PRETRAINED_CHECKPOINT ", EXP_DIR="x")
            for name in ("BATCH_SIZE", "NUM_NODES", "GPUS_PER_NODE", "NOMINAL_BATCH", "EPOCHS", "NUM_WORKERS"):
                refuse(script, f"{name} .*'4,8'", **{name: "4,8"}, **given)
        for value in ("many", "0", "-8", "1.5", "8 8", "0x10", "08", '1); system("touch made"); (1'):
            refuse("run_downstream_ft.sh", "BATCH_SIZE ", BATCH_SIZE=value, **given)
        self.assertFalse((self.folder / "made").exists())


class Recipe(OnPath):
    """run_ppma.sh, with a `python` on PATH that says what a cluster's would: each call submits another job."""

    def setUp(self):
        super().setUp()
        self.python_folder = self.folder / "bin"
        self.python_folder.mkdir()
        python = self.python_folder / "python"
        python.write_text(
            f"""#!/bin/sh
            [ "$1" != -m ] || {{ echo "$@" >>"{self.folder}/calls"; exit; }}
            for word; do case $word in launcher.experiment_log_dir=*) run=${{word#*=}} ;; esac; done
            case $run in *"$FAILS") echo "error: it is refused" >&2; exit 1 ;; esac
            for word; do printf '%s\\n' "$word"; done >"{self.folder}/$(basename "$run")"
            number=$(ls "{self.folder}" | wc -l)
            echo "submitted job_id=$number folder=$run"
            """
        )
        python.chmod(0o755)

    def recipe(self, *arguments: str, shell: str = "sh", **variables: str) -> subprocess.CompletedProcess[str]:
        return self.call("run_ppma.sh", *arguments, shell=shell, **{"PPMA": "a folder", "FAILS": "nothing"} | variables)

    def submitted(self, stage: str) -> list[str]:
        return (self.folder / stage).read_text().splitlines()

    def test_stages_wait_for_those_that_they_start_from(self):
        for shell in SHELLS:
            result = self.recipe("a=b c", shell=shell)
            self.assertEqual((result.returncode, result.stderr), (0, ""))
            jobs = dict(line.split(None, 1) for line in result.stdout.splitlines())
            ids = {stage: said.split("job_id=")[1].split()[0] for stage, said in jobs.items()}
            self.assertEqual(len(ids), 4 + 3 * 6)
            waits = {
                "mae": None, "align": ["mae"], "align_inpk150": ["mae"], "align_sim150": ["mae"], "ft_uav": ["align"],
                "lp_ikea": ["align"], "average_hmdb51": ["align_inpk150", "align_sim150"],
            }  # fmt: skip
            for stage, others in waits.items():
                dependency = others and f"submitit.dependency=afterok:{':'.join(ids[other] for other in others)}"
                given = [word for word in self.submitted(stage) if word.startswith("submitit.dependency")]
                self.assertEqual(given, [dependency] if dependency else [], stage)
                self.assertIn("a=b c", self.submitted(stage))
                self.assertIn(f"submitit.name={stage}", self.submitted(stage))
            average = self.submitted("average_diving48")
            self.assertIn("pretrained_checkpoint_path=[a folder/align_inpk150,a folder/align_sim150]", average)
            self.assertIn("trainer/model=vitbase_average_ft", average)
            self.assertIn("ensemble_num_models=2", average)
            for stage in ids:
                (self.folder / stage).unlink()

    def test_an_alignment_that_serves_both_is_done_once_and_no_set_is_none(self):
        result = self.recipe(ALIGN="sim150", AVERAGE="sim150 inpk150", DOWNSTREAM="")
        self.assertEqual([line.split()[0] for line in result.stdout.splitlines()], ["mae", "align", "align_inpk150"])

    def test_what_starts_from_a_stage_that_was_refused_is_left_out(self):
        result = self.recipe(FAILS="/align", DOWNSTREAM="ucf101")
        self.assertEqual(result.returncode, 1)
        self.assertIn("error: not submitted: align;", result.stderr)
        calls = (self.folder / "calls").read_text()
        self.assertIn("unsubmitted a folder/align not submitted: it is refused", calls)
        for stage in ("ft_ucf101", "lp_ucf101"):
            self.assertIn(f"unsubmitted a folder/{stage} it starts from a folder/align (not submitted)", calls)
            self.assertFalse((self.folder / stage).exists())
        self.assertTrue((self.folder / "average_ucf101").exists(), "it starts from others")

    def test_help_is_the_head_of_the_script(self):
        for asked in ("--help", "-h"):
            result = self.recipe(asked)
            self.assertEqual((result.returncode, result.stderr), (0, ""))
            self.assertRegex(result.stdout, "^The whole recipe from one command")
            self.assertRegex(result.stdout, r"--dry shows the stages.*\n$")

    def test_dry_submits_nothing_and_a_sweep_is_refused(self):
        for shell in SHELLS:
            shown = self.recipe("--dry", "epochs=3", shell=shell, DOWNSTREAM="ucf101")
            self.assertEqual((shown.returncode, len(shown.stdout.splitlines())), (0, 7), shown.stderr)
            refused = self.recipe("-m", "trainer.seed_value=1,2", shell=shell)
            self.assertEqual((refused.returncode, refused.stdout), (1, ""))
            self.assertRegex(refused.stderr, "^error: -m ")
            unknown = self.recipe("--dyr", shell=shell)
            self.assertEqual((unknown.returncode, unknown.stdout), (1, ""))
            self.assertRegex(unknown.stderr, "^error: .*--dyr")
            site = self.recipe("--dry", "--config-dir", "site", "+site=lab", shell=shell, DOWNSTREAM="ucf101")
            self.assertEqual(site.returncode, 0, site.stderr)
        self.assertFalse((self.folder / "mae").exists())


class Runs(Noted):
    """The command of the first stage, run by its script; those of the others, run in this process."""

    def run_script(self, script: str, *overrides: str, **variables: str) -> stages.Result:
        return stages.run_in_process(self.arguments(script, *overrides, **variables)[1:])

    def test_dry(self):
        run, results = self.folder / "run", {}
        for script in PUBLISHED:
            model = "vittiny" + ("" if script == "run_mae.sh" else "_average_ft" if "average" in script else "_ft")
            variables = {"EXP_DIR": str(run), "PRETRAINED_CHECKPOINT": "null", "MODEL": model, "BATCH_SIZE": "12"}
            results[script] = self.run_script(script, "trainer.mode=dry", *TINY, **variables)
        for script, (nodes, *_, dataset, model) in PUBLISHED.items():
            with self.subTest(script):
                self.assertEqual((results[script].returncode, results[script].stderr), (1, ""))
                said = results[script].stdout
                self.assertRegex(
                    said, rf"^This run would stop .*\n- .*(.|\n)*datasets.{dataset.split()[0]}.train.paths"
                )
                self.assertIn(model, said)
                self.assertRegex(said, rf"batch +{12 * nodes} clips per step.* over {nodes} ranks")
                self.assertRegex(said, rf"sources +{dataset}\n")
        self.assertEqual([path.name for path in run.rglob("*") if path.is_file()], ["dry.png"])

    def test_all_stages_in_a_row(self):
        films = stages.write_videos(self.folder / "films", 9)
        data = []
        for dataset in ("k150", "inpk150", "ucf101"):
            for which, paths in (("train", films), ("val", films[:3])):
                data += stages.write_split(self.folder, dataset, which, paths)
        once = ["trainer.limit_train_batches=2", "trainer.data.val_clips=1", "trainer.data.val_view.crops=1"]
        rates = {}
        for script, sources, kind in [
            ("run_mae.sh", [], ""),
            ("run_align.sh", ["run_mae.sh"], "_ft"),
            ("run_downstream_ft.sh", ["run_align.sh"], "_ft"),
            ("run_downstream_lp.sh", ["run_downstream_ft.sh"], "_ft"),
            ("run_downstream_average_lp.sh", ["run_align.sh", "run_downstream_ft.sh"], "_average_ft"),
        ]:
            overrides = ["submitit.use_cluster=false", "trainer.logging.log_freq=1", *TINY, *data, *once]
            folders = ",".join(str(self.folder / source) for source in sources)
            variables = {
                "EXP_DIR": str(self.folder / script),
                "MODEL": f"vitmicro{kind}",
                "BATCH_SIZE": "4",
                "NUM_NODES": "1",
                "NUM_WORKERS": "0",
                "EPOCHS": "1",
                "NOMINAL_BATCH": "250",
            }
            if not sources:
                self.python_folder, noting = Path(sys.executable).parent, self.python_folder
                result: Any = self.call(script, *overrides[:-2], **variables)
                self.python_folder = noting
            else:
                start = f"[{folders}]" if len(sources) > 1 else folders
                result = self.run_script(script, *overrides, PRETRAINED_CHECKPOINT=start, **variables)
            self.assertEqual(result.returncode, 0, f"{script}: {result.stderr}")
            summary = runs.read_summary(self.folder / script)
            self.assertEqual((summary["status"], summary["epochs"], summary["steps"]), ("finished", 1, 2))
            self.assertEqual(summary["run"]["pretrained"], " + ".join(sources) or None)
            rates[script] = runs.read_metrics(self.folder / script)[-1]["lr"]
        # Of the second of two steps: half way for the average's cosine.
        self.assertAlmostEqual(rates["run_downstream_average_lp.sh"], (16e-3 + 4e-6) / 2 / (250 / 4), places=9)
        trunks = [runs.read_summary(self.folder / script)["run"]["trunk"] for script in PUBLISHED]
        self.assertEqual(trunks, ["trained", "trained", "trained", "frozen", "frozen average"])
        given, kept = (
            stages.encoder_weights(stages.load_checkpoint(self.folder / f"run_downstream_{name}.sh", file)["model"])
            for name, file in (("ft", "best.pt"), ("lp", "checkpoint.pt"))
        )
        self.assertEqual(set(given), set(kept))
        for name in given:
            self.assertEqual((given[name] - kept[name]).abs().max().item(), 0, name)


class Demo(OnPath):
    """run_demo.sh with programs that only write their arguments down."""

    def setUp(self):
        super().setUp()
        self.python_folder = self.folder / "bin"
        self.python_folder.mkdir()
        for name in ("python", "omnivision"):
            program = self.python_folder / name
            program.write_text(f'#!/bin/sh\necho {name} "$@" >>"{self.folder}/called"\n')
            program.chmod(0o755)

    def test_videos_and_runs_in_other_folders(self):
        folders = {"DEMO": str(self.folder / "new/runs"), "DATA": str(self.folder / "videos")}
        result = self.call("run_demo.sh", "trainer.seed_value=7", MINUTES="10", **folders)
        self.assertEqual((result.returncode, result.stderr), (0, ""))
        first, *calls = (self.folder / "called").read_text().splitlines()
        self.assertEqual(first, f"omnivision demo-data {folders['DATA']} --synthetic 1000")
        stages_run = [call for call in calls if "train_app_submitit.py" in call]
        self.assertEqual(len(stages_run), 8)
        for call in stages_run:
            self.assertIn(f" data_root={folders['DATA']} ", call)
            self.assertTrue(call.endswith(" trainer.seed_value=7"), call)
        self.assertEqual(
            re.findall(r"\n== Part (\d of \d), after 0 min ", result.stdout), [f"{n} of 5" for n in range(1, 6)]
        )
        self.assertIn("\nThe demo took 0 min ", result.stdout)

    def test_minutes_that_are_none(self):
        for minutes in ("2", "1000", "08", "six", "-5"):
            result = self.call("run_demo.sh", MINUTES=minutes)
            self.assertEqual((result.returncode, result.stderr), (2, "MINUTES must be a whole number from 3 to 999.\n"))
        self.assertFalse((self.folder / "called").exists())


if __name__ == "__main__":
    unittest.main()
