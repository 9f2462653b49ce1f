"""Invalid settings: all are found at once, and each sentence names the key and, where one is near, what was meant."""

import tempfile
import unittest
from pathlib import Path

from omegaconf import OmegaConf

from omnivision.config.instantiate import TargetError, signature_of, target_problems
from omnivision.config.schema import setting_types
from omnivision.config.validate import validate_config
from omnivision.utils.errors import UserError
from tests.runs import ROOT
from tests.test_config import FOLDER, composed, script, settings

MAE = ("+experiments=omnimae/omnimain_train_video", "+trainer=mae_k150_config")

# Overrides -> the key that is named first, and what else the sentence holds.
VALUES: dict[tuple[str, ...], tuple[str, ...]] = {
    # Unknown keys.
    ("++ephocs=3",): ("ephocs", "mean epochs?"),
    ("++trainer.optim.ampp.enabled=true",): ("trainer.optim.ampp", "mean trainer.optim.amp?"),
    ("+launcher.gpu_per_node=2",): ("launcher.gpu_per_node", "mean launcher.gpus_per_node?"),
    ("++datasets.k150.prefixx=/data",): ("datasets.k150.prefixx", "prefix"),
    ("++trainer.data.sources.k150.train.path=x",): ("trainer.data.sources.k150.train.path", "k150.train.paths?"),
    ("++zzz=1",): ("zzz", "batch_size, "),
    ("++trainer.model.trunk.dept=3",): ("trainer.model.trunk.dept", "mean depth?"),
    ("++trainer.model.decoder.dept=3",): ("trainer.model.decoder.dept", "depth"),
    ("++trainer.task.nrom=patch",): ("trainer.task.nrom", "mean norm?"),
    # Types and ranges.
    ("batch_size=0",): ("batch_size", ">= 1", "got 0"),
    ("batch_size=010",): ("batch_size", "'010'"),
    ("clip_duration=1:30",): ("clip_duration", "'1:30'"),
    ("epochs=many",): ("epochs", "int", "'many'"),
    ("epochs=1.5",): ("epochs", "int", "1.5"),
    ("epochs=2e2",): ("epochs", "int"),
    ("epochs=true",): ("epochs", "int", "True"),
    ("epochs=" + "9" * 400,): ("epochs",),
    ("batch_size='8'",): ("batch_size", "'8'"),
    ("batch_size=",): ("batch_size",),
    ("trainer.compile=1",): ("trainer.compile", "true or false"),
    ("mask_ratio=1.5",): ("mask_ratio", "< 1"),
    ("mask_ratio=90%",): ("mask_ratio", "'90%'"),
    ("mask_ratio=1" + "0" * 400,): ("mask_ratio",),
    ("clip_duration=nan",): ("clip_duration", "nan"),
    ("clip_duration=inf",): ("clip_duration", "inf"),
    ("trainer.seed_value=-1",): ("trainer.seed_value", ">= 0"),
    ("trainer.seed_value=99999999999999999999999",): ("trainer.seed_value",),
    ("lr_scale_factor=0",): ("lr_scale_factor", "> 0"),
    ("trainer.ema_decay=1",): ("trainer.ema_decay", "< 1"),
    ("trainer.mode=trian",): ("trainer.mode", "mean train?"),
    ("trainer.mode=DRY",): ("trainer.mode", "mean dry?"),
    ("trainer.accelerator=gpu",): ("trainer.accelerator", "cuda"),
    ("trainer.data.bad_sample_budget=2",): ("trainer.data.bad_sample_budget", "<= 1"),
    ("trainer.optim.options=3",): ("trainer.optim.options", "group"),
    ("trainer.model=vitbase",): ("trainer.model",),
    ("trainer.task.norm=chanel",): ("trainer.task.norm", "mean channel?"),
    ("trainer.optim.optimizer.fused=maybe",): ("trainer.optim.optimizer.fused", "'maybe'"),
    ("image_size=1000000000",): ("image_size", "<= 4096"),
    ("data_root=3",): ("data_root", "text"),
    ("submitit.setup=x",): ("submitit.setup", "list"),
    ("trainer.model.trunk.depth=012",): ("trainer.model.trunk.depth", "'012'"),
    ("trainer.model.trunk.depth=1000000",): ("trainer.model.trunk.depth", "<= 1000"),
    ("trainer.data.views_per_clip=0",): ("trainer.data.views_per_clip",),
    ("trainer.distributed.timeout_minutes=0",): ("trainer.distributed.timeout_minutes",),
    ("+trainer.data.repeats.k150=0",): ("trainer.data.repeats.k150", "> 0"),
    ("trainer.optim.options.lr.0.scheduler.peak=-1",): ("trainer.optim.options.lr[0].scheduler.peak", ">= 0"),
    ("trainer.optim.options.lr.0.scheduler.peak=nan",): ("trainer.optim.options.lr[0].scheduler.peak", "nan"),
    ("num_workers=5000",): ("num_workers", "<= 1024"),
    ("trainer.data.max_pixels=1000000000000000000000000",): ("trainer.data.max_pixels",),
    # Interpolations.
    ("trainer.max_epochs=${nope}",): ("trainer.max_epochs", "nope"),
    # Settings that must agree.
    ("num_frames=15",): ("num_frames", "num_frames=14"),
    ("image_size=230",): ("image_size", "image_size=224"),
    ("trainer.model.trunk.heads=7",): ("trainer.model.trunk.heads", "768"),
    ("trainer.model.decoder.heads=7",): ("trainer.model.decoder.heads",),
    ("trainer.model.decoder.attention=crss",): ("trainer.model.decoder.attention", "mean cross?"),
    ("trainer.model.decoder.share=0",): ("trainer.model.decoder.share",),
    ("trainer.model.trunk.tubelet=16",): ("trainer.model.trunk.tubelet",),
    ("trainer.model.trunk.tubelet=[2,16]",): ("trainer.model.trunk.tubelet",),
    ("trainer.model.trunk=5",): ("trainer.model.trunk",),
    ("trainer.task.tubelet=[4,8,16]",): ("trainer.model.trunk.tubelet", "trainer.task.tubelet"),
    ("trainer.data.view.size=112",): ("image_size", "trainer.data.view.size is 112"),
    ("trainer.data.num_frames=8",): ("trainer.data.num_frames", "trainer.model.trunk.num_frames is 16"),
    ("~trainer.optim.options.lr", "lr_scale_factor=2"): ("lr_scale_factor", "trainer.optim.options"),
    ("~trainer.optim.options.lr", "lr=1e-3"): ("lr", "trainer.optim.options"),
    ("lr=1e-3", "lr_scale_factor=2"): ("lr", "lr_scale_factor"),
    ("lr=0",): ("lr", "> 0"),
    ("pretrained_checkpoint_path=[a,b]",): ("pretrained_checkpoint_path",),
    ("launcher.gpus_per_node=3",): ("batch_size", "batch_size=12"),
    ("launcher.gpus_per_node=8",): ("trainer.data.views_per_clip", "batch_size=32"),
    ("trainer.optim.accumulation_steps=3",): ("trainer.optim.accumulation_steps",),
    ("++trainer.optim.options.lrr=[]",): ("trainer.optim.options.lrr", "mean lr?"),
    ("trainer/model=vitbase_ft",): ("Stages are mixed", "trainer/model=NAME"),
    # Objects.
    ("trainer.model._target_=omnivision.models.mae.MaskedAutoencodr",): ("trainer.model._target_", "mae.MaskedAutoencoder?"),
    ("trainer.optim.optimizer._target_=torch.optim.AdamWW",): ("trainer.optim.optimizer._target_", "torch.optim.AdamW?"),
    ("trainer.optim.optimizer._target_=os.system",): ("trainer.optim.optimizer._target_", "trust_targets"),
    ("++trainer.model._target_=5",): ("trainer.model._target_",),
    ("+trainer.model.foo=1",): ("trainer.model.foo",),
    ("++trainer.data.view.sclae=[0.2,1]",): ("trainer.data.view.sclae", "mean scale?"),
    ("++trainer.optim.optimizer.lrr=1",): ("trainer.optim.optimizer.lrr", "mean lr?"),
    ("++trainer.data.view._partial_=true",): ("trainer.data.view._partial_",),
}  # fmt: skip


