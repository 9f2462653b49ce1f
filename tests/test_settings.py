"""Invalid settings: all are found at once, and each sentence names the key and, where one is near, what was meant."""

import tempfile
import unittest
from pathlib import Path

from omegaconf import OmegaConf

from omnivision.config.instantiate import TargetError, signature_of, target_problems
from omnivision.config.schema import setting_hints
from omnivision.config.validate import validate_config
from omnivision.utils.errors import UserError
from tests.runs import ROOT
from tests.stage_runs import composed
from tests.test_config import FOLDER, script, settings

MAE = ("+experiments=omnimae/omnimain_train_video", "+trainer=mae_k150_config")

# Overrides -> the key that is named first; another text of the sentence, if it matters.
VIEW = "{_target_:omnivision.data.views.EvalView,size:224}"
MASK = "{_target_:omnivision.data.masking.TubeMask,ratio:0.5}"
VALUES: dict[str, tuple[str, ...]] = {
    # Unknown keys.
    "++ephocs=3": ("ephocs", "mean epochs?"),
    "++trainer.optim.ampp.enabled=true": ("trainer.optim.ampp", "mean trainer.optim.amp?"),
    "+launcher.gpu_per_node=2": ("launcher.gpu_per_node", "mean launcher.gpus_per_node?"),
    "++datasets.k150.prefixx=/data": ("datasets.k150.prefixx", "prefix?"),
    "++trainer.data.sources.k150.train.path=x": ("trainer.data.sources.k150.train.path", "train.paths?"),
    "++trainer.model.trunk.dept=3": ("trainer.model.trunk.dept", "mean trainer.model.trunk.depth?"),
    "++trainer.optim.optimizer.lrr=1": ("trainer.optim.optimizer.lrr", "mean trainer.optim.optimizer.lr?"),
    "++zzz=1": ("zzz",),
    # Types and ranges.
    "batch_size=0": ("batch_size", ">= 1, got 0"),
    "batch_size=010": ("batch_size", "'010'"),
    "clip_duration=1:30": ("clip_duration", "'1:30'"),
    "epochs=1.5": ("epochs", "int"),
    "epochs=true": ("epochs", "int"),
    "epochs=" + "9" * 400: ("epochs",),
    "batch_size=": ("batch_size",),
    "trainer.compile=1": ("trainer.compile", "true or false"),
    "mask_ratio=1.5": ("mask_ratio", "< 1"),
    "clip_duration=nan": ("clip_duration", "nan"),
    "trainer.mode=DRY": ("trainer.mode", "mean dry?"),
    "trainer.accelerator=gpu": ("trainer.accelerator", "cuda"),
    "trainer.optim.options=3": ("trainer.optim.options", "group"),
    "trainer.model=vitbase": ("trainer.model",),
    "trainer.task.norm=chanel": ("trainer.task.norm", "mean channel?"),
    "trainer.optim.optimizer.fused=maybe": ("trainer.optim.optimizer.fused", "'maybe'"),
    "submitit.setup=x": ("submitit.setup", "list"),
    "trainer.model.trunk.depth=012": ("trainer.model.trunk.depth", "'012'"),
    "trainer.model.trunk=5": ("trainer.model.trunk",),
    "trainer.model.trunk.depth=1000000": ("trainer.model.trunk.depth", "<= 1000"),
    "trainer.model.decoder.heads=0": ("trainer.model.decoder.heads", ">= 1"),
    "trainer.model.decoder.share=0": ("trainer.model.decoder.share", "> 0"),
    "trainer.model.decoder.attention=crss": ("trainer.model.decoder.attention", "mean cross?"),
    "++trainer.model.decoder.dept=3": ("trainer.model.decoder.dept", "mean trainer.model.decoder.depth?"),
    "trainer.max_epochs=${nope}": ("trainer.max_epochs", "nope"),
    # Settings that must agree.
    "trainer.model.trunk.heads=7": ("trainer.model.trunk.heads", "768"),
    "trainer.model.decoder.heads=7": ("trainer.model.decoder.heads",),
    "trainer.model.trunk.depth=0": ("trainer.model.trunk.depth", ">= 1"),
    "trainer.task.tubelet=[4,8,16]": ("trainer.model.trunk.tubelet", "trainer.task.tubelet"),
    "trainer.data.view.size=112": ("image_size", "trainer.data.view.size is 112"),
    "trainer.data.num_frames=8": ("trainer.data.num_frames", "trainer.model.trunk.num_frames is 16"),
    "lr=1e-3 lr_scale_factor=2": ("lr", "lr_scale_factor"),
    "pretrained_checkpoint_path=[a,b]": ("pretrained_checkpoint_path", "omnimain_train_video_ensemble_ft"),
    "launcher.gpus_per_node=3": ("batch_size", "batch_size=12"),
    "launcher.gpus_per_node=8": ("batch_size", "batch_size=32"),
    "trainer.optim.accumulation_steps=3": ("batch_size", "accumulation_steps"),
    "trainer.data.mask=null": ("trainer.data.mask", "trainer/data=unlabelled_video"),
    "++datasets.k150.kind=image": ("trainer.data.image",),
    "submitit.mem=8G submitit.mem_gb=8": ("submitit", "mem_gb"),
    "++trainer.optim.options.weight_decy=[]": ("trainer.optim.options.weight_decy", "mean weight_decay?"),
    # Objects.
    f"~trainer.data.mask ++trainer.data.mask={VIEW}": ("trainer.data.mask", "data.masking"),
    f"~trainer.data.val_view ++trainer.data.val_view={MASK}": ("trainer.data.val_view", "views"),
    f"~trainer.task ++trainer.task={MASK}": ("trainer.task", "omnivision.tasks"),
    "trainer.model._target_=omnivision.models.mae.MaskedAutoencodr": ("trainer.model._target_", "mae.MaskedAutoencoder?"),
    "trainer.optim.optimizer._target_=os.system": ("trainer.optim.optimizer._target_", "trust_targets"),
    "++trainer.model._target_=5": ("trainer.model._target_",),
    "++trainer.data.view._partial_=true": ("trainer.data.view._partial_",),
    "++trainer.optim.optimizer._convert_=all": ("trainer.optim.optimizer._convert_",),
    "++trainer.model.classes=[3]": ("trainer.model.classes",),
}  # fmt: skip


