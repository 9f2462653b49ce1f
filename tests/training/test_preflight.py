"""What is found out before a run starts: all problems at once, room on the disk, warnings, classes of one's own."""

import collections
import re
import shutil
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

from omnivision.config.schema import Settings
from omnivision.config.validate import validate_config
from omnivision.data.sampling import EpochPlan, SourcePlan
from omnivision.training import build, preflight
from omnivision.utils.errors import StopRequested, UserError
from omnivision.utils.io import SHARDS_PREFIX
from tests import runs
from tests import stage_runs as stages

Usage = collections.namedtuple("Usage", "total used free")
MODELS = {"mae": "vitmicro", "average": "vitmicro_average_ft", "ft": "vitmicro_ft", "lp": "vitmicro_ft"}


def settings_of(stage: str, *overrides: str) -> Settings:
    experiment, recipe, _ = stages.STAGES[stage]
    data = "k150" if stage == "mae" else "ucf101"
    chosen = (
        f"+experiments=omnimae/{experiment}",
        f"+trainer={recipe}_{data}_config",
        f"trainer/model={MODELS[stage]}",
    )
    rest = ("submitit.use_cluster=false", "launcher.experiment_log_dir=run", "pretrained_checkpoint_path=null")
    return validate_config(stages.compose_config(*chosen, *rest, *overrides))


class Room(unittest.TestCase):
    def check(self, settings: Settings, free: float) -> None:
        with mock.patch.object(shutil, "disk_usage", lambda _: Usage(1, 0, free)):
            preflight.check_disk_space(settings, build.build_model(settings, "meta"))

    def test_disk_must_have_space_for_checkpoints(self):
        for stage, count in (("mae", 3), ("ft", 4)):  # a run that validates keeps its best, too
            with tempfile.TemporaryDirectory() as name:
                settings = settings_of(stage, f"launcher.experiment_log_dir={name}")
                size = preflight.checkpoint_bytes(settings, build.build_model(settings, "meta"))
                self.check(settings, free=count * size)
                with self.assertRaisesRegex(UserError, f"{count} checkpoints.* launcher.experiment_log_dir"):
                    self.check(settings, free=count * size - 1)
                parts = Path(name) / "checkpoints" / f"{SHARDS_PREFIX}12"
                parts.mkdir(parents=True)
                for file in (parts / "0.safetensors", parts.parent / "checkpoint.pt"):
                    with open(file, "wb") as opened:
                        opened.truncate(2 * size)
                self.check(settings, free=0)


class LearningRate(unittest.TestCase):
    def test_learning_rate_for_another_batch_size_is_warned_about(self):
        for stage, overrides, fitting in (
            ("mae", ("batch_size=16",), "16"),
            ("ft", ("batch_size=8",), "8"),
            ("ft", ("batch_size=8", "lr_scale_factor=20"), "8"),
            ("ft", ("batch_size=256",), "0.25"),
            ("lp", ("batch_size=8", "lr_scale_factor=0.5"), "4"),
            ("ft", ("batch_size=32",), None),  # twice the rate
            ("ft", ("batch_size=8", "lr_scale_factor=16"), None),  # half the rate
            ("ft", ("batch_size=8", "lr=1e-3"), None),
            ("mae", ("batch_size=16", "launcher.num_nodes=8"), None),
            ("ft", ("batch_size=8", "trainer.mode=val"), None),
        ):
            with self.subTest(stage=stage, overrides=overrides):
                found = list(preflight.recipe_warnings(settings_of(stage, *overrides), 0))
                self.assertEqual(len(found), fitting is not None)
                if fitting is not None:
                    self.assertIn(f"lr_scale_factor={fitting},", found[0])

    def test_published_commands_and_the_demo_cause_no_warning(self):
        published = [("ft", align, 8, 16, 2) for align in ("inpk150", "sim150", "inpk150_sim150", "k150")]
        published += [("ft", "ucf101", 4, 8, 2), ("lp", "ucf101", 4, 8, 1), ("ensemble_ft", "ucf101", 4, 8, 1)]
        commands = [[*runs.STAGE_1]] + [
            [f"+experiments=omnimae/omnimain_train_video_{stage}", f"+trainer=mae_ft_{recipe}_config",
             f"launcher.num_nodes={nodes}", f"batch_size={batch}", f"lr_scale_factor={factor}"]
            for stage, recipe, nodes, batch, factor in published
        ]  # fmt: skip
        demo = {"mae": "mae_demo", "align": "mae_ft_demo_synthetic"} | dict.fromkeys(
            ("finetune", "probe", "average"), "mae_ft_demo"
        )
        commands += [[f"+experiments=demo/{stage}", f"+trainer={recipe}_config"] for stage, recipe in demo.items()]
        for command in commands:
            settings = validate_config(stages.compose_config("launcher.experiment_log_dir=run", *command))
            self.assertEqual(list(preflight.recipe_warnings(settings, 0)), [], command)


