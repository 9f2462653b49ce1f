"""Settings: whatever is wrong is found at once, named, and told with its remedy, before anything heavy is imported."""

import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

from hydra.errors import HydraException
from omegaconf import OmegaConf

from omnivision.config.compose_errors import explain
from omnivision.config.suggestions import setting_names
from omnivision.config.targets import signature_of, target_problems
from omnivision.config.validate import check
from omnivision.utils.errors import UserError
from tests.runs import ROOT
from tests.test_config import CONFIG, FOLDER, composed, script, settings

MAE = ("+experiments=omnimae/omnimain_train_video", "+trainer=mae_k150_config")


class Values(unittest.TestCase):
    def assert_refused(self, *overrides: str, saying: str) -> str:
        with self.assertRaisesRegex(UserError, saying) as caught:
            settings(*MAE, *overrides)
        return str(caught.exception)

    def test_unknown_keys_however_they_came_in(self):
        cases = {
            "++ephocs=3": r"ephocs is not a setting; did you mean epochs, a whole number at least 1 .200 here.\?",
            "++trainer.optim.ampp.enabled=true": r"\.ampp is not a setting; did you mean trainer\.optim\.amp, a group of ",
            "+launcher.gpu_per_node=2": r"did you mean launcher\.gpus_per_node, a whole number at least 1 .1 here.\?",
            "++datasets.k150.prefixx=/data": r"\.prefixx is not a setting; did you mean datasets\.k150\.prefix, a text\?",
            "++trainer.data.sources.k150.train.path=x": r"mean trainer\.data\.sources\.k150\.train\.paths, a text or a ",
            "++zzz=1": "zzz is not a setting; the top level has batch_size, ",
            "++trainer.model.trunk.dept=3": r"trainer\.model\.trunk\.dept is not an argument of .*did you mean depth\?",
            "++trainer.task.nrom=patch": r"trainer\.task\.nrom is not an argument .*did you mean norm\?",
        }
        for override, saying in cases.items():
            with self.subTest(override):
                self.assert_refused(override, saying=saying)

    def test_an_unknown_key_in_an_experiment_file(self):
        with tempfile.TemporaryDirectory() as folder:
            site = Path(folder) / "experiments" / "site"
            site.mkdir(parents=True)
            (site / "mine.yaml").write_text("# @package _global_\nephocs: 3\nbatch_size: 010\nclip_duration: 1:30\n")
            result = script("--config-dir", folder, *MAE, "+experiments/site=mine", FOLDER)
            self.assertEqual(result.returncode, 1)
            self.assertIn("did you mean epochs", result.stderr)
            self.assertIn(
                "mine.yaml, line 3) is '010' (str); expected a whole number (YAML reads such a number", result.stderr
            )
            self.assertIn(
                "mine.yaml, line 4) is '1:30' (str); expected a number (YAML reads such a number", result.stderr
            )
            self.assertNotIn("Traceback", result.stderr)

    def test_types_and_ranges(self):
        cases = {
            "batch_size=0": "batch_size is 0 .*at least 1",
            "batch_size=010": "batch_size is '010' .*plain decimal",
            "clip_duration=1:30": "clip_duration is '1:30'",
            "epochs=many": "epochs is 'many' .*expected a whole number",
            "epochs=1.5": "epochs is 1.5 .*expected a whole number",
            "epochs=true": "epochs is True .*expected a whole number",
            "trainer.compile=1": "trainer.compile is 1 .*expected true or false",
            "mask_ratio=1.5": "mask_ratio is 1.5 .*below 1",
            "clip_duration=nan": "clip_duration is nan",
            "clip_duration=inf": "clip_duration is inf",
            "trainer.seed_value=-1": "trainer.seed_value is -1 .*at least 0",
            "lr_scale_factor=0": r"lr_scale_factor is 0.* greater than 0 .*\+\+lr_scale_factor=0\.5",
            "trainer.mode=trian": "trainer.mode is 'trian'.*did you mean train",
            "trainer.data.bad_sample_budget=2": "bad_sample_budget is 2.*at most 1",
            "trainer.optim.options=3": "trainer.optim.options is 3 .*mapping",
            "trainer.model=vitbase": "trainer.model is 'vitbase'.*_target_",
            "trainer.task.norm=chanel": "trainer.task.norm is 'chanel'; .*did you mean channel",
            "trainer.seed_value=99999999999999999999999": "seed_value is 9+ .*at most",
            "image_size=1000000000": "image_size is 1000000000 .*at most 4096",
            "data_root=3": "data_root is 3 .*expected a text .in quotes it is one",
            "submitit.setup=x": r"submitit.setup is 'x' .*expected a list, as in \[a, b\]",
            "trainer.accelerator=gpu": "did you mean cuda",
            "trainer.model.trunk.depth=012": "trainer.model.trunk.depth is '012'.*expected a whole number",
            "short_side=0": "short_side is 0 .*at least 1",
            "trainer.data.views_per_clip=0": "views_per_clip is 0 .*at least 1",
            "trainer.distributed.timeout_minutes=0": "timeout_minutes is 0.0 .*greater than 0",
            "+trainer.data.repeats.k150=0": "trainer.data.repeats.k150 is 0.0 .*greater than 0",
        }
        for override, saying in cases.items():
            with self.subTest(override):
                self.assert_refused(override, saying=saying)

    def test_a_value_that_is_repeated_elsewhere_is_reported_once(self):
        self.assertEqual(
            self.assert_refused("lr_scale_factor=0", saying="lr_scale_factor").count("lr_scale_factor is"), 1
        )

    def test_an_interpolation_that_leads_nowhere(self):
        self.assert_refused("trainer.max_epochs=${nope}", saying="trainer.max_epochs cannot be resolved: .*nope")
        self.assert_refused("trainer.max_epochs=${data_root}", saying="trainer.max_epochs is 'data'")

    def test_everything_missing_is_listed_at_once(self):
        with self.assertRaises(UserError) as caught:
            check(composed())
        for name in ("epochs", "trainer.model", "trainer.task", "trainer.data.sources", "launcher.experiment_log_dir"):
            self.assertIn(name, str(caught.exception))
        self.assertIn("+trainer=mae_k150_config", str(caught.exception))
        self.assertEqual(str(caught.exception).count("Missing"), 1)

    def test_all_problems_are_told_at_once(self):
        text = self.assert_refused("++ephocs=3", "batch_size=0", "trainer.mode=x", saying="3 problems")
        self.assertEqual(text.count("\n- "), 3)

    def test_what_does_not_go_together(self):
        cases = {
            ("num_frames=15",): r"num_frames is 15; expected a multiple of 2.*Try num_frames=14",
            ("image_size=230",): r"image_size is 230; expected a multiple of 16.*Try image_size=224",
            ("trainer.model.trunk.heads=7",): "heads is 7, which does not divide trainer.model.trunk.width 768",
            ("trainer.model.decoder.heads=7",): "trainer.model.decoder.heads is 7",
            ("trainer.model.trunk.tubelet=16",): "tubelet is 16; expected three whole numbers",
            ("trainer.model.trunk=5",): "trainer.model.trunk is 5; expected a group",
            (
                "trainer.task.tubelet=[4,8,16]",
            ): r"tubelet is \[2, 16, 16\], trainer.task.tubelet is \[4, 8, 16\]; expected the same",
            ("trainer.data.view.size=112",): "image_size is 224, trainer.data.view.size is 112",
            ("~trainer.optim.options.lr", "lr_scale_factor=2"): "has no lr to divide",
            ("lr=1e-3", "lr_scale_factor=2"): r"^lr.* is 0\.001 and lr_scale_factor is 2",
            ("++lr=2", "trainer.optim.lr_scale_factor=3"): "lr.* is 2 and lr_scale_factor is 3",
            ("~trainer.optim.options.lr", "lr=1e-3"): "lr.* is 0.001, but trainer.optim.options has no lr",
            ("lr=0",): "lr is 0.0",
            ("++learning_rate=1e-3",): "did you mean lr",
            ("pretrained_checkpoint_path=[a,b]",): "pretrained_checkpoint_path.* is a list of 2",
            ("trainer.model.trunk.tubelet=[2,16]",): "expected three whole numbers",
            ("launcher.gpus_per_node=3",): "batch_size is 16 for the 3 processes of a node.*Try batch_size=12",
            ("launcher.gpus_per_node=8",): "views_per_clip is 4, .* the 2 clips of a process .*, or try batch_size=32",
            ("trainer.optim.accumulation_steps=3",): "accumulation_steps is 3, which does not divide the 16 clips",
            ("trainer/model=vitbase_ft",): r"Choose trainer/model=NAME\.$",
            ("trainer.data.num_frames=8",): "trainer.data.num_frames is 8, trainer.model.trunk.num_frames is 16",
        }
        for overrides, saying in cases.items():
            with self.subTest(overrides):
                self.assert_refused(*overrides, saying=saying)

    def test_numbers_that_no_run_can_have(self):
        for override, saying in (
            (
                "trainer.optim.options.lr.0.scheduler.peak=-1",
                r"lr\[0\].scheduler.peak is -1; expected a number of at least 0",
            ),
            ("trainer.optim.options.lr.0.scheduler.peak=nan", "peak is nan; expected"),
            ("trainer.optim.options.weight_decay.0.scheduler.value=inf", "value is inf; expected"),
            ("epochs=1000000000000000000000", "epochs is 1000000000000000000000 .* at most 1e.12"),
            ("num_workers=5000", "num_workers is 5000 .* at most 1024"),
            ("trainer.data.max_pixels=1000000000000000000000000", "max_pixels is .* at most 1e.12"),
        ):
            with self.subTest(override):
                self.assert_refused(override, saying=saying)

    def test_a_part_of_a_model_that_is_no_object(self):
        model = {"_target_": "omnivision.models.mae.MaskedAutoencoder", "trunk": {"a": 1}, "decoder": {}}
        self.assertIn("m.trunk has no _target_; expected an object", target_problems(model, "m")[0])

    def test_models_of_another_stage(self):
        data = "+trainer=mae_ft_ucf101_config"
        for stage, model, saying in (
            ("_ft", "vitbase", "Choose trainer/model=NAME_ft"),
            ("_ensemble_ft", "vitbase_ft", "Choose trainer/model=NAME_average_ft"),
            ("_ensemble_ft", "vitbase_average_ft", "There are 3 checkpoints .* ensemble_num_models is 2"),
        ):
            with self.assertRaisesRegex(UserError, saying):
                settings(
                    f"+experiments=omnimae/omnimain_train_video{stage}",
                    data,
                    f"trainer/model={model}",
                    "pretrained_checkpoint_path=[a.pt,b.pt,c.pt]",
                )

    def test_objects_that_may_be_built_but_not_here(self):
        mask, view = "omnivision.data.masking.TubeMask,ratio:0.5", "omnivision.data.views.EvalView,size:224"
        cases = {
            ("trainer.task", mask): "omnivision.tasks",
            ("trainer.data.view", mask): "omnivision.data.views",
            ("trainer.data.val_view", mask): "omnivision.data.views",
            ("trainer.data.mask", view): "omnivision.data.masking",
            ("trainer.model", mask): "omnivision.models",
        }
        for (setting, target), package in cases.items():
            with self.subTest(setting):
                self.assert_refused(
                    *([] if setting == "trainer.task" else ["trainer.task.tubelet=[2,16,16]"]),
                    f"~{setting}",
                    f"++{setting}={{_target_:{target}}}",
                    saying=rf"{setting}\._target_ is {target.split(',')[0]}; expected something of {package}",
                )

    def test_lr_scale_factor_takes_any_ratio(self):
        for value in (0.5, 2, 1.3333, 1e-3):
            self.assertEqual(settings(*MAE, f"lr_scale_factor={value}").trainer.optim.lr_scale_factor, value)