class Values(unittest.TestCase):
    def problems(self, *overrides: str) -> list[str]:
        with self.assertRaises(UserError) as caught:
            settings(*MAE, *overrides)
        return caught.exception.problems

    def test_each_is_one_problem_that_names_its_key(self):
        for overrides, (key, *parts) in VALUES.items():
            with self.subTest(overrides):
                problem, *more = self.problems(*overrides.split())
                self.assertTrue(problem.startswith(f"{key} "), problem)
                self.assertTrue(all(each.startswith("Missing: ") for each in more), more)
                for part in parts:
                    self.assertIn(part, problem)

    def test_all_problems_are_found_at_once(self):
        found = self.problems("++ephocs=3", "batch_size=0", "trainer.mode=x", "trainer.max_epochs=${nope}")
        self.assertEqual(len(found), 4)
        with self.assertRaises(UserError) as caught:
            validate_config(composed())
        [problem] = caught.exception.problems
        for name in ("epochs", "trainer.model", "trainer.task", "trainer.data.sources", "launcher.experiment_log_dir"):
            self.assertIn(name, problem)
        self.assertIn("+trainer=mae_k150_config", problem)

    def test_the_checkpoints_of_an_average_are_counted(self):
        average = ["+experiments=omnimae/omnimain_train_video_ensemble_ft", "+trainer=mae_ft_ucf101_config"]
        with self.assertRaisesRegex(UserError, "^ensemble_num_models "):
            settings(*average, "pretrained_checkpoint_path=[a.pt,b.pt,c.pt]")
        for given in ("[a.pt,b.pt]", "[one_file_with_several.pt]"):
            settings(*average, f"pretrained_checkpoint_path={given}")

    def test_types_of_settings_are_those_of_the_configuration(self):
        types = setting_hints()
        self.assertIn("trainer.optim.amp.amp_dtype", types)
        self.assertLessEqual(set(OmegaConf.to_container(composed(*MAE))), set(types))