class Values(unittest.TestCase):
    def problems(self, *overrides: str) -> list[str]:
        with self.assertRaises(UserError) as caught:
            settings(*MAE, *overrides)
        return caught.exception.problems

    def test_each_is_one_problem_that_names_its_key(self):
        for overrides, (key, *parts) in VALUES.items():
            with self.subTest(overrides):
                problem, *more = self.problems(*overrides)
                self.assertTrue(problem.startswith(f"{key} "), problem)
                self.assertTrue(all(each.startswith("Missing: ") for each in more), more)
                for part in parts:
                    self.assertIn(part, problem)

    def test_all_problems_are_found_at_once(self):
        found = self.problems("++ephocs=3", "batch_size=0", "trainer.mode=x", "trainer.max_epochs=${nope}")
        self.assertEqual(len(found), 4)

    def test_everything_missing_is_listed_at_once(self):
        with self.assertRaises(UserError) as caught:
            validate_config(composed())
        [problem] = caught.exception.problems
        for name in ("epochs", "trainer.model", "trainer.task", "trainer.data.sources", "launcher.experiment_log_dir"):
            self.assertIn(name, problem)
        self.assertIn("+trainer=mae_k150_config", problem)

    def test_models_of_another_stage(self):
        for stage, model, saying in (
            ("_ft", "vitbase", "trainer/model=NAME_ft"),
            ("_ensemble_ft", "vitbase_ft", "trainer/model=NAME_average_ft"),
            ("_ensemble_ft", "vitbase_average_ft", "ensemble_num_models is 2"),
        ):
            with self.assertRaisesRegex(UserError, saying):
                settings(
                    f"+experiments=omnimae/omnimain_train_video{stage}",
                    "+trainer=mae_ft_ucf101_config",
                    f"trainer/model={model}",
                    "pretrained_checkpoint_path=[a.pt,b.pt,c.pt]",
                )

    def test_objects_that_may_be_built_but_not_here(self):
        mask, view = "omnivision.data.masking.TubeMask,ratio:0.5", "omnivision.data.views.EvalView,size:224"
        for key, target in (
            ("trainer.task", mask),
            ("trainer.data.view", mask),
            ("trainer.data.val_view", mask),
            ("trainer.data.mask", view),
            ("trainer.model", mask),
        ):
            with self.subTest(key):
                more = [] if key == "trainer.task" else ["trainer.task.tubelet=[2,16,16]"]
                [problem] = self.problems(*more, f"~{key}", f"++{key}={{_target_:{target}}}")
                self.assertTrue(problem.startswith(f"{key}._target_ "), problem)

    def test_lr_scale_factor_takes_any_ratio(self):
        for value in (0.5, 2, 1.3333, 1e-3):
            self.assertEqual(settings(*MAE, f"lr_scale_factor={value}").trainer.optim.lr_scale_factor, value)

    def test_types_of_settings_are_those_of_the_configuration(self):
        types = setting_types()
        self.assertIn("trainer.optim.amp.amp_dtype", types)
        self.assertLessEqual(set(OmegaConf.to_container(composed(*MAE))), set(types))