class FewClips(unittest.TestCase):
    def test_small_data_recipe_is_suggested_for_few_clips(self):
        for count, stage, overrides, is_suggested in (
            (40, "ft", (), True),
            (999, "ft", ("trainer.task.mixing.cutmix_alpha=0",), True),
            (40, "lp", (), False),
            (1000, "ft", (), False),
            (40, "ft", ("mixing_prob=0",), False),
            (40, "ft", ("trainer.task.mixing=null",), False),
            (40, "ft", ("trainer.mode=val",), False),
        ):
            found = list(preflight.recipe_warnings(settings_of(stage, "lr=1", *overrides), count))
            self.assertEqual(
                ["small_data_ft" in line for line in found], [True] * is_suggested, (count, stage, overrides)
            )

    def test_small_data_settings_win_in_any_order_of_groups(self):
        chosen = ["+experiments=omnimae/small_data_ft", "+trainer=mae_ft_ucf101_config"]
        for order in (chosen, chosen[::-1]):
            settings = validate_config(stages.compose_config(*order, "launcher.experiment_log_dir=run"))
            view = settings.trainer.data.view
            shares = settings.trainer.task["mixing"]["prob"], view["rand_augment"]["prob"], view["erasing"]["prob"]
            self.assertEqual((shares, view["scale"]), ((0, 0, 0), [0.25, 1]))
            self.assertEqual(
                (settings.trainer.optim.layer_decay, settings.trainer.model["trunk"]["drop_path"]), (None, 0)
            )
            self.assertEqual(list(preflight.recipe_warnings(settings, 36)), [])


class Weights(unittest.TestCase):
    def test_frozen_or_averaged_weights_need_a_checkpoint_or_an_explicit_null(self):
        for refused, stage, *overrides in (
            (True, "lp"),
            (True, "average"),
            (True, "ft", "trainer.freeze=[trunk.blocks.*]"),
            (True, "lp", "trainer.mode=dry"),
            (False, "lp", "++pretrained_checkpoint_path=null"),
            (False, "lp", "trainer.mode=val"),
            (False, "ft"),
        ):
            with tempfile.TemporaryDirectory() as name, self.subTest(stage=stage, overrides=overrides):
                said = stages.run_in_process(stages.command(stage, Path(name) / "run", *overrides)).stderr
                self.assertEqual("pretrained_checkpoint_path=RUN" in said, refused, said)

    def test_all_missing_checkpoints_of_an_average_are_reported(self):
        with self.assertRaises(UserError) as raised:
            preflight.check_pretrained(settings_of("average", "pretrained_checkpoint_path=[gone,lost]"))
        self.assertEqual(len(raised.exception.problems), 2)


class AllAtOnce(unittest.TestCase):
    def test_problems_of_several_kinds_are_reported_at_once(self):
        def impossible(_: Settings) -> None:
            raise UserError("no SLURM")

        with tempfile.TemporaryDirectory() as name:
            data = runs.write_split(Path(name), runs.real_videos())
            problems, *_ = preflight.check_run(
                settings_of(
                    "ft",
                    data[0].replace("k150", "ucf101"),
                    "++datasets.ucf101.train.labels=gone.npy",
                    "++datasets.ucf101.val.paths=gone_too.npy",
                    "pretrained_checkpoint_path=nowhere",
                    "trainer.model.trunk.heads=7",
                ),
                impossible,
            )
        keys = ("datasets.ucf101.train.labels", "datasets.ucf101.val.paths", "no SLURM", "pretrained_checkpoint_path")
        for key, problem in zip((*keys, "trainer.model.trunk.heads"), problems, strict=True):
            self.assertIn(key, problem)

    def test_splits_without_labels_and_parameters_without_lr_are_reported(self):
        with tempfile.TemporaryDirectory() as name:
            films = runs.real_videos()
            data = [each for which in ("train", "val")
                    for each in stages.write_split(Path(name), "ucf101", which, films, labels=[-1] * len(films))]  # fmt: skip
            rule = '++trainer.optim.options.lr.0.param_names=["*.bias"]'
            problems, *_ = preflight.check_run(settings_of("ft", *data, rule))
        keys = ("datasets.ucf101.train.labels", "datasets.ucf101.val.labels", "trainer.optim.options.lr")
        self.assertEqual([problem.split(" ")[0] for problem in problems], list(keys))