class Targets(unittest.TestCase):
    def test_sources_are_read_in_any_locale(self):
        code = "from omnivision.config.targets import own_definitions; print('MixupCutmix' in str(own_definitions()))"
        ascii_alone = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        done = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | ascii_alone, cwd=ROOT, capture_output=True, text=True
        )
        self.assertEqual((done.stdout, done.returncode), ("True\n", 0), done.stderr)

    def test_only_known_packages_are_built(self):
        for name in ("os.system", "pathlib.Path.unlink", "numpy.load", "torch.load", "omnivisionx.y", "builtins.open"):
            problems = target_problems({"_target_": name}, "trainer.task")
            self.assertEqual(len(problems), 1, name)
            self.assertIn("may not build just anything", problems[0])
        nested = {"_target_": "torch.optim.AdamW", "betas": [{"_target_": "os.system"}]}
        self.assertEqual(len(target_problems(nested, "a")), 1)
        self.assertEqual(target_problems({"_target_": "torch.optim.SGD"}, "a"), [])

    def test_signatures_are_those_of_the_classes(self):
        self.assertEqual(list(signature_of("omnivision.data.masking.TubeMask")), ["ratio"])
        trunk = signature_of("omnivision.models.vit.VisionTransformer")
        self.assertEqual((trunk["depth"].annotation, trunk["depth"].required), ("int", False))
        self.assertIsNone(signature_of("omnivision.models.vit.Nope"))

    def test_a_wrong_name_or_a_lacking_argument(self):
        problems = target_problems({"_target_": "omnivision.data.masking.RandomMaks", "ratio": 1}, "m")
        self.assertIn("did you mean omnivision.data.masking.RandomMask?", problems[0])
        problems = target_problems({"_target_": "omnivision.data.masking.RandomMask"}, "m")
        self.assertIn("m lacks ratio", problems[0])