class Targets(unittest.TestCase):
    def test_only_known_packages_are_built(self):
        for name in ("os.system", "pathlib.Path.unlink", "numpy.load", "torch.load", "omnivisionx.y", "builtins.open"):
            [problem] = target_problems({"_target_": name}, "trainer.task")
            self.assertIn("trust_targets", problem)
        nested = {"_target_": "torch.optim.AdamW", "betas": [{"_target_": "os.system"}]}
        self.assertEqual(len(target_problems(nested, "a")), 1)
        self.assertEqual(target_problems({"_target_": "torch.optim.SGD"}, "a"), [])

    def test_names_that_a_module_only_imports_are_not_built(self):
        for name in ("omnivision.data.catalog.np.load", "omnivision.data.catalog.UserError", "torch.nn.init"):
            self.assertEqual(len(target_problems({"_target_": name}, "a")), 1, name)

    def test_signatures_are_those_of_the_classes(self):
        self.assertEqual(list(signature_of("omnivision.data.masking.TubeMask")), ["ratio"])
        self.assertEqual(signature_of("omnivision.models.vit.VisionTransformer")["depth"].default, 12)
        self.assertRaises(TargetError, signature_of, "omnivision.models.vit.Nope")

    def test_a_wrong_name_or_a_lacking_argument(self):
        [problem] = target_problems({"_target_": "omnivision.data.masking.RandomMaks", "ratio": 1}, "m")
        self.assertIn("omnivision.data.masking.RandomMask?", problem)
        [problem] = target_problems({"_target_": "omnivision.data.masking.RandomMask"}, "m")
        self.assertIn("ratio", problem)
        model = {"_target_": "omnivision.models.mae.MaskedAutoencoder", "trunk": {"a": 1}, "decoder": {}}
        self.assertIn("m.trunk ", target_problems(model, "m")[0])


class Script(unittest.TestCase):
    def test_a_dataset_and_a_recipe_of_ones_own_as_documented(self):
        with tempfile.TemporaryDirectory() as name:
            site, page = Path(name), (ROOT / "docs/data.md").read_text()
            for folder in ("experiments", "trainer"):
                (site / folder).mkdir()
            recipe = page.partition("```yaml\n")[2].partition("```")[0]
            (site / "trainer/mae_ft_mine_config.yaml").write_text(recipe)
            entry = "  mine: {kind: video, num_classes: 3, train: {paths: p.npy, labels: l.npy}}\n"
            (site / "experiments/my_datasets.yaml").write_text(f"# @package _global_\ndatasets:\n{entry}")
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

    def test_invalid_input_is_one_paragraph_and_leaves_nothing(self):
        with tempfile.TemporaryDirectory() as folder:
            for overrides, part in (
                (["++ephocs=3"], "epochs"),
                (["trainer/model=vitbse"], "vitbase"),
                (["--dry"], "--dry"),
            ):
                with self.subTest(overrides):
                    result = script(*MAE, FOLDER, *overrides, cwd=Path(folder))
                    self.assertEqual(result.returncode, 1)
                    self.assertIn(part, result.stderr)
                    self.assertTrue(result.stderr.startswith("error: "), result.stderr)
                    self.assertNotIn("Traceback", result.stderr)
                    self.assertEqual(list(Path(folder).iterdir()), [])
        self.assertFalse((ROOT / "outputs").exists())


if __name__ == "__main__":
    unittest.main()