class Numbers(unittest.TestCase):
    """Settings that would take mixup or the EMA away without a word."""

    def warnings(self, settings: Settings, *plan: int) -> list[str]:
        return list(preflight.plan_warnings(settings, EpochPlan({"ucf101": SourcePlan(*plan)}, 0)))

    def test_mixup_with_one_video_per_rank_is_warned_about(self):
        for overrides, videos, views, warned in (
            (["launcher.gpus_per_node=2"], 2, 1, True),
            (["launcher.gpus_per_node=2"], 2, 4, True),  # partners would be views of the same video
            (["launcher.gpus_per_node=2"], 4, 1, False),
            (["launcher.gpus_per_node=2", "trainer.task.mixing=null"], 2, 1, False),
            (["launcher.gpus_per_node=2", "mixing_prob=0"], 2, 1, False),
            (["launcher.gpus_per_node=1", "trainer.optim.accumulation_steps=8"], 8, 1, False),
        ):
            found = self.warnings(settings_of("ft", *overrides), 100, videos, views)
            self.assertEqual(["trainer.task.mixing" in each for each in found], [True] * warned, overrides)

    def test_ema_decay_that_is_not_reached_is_warned_about(self):
        def ema(decay: float | str, epochs: int) -> Settings:
            return settings_of("ft", "mixing_prob=0", f"trainer.ema_decay={decay}", f"epochs={epochs}")

        for decay, steps, epochs in ((0.9999, 8, 3), (0.9999, 1000, 80), (0.5, 1, 2), (0.999, 80, 100)):
            [warning] = self.warnings(ema(decay, epochs), steps, 1)
            fitting = float(re.search(r"Set trainer\.ema_decay=(0\.\d+) ", warning)[1])
            self.assertLess(fitting, decay)
            self.assertEqual(self.warnings(ema(fitting, epochs), steps, 1), [])
        for decay, steps, epochs in ((0.9999, 1000, 100), (0.5, 8, 1), (0.9, 100, 1), ("null", 1, 1)):
            self.assertEqual(self.warnings(ema(decay, epochs), steps, 1), [], decay)


class ClassesOfOnesOwn(unittest.TestCase):
    def test_user_classes_are_built_only_from_trusted_packages(self):
        with tempfile.TemporaryDirectory() as name:
            (Path(name) / "my_lab.py").write_text(
                "import pathlib\nimport numpy as np\npathlib.Path(__file__ + '.ran').touch()\n"
                "class Left:\n    def __call__(self, grid, rng):\n        hidden = np.zeros(grid, bool)\n"
                "        hidden[..., : grid[2] // 2] = True\n        return hidden\n"
            )
            mask = ["~trainer.data.mask", "++trainer.data.mask={_target_:my_lab.Left}"]
            with mock.patch.object(sys, "path", [name, *sys.path]):
                refused = {f"trainer.trust_targets=[{other}]": "_target_ " for other in ("my", "my_lab.Left.x", "''")}
                refused |= {f"trainer.trust_targets={w}": "trust_targets" for w in ("true", "3", "my_lab", "'${gone}'")}
                for override, key in (refused | {"epochs=1": "_target_ .*trust_targets"}).items():
                    with self.assertRaisesRegex(UserError, key):
                        settings_of("mae", *mask, override)
                self.assertFalse((Path(name) / "my_lab.py.ran").exists(), "its code ran")
                settings = settings_of("mae", *mask, "trainer.trust_targets=[my_lab]")
                built = build.instantiate_target(settings.trainer.data.mask, "trainer.data.mask")
                self.assertEqual(built((2, 4, 4), None).sum(), 16)

    def test_a_signal_that_a_library_turns_into_another_error_stops_the_run(self):
        def interrupted(*_: object, **__: object) -> None:
            try:
                raise StopRequested("SIGTERM")
            finally:
                raise AttributeError("of its cleanup")

        with mock.patch.object(build, "instantiate", interrupted), self.assertRaises(StopRequested):
            build.instantiate_target({"_target_": "torch.nn.Linear"}, "trainer.model")


if __name__ == "__main__":
    unittest.main()