class Targets(unittest.TestCase):
    def test_only_classes_of_known_packages_are_built(self):
        for name in ("os.system", "pathlib.Path.unlink", "numpy.load", "torch.load", "omnivisionx.y", "builtins.open",
                     "omnivision.data.catalog.np.load", "omnivision.data.catalog.UserError", "torch.nn.init"):  # fmt: skip
            self.assertEqual(list(target_problems({"_target_": name}, "trainer.task")), ["trainer.task._target_"], name)
        nested = {"_target_": "torch.optim.AdamW", "betas": [{"_target_": "os.system"}, 0.9]}
        self.assertEqual(list(target_problems(nested, "a")), ["a.betas[0]._target_"])
        self.assertEqual(target_problems({"_target_": "torch.optim.SGD"}, "a"), {})

    def test_arguments_are_those_of_the_signature(self):
        self.assertEqual(list(signature_of("omnivision.data.masking.TubeMask")), ["ratio"])
        self.assertRaises(TargetError, signature_of, "omnivision.models.vit.Nope")
        self.assertEqual(list(target_problems({"_target_": "omnivision.data.masking.RandomMask"}, "m")), ["m.ratio"])
        model = {
            "_target_": "omnivision.models.mae.MaskedAutoencoder",
            "trunk": {"a": 1},
            "decoder": {"width": 8, "depth": 1, "heads": 2},
        }
        self.assertEqual(list(target_problems(model, "m")), ["m.trunk"])
        trunk = {"_target_": "omnivision.models.vit.VisionTransformer", "tubelet": [2, 16]}
        self.assertEqual(list(target_problems(trunk, "m")), ["m.tubelet[2]"])
        self.assertEqual(target_problems(trunk | {"tubelet": [2, 16, 16]}, "m"), {})


class Script(unittest.TestCase):
    def test_a_dataset_and_a_recipe_of_ones_own_as_documented(self):
        with tempfile.TemporaryDirectory() as name:
            site, page = Path(name), (ROOT / "docs/index.md").read_text()
            for folder in ("experiments", "trainer"):
                (site / folder).mkdir()
            recipe = page.partition("mae_ft_mine_config.yaml <<'END'\n")[2].partition("END")[0]
            (site / "trainer/mae_ft_mine_config.yaml").write_text(recipe)
            entry = "  mine: {kind: video, num_classes: 3, train: {paths: p.npy, labels: l.npy}}\n"
            (site / "experiments/my_datasets.yaml").write_text(f"# @package _global_\ndatasets:\n{entry}")
            result = script(
                *(
                    "+experiments=omnimae/omnimain_train_video_ft",
                    "+trainer=mae_ft_mine_config",
                    "trainer/model=vitmicro_ft",
                ),
                *(f"hydra.searchpath=[file://{site}]", f"launcher.experiment_log_dir={name}/run"),
                *("pretrained_checkpoint_path=null", "trainer.mode=dry"),
            )
            self.assertEqual((result.returncode, result.stderr), (1, ""))  # there is no p.npy
            self.assertRegex(result.stdout, r"sources +mine")

    def test_invalid_input_is_one_paragraph_and_leaves_nothing(self):
        with tempfile.TemporaryDirectory() as folder:
            result = script(*MAE, FOLDER, "++ephocs=3", cwd=Path(folder))
            self.assertEqual((result.returncode, result.stdout), (1, ""))
            self.assertRegex(result.stderr, r"^error: ephocs .*\n$")
            self.assertEqual(list(Path(folder).iterdir()), [])


if __name__ == "__main__":
    unittest.main()