class Composition(unittest.TestCase):
    def explained(self, *overrides: str) -> str:
        with self.assertRaises(HydraException) as caught:
            composed(*overrides)
        return explain(caught.exception, [CONFIG], overrides)

    def test_a_plain_key_that_does_not_exist(self):
        for override, saying in (
            (
                "epohcs=3",
                "epohcs (argument epohcs=3) is not a setting; did you mean epochs, a whole number at least 1 (200",
            ),
            (
                "trainer.optim.amp.dtype=x",
                "mean trainer.optim.amp.amp_dtype, one of auto, bfloat16, float16 (auto here)?",
            ),
        ):
            self.assertIn(saying, self.explained(*MAE, override))

    def test_a_choice_that_does_not_exist(self):
        self.assertIn("Did you mean vitbase?", self.explained(*MAE, "trainer/model=vitbse"))
        self.assertIn("mae_k150_config", self.explained("+trainer=mae_k150_confg"))
        self.assertIn("omnimain_train_video", self.explained("+experiments=omnimae/omnimain_train_vide"))

    def test_causes_that_come_back_to_their_beginning(self):
        first, second = HydraException(""), ValueError("at the bottom")
        first.__context__, second.__context__ = second, first
        self.assertIn("at the bottom", explain(first, [CONFIG]))

    def test_a_model_without_an_experiment(self):
        text = self.explained("trainer/model=vitbase")
        self.assertIn("+experiments=", text)

    def test_a_list_for_a_mapping(self):
        self.assertRegex(
            self.explained(*MAE, "trainer.data.sources=[k150]"), r"sources=\[k150\] does not fit; expected a group"
        )

    def test_an_unquoted_equals_sign(self):
        self.assertIn("stands in quotes", self.explained("launcher.experiment_log_dir=a=b"))

    def test_setting_names_are_those_of_the_configuration(self):
        names = set(setting_names())
        made = OmegaConf.to_container(composed(*MAE))
        self.assertIn("trainer.optim.amp.amp_dtype", names)
        for key in made:
            self.assertIn(key, names)


class Script(unittest.TestCase):
    def test_a_dataset_and_a_recipe_of_ones_own_as_documented(self):
        with tempfile.TemporaryDirectory() as name:
            site, page = Path(name), (ROOT / "docs/data.md").read_text()
            for folder in ("experiments", "trainer"):
                (site / folder).mkdir()
            recipe = page.partition("```yaml\n")[2].partition("```")[0]
            (site / "trainer/mae_ft_mine_config.yaml").write_text(recipe)
            entry = "  mine: {kind: video, num_classes: 3, train: {paths: p.npy, labels: l.npy}}\n"
            (site / "experiments/films.yaml").write_text(f"# @package _global_\ndatasets:\n{entry}")
            stage = (
                "+experiments=omnimae/omnimain_train_video_ft",
                "+trainer=mae_ft_mine_config",
                "trainer/model=vitmicro_ft",
            )
            result = script(
                *stage,
                f"hydra.searchpath=[file://{site}]",
                f"launcher.experiment_log_dir={name}/run",
                "pretrained_checkpoint_path=null",
                "trainer.mode=dry",
            )
            self.assertEqual((result.returncode, result.stderr), (1, ""))  # there is no p.npy
            self.assertRegex(result.stdout, r"sources +mine")

    def test_a_mistake_is_one_paragraph_and_leaves_nothing(self):
        with tempfile.TemporaryDirectory() as folder:
            for overrides, saying in (
                (["++ephocs=3"], "did you mean epochs"),
                (["epohcs=3"], "did you mean epochs"),
                (["trainer/model=vitbse"], "vitbase"),
                (["batch_size=0"], "at least 1"),
                (["a=b=c"], "stands in quotes"),
                (
                    ["--dry"],
                    "--dry is no option; trainer.mode=dry says what a run would be. Settings are written NAME=VALUE",
                ),
                (["--config-dir", "/no/such"], "--config-dir is /no/such, and there is no such folder"),
                (["trainer/model=null"], "expected the name of one, e.g. trainer/model=vitbase"),
            ):
                with self.subTest(overrides):
                    result = script(*MAE, FOLDER, *overrides, cwd=Path(folder))
                    self.assertEqual(result.returncode, 1)
                    self.assertIn(saying, result.stderr)
                    self.assertTrue(result.stderr.startswith("error: "), result.stderr)
                    self.assertNotIn("Traceback", result.stderr)
                    self.assertEqual(list(Path(folder).iterdir()), [])
        self.assertFalse((ROOT / "outputs").exists())


if __name__ == "__main__":
    unittest.main()
