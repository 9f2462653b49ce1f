"""What is found out before a run starts: all problems at once, room on disk and in shared memory, classes of one's own."""

import collections
import os
import re
import shutil
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import numpy as np

from omnivision.config.schema import Settings
from omnivision.config.validate import validate_config
from omnivision.data.sampling import EpochPlan, SourcePlan
from omnivision.training import build, preflight
from omnivision.utils.errors import UserError
from omnivision.utils.io import PARTS
from tests import runs
from tests import stage_runs as stages

Usage = collections.namedtuple("Usage", "total used free")


def settings_of(stage: str, model: str, *overrides: str) -> Settings:
    experiment, recipe, _ = stages.STAGES[stage]
    data = "k150" if stage == "mae" else "ucf101"
    return validate_config(
        stages.composed(
            f"+experiments=omnimae/{experiment}",
            f"+trainer={recipe}_{data}_config",
            f"trainer/model={model}",
            "submitit.use_cluster=false",
            "launcher.experiment_log_dir=run",
            "pretrained_checkpoint_path=null",
            *overrides,
        )
    )


class Room(unittest.TestCase):
    def test_the_size_of_a_checkpoint_is_known_without_building_the_model(self):
        for stage, model, *overrides in (
            ("mae", "vitbase"),
            ("mae", "vitmicro", "trainer.model.decoder.attention=cross"),
            ("mae", "vithuge", "trainer.ema_decay=0.9"),
            ("ft", "vitlarge_ft"),
            ("lp", "vitbase_ft"),
        ):
            settings = settings_of(stage, model, *overrides)
            built = build.model(settings, device="meta")
            count = sum(p.numel() for p in built.parameters())
            trained = sum(p.numel() for p in built.parameters() if p.requires_grad)
            exact = 4 * (count + 2 * trained + (count if overrides and "ema" in overrides[0] else 0))
            self.assertAlmostEqual(preflight.checkpoint_bytes(settings) / exact, 1, delta=0.03, msg=(stage, model))

    def test_no_room(self):
        settings = settings_of("mae", "vitbase", "num_workers=6", "launcher.gpus_per_node=2")
        needed = 3 * preflight.checkpoint_bytes(settings)
        for shared, disk, saying in (
            (9e12, 9e12, None),
            (
                9e12,
                needed - 1e6,
                r"^The disk of .*/run/checkpoints has room for .* GB; expected .* GB for 3 checkpoints",
            ),
            (
                1e8,
                9e12,
                r"^/dev/shm, .* has 0.1 GB free; expected .* 2 x 6 workers with 2 batches each. Lower num_workers",
            ),
            (1e8, 1e6, r"^2 problems:\n- The disk of (.|\n)*\n- /dev/shm"),
        ):
            free = {Path("/dev/shm"): shared}
            usage = lambda path, free=free, disk=disk: Usage(1, 0, free.get(path, disk))  # noqa: E731
            with mock.patch.object(shutil, "disk_usage", usage):
                if saying is None:
                    preflight.check_disk_space(settings)
                else:
                    self.assertRaisesRegex(UserError, saying, preflight.check_disk_space, settings)

    def test_what_the_run_has_saved_already_counts_as_room(self):
        with tempfile.TemporaryDirectory() as name, mock.patch.object(shutil, "disk_usage", lambda _: Usage(1, 0, 0)):
            settings = settings_of("mae", "vitmicro", f"launcher.experiment_log_dir={name}")
            self.assertRaisesRegex(UserError, "has room for 0 GB", preflight.check_disk_space, settings)
            (Path(name) / "checkpoints").mkdir()
            with open(Path(name) / "checkpoints/checkpoint.pt", "wb") as file:
                file.truncate(3 * preflight.checkpoint_bytes(settings))
            preflight._check_folder(settings)

    def test_what_is_kept_besides(self):
        """A run that validates keeps its best, too; parts that several processes wrote are room as well."""
        with tempfile.TemporaryDirectory() as name, mock.patch.object(shutil, "disk_usage", lambda _: Usage(1, 0, 0)):
            settings = settings_of("ft", "vitmicro_ft", f"launcher.experiment_log_dir={name}")
            self.assertRaisesRegex(UserError, "for 4 checkpoints", preflight.check_disk_space, settings)
            parts = Path(name) / "checkpoints" / f"{PARTS}12"
            parts.mkdir(parents=True)
            for number in range(2):
                with open(parts / f"{number}.safetensors", "wb") as file:
                    file.truncate(2 * preflight.checkpoint_bytes(settings))
            preflight._check_folder(settings)

    def test_a_folder_that_cannot_be_written(self):
        with mock.patch.object(os, "access", return_value=False):
            self.assertRaisesRegex(
                UserError, "cannot be written", preflight.check_disk_space, settings_of("mae", "vitmicro")
            )

    def test_shared_memory_of_another_machine_is_not_looked_at(self):
        with mock.patch.object(shutil, "disk_usage", lambda path: Usage(1, 0, 0 if path == Path("/dev/shm") else 9e12)):
            for override in ("submitit.use_cluster=true", "num_workers=0", "trainer.mode=val"):
                preflight.check_disk_space(settings_of("mae", "vitmicro", override))


class LearningRate(unittest.TestCase):
    def test_a_rate_for_another_batch_is_a_warning_with_the_factor_that_fits(self):
        for stage, model, overrides, fitting in (
            ("mae", "vitmicro", ("batch_size=16",), "16"),
            ("ft", "vitmicro_ft", ("batch_size=8",), "8"),
            ("ft", "vitmicro_ft", ("batch_size=8", "lr_scale_factor=20"), "8"),
            ("ft", "vitmicro_ft", ("batch_size=256",), "0.25"),
            ("lp", "vitmicro_ft", ("batch_size=8", "lr_scale_factor=0.5"), "4"),
            ("ft", "vitmicro_ft", ("batch_size=32",), None),  # twice the rate
            ("ft", "vitmicro_ft", ("batch_size=8", "lr_scale_factor=16"), None),  # half the rate
            ("ft", "vitmicro_ft", ("batch_size=8", "lr=1e-3"), None),
            ("mae", "vitmicro", ("batch_size=16", "launcher.num_nodes=8"), None),
            ("ft", "vitmicro_ft", ("batch_size=8", "trainer.mode=val"), None),
        ):
            with self.subTest(stage=stage, overrides=overrides):
                found = preflight.recipe_warnings(settings_of(stage, model, *overrides), [])
                self.assertEqual(len(found), fitting is not None)
                if fitting is not None:
                    self.assertIn(f"lr_scale_factor={fitting},", found[0])

    def test_published_commands_and_the_demo_fit(self):
        commands = [[*runs.STAGE_1, "++launcher.experiment_log_dir=run"]]
        for align in ("inpk150", "sim150", "inpk150_sim150", "k150"):
            published = "++launcher.num_nodes=8 ++batch_size=16 ++lr_scale_factor=2".split()
            commands.append(
                ["+experiments=omnimae/omnimain_train_video_ft", f"+trainer=mae_ft_{align}_config", *published]
            )
        for stage, factor in (("ft", 2), ("lp", 1), ("ensemble_ft", 1)):
            published = f"++launcher.num_nodes=4 ++batch_size=8 ++lr_scale_factor={factor}".split()
            commands.append(
                [f"+experiments=omnimae/omnimain_train_video_{stage}", "+trainer=mae_ft_ucf101_config", *published]
            )
        for stage, recipe in (
            ("mae", "mae_demo"),
            ("align", "mae_ft_demo_synthetic"),
            ("finetune", "mae_ft_demo"),
            ("probe", "mae_ft_demo"),
            ("average", "mae_ft_demo"),
        ):
            commands.append([f"+experiments=demo/{stage}", f"+trainer={recipe}_config"])
        for command in commands:
            made = validate_config(stages.composed("launcher.experiment_log_dir=run", *command))
            self.assertEqual(preflight.recipe_warnings(made, []), [], command)


class FewClips(unittest.TestCase):
    def test_the_recipe_for_few_clips_is_named_where_it_fits(self):
        for count, stage, overrides, told in (
            (40, "ft", (), True),
            (999, "ft", ("trainer.task.mixing.cutmix_alpha=0",), True),
            (40, "lp", (), False),
            (1000, "ft", (), False),
            (40, "ft", ("mixing_prob=0",), False),
            (40, "ft", ("trainer.task.mixing=null",), False),
            (40, "ft", ("trainer.mode=val",), False),
        ):
            found = preflight.recipe_warnings(settings_of(stage, "vitmicro_ft", "lr=1", *overrides), [range(count)])
            self.assertEqual([line for line in found if "small_data_ft" in line], found)
            self.assertEqual(len(found), told, (count, stage, overrides))

    def test_its_settings_win_whatever_the_recipe_of_the_data_and_their_order(self):
        chosen = ["+experiments=omnimae/small_data_ft", "+trainer=mae_ft_ucf101_config"]
        for order in (chosen, chosen[::-1]):
            made = validate_config(stages.composed(*order, "launcher.experiment_log_dir=run"))
            view = made.trainer.data.view
            shares = made.trainer.task["mixing"]["prob"], view["rand_augment"]["prob"], view["erasing"]["prob"]
            self.assertEqual((shares, view["scale"]), ((0, 0, 0), [0.25, 1]))
            self.assertEqual((made.trainer.optim.layer_decay, made.trainer.model["trunk"]["drop_path"]), (None, 0))
            self.assertEqual(preflight.recipe_warnings(made, [range(36)]), [])


class Weights(unittest.TestCase):
    """Frozen or averaged weights that come from nowhere."""

    def refusal(self, stage: str, *overrides: str) -> str:
        with tempfile.TemporaryDirectory() as name:
            return stages.here(stages.command(stage, Path(name) / "run", *overrides)).stderr

    def test_they_are_refused_unless_null_is_typed(self):
        given = "pretrained_checkpoint_path must"
        for stage, *overrides in (
            ("lp",),
            ("average",),
            ("ft", "trainer.freeze=[trunk.blocks.*]", "trainer.optim.layer_decay=null"),
            ("lp", "trainer.mode=dry"),
        ):
            self.assertIn(given, self.refusal(stage, *overrides), (stage, overrides))
        for stage, *overrides in (
            ("lp", "pretrained_checkpoint_path=null"),
            ("lp", "++pretrained_checkpoint_path=null"),
            ("lp", "trainer.mode=val"),
            ("ft",),
        ):
            self.assertNotIn(given, self.refusal(stage, *overrides), (stage, overrides))

    def test_every_missing_checkpoint_of_an_average_is_named(self):
        settings = settings_of("average", "vitmicro_average_ft", "pretrained_checkpoint_path=[gone,lost]")
        with self.assertRaises(UserError) as raised:
            preflight.check_pretrained(settings)
        self.assertEqual(len(raised.exception.problems), 2)


class AllAtOnce(unittest.TestCase):
    def test_missing_files_of_several_kinds(self):
        with tempfile.TemporaryDirectory() as name:
            data = runs.write_split(Path(name), runs.real_films())
            settings = settings_of(
                "ft",
                "vitmicro_ft",
                *[each.replace("k150", "ucf101") for each in data[:1]],
                "++datasets.ucf101.train.labels=gone.npy",
                "++datasets.ucf101.val.paths=gone_too.npy",
                "pretrained_checkpoint_path=nowhere",
            )

            def impossible(_: Settings) -> None:
                raise UserError("no SLURM")

            with self.assertRaises(UserError) as raised:
                preflight.check_run(settings, impossible)
            self.assertRegex(
                str(raised.exception),
                r"^4 problems:\n- datasets.ucf101.train.labels: no such file(.|\n)*\n- datasets.ucf101.val.paths: no such file"
                r"(.|\n)*\n- no SLURM\n- pretrained_checkpoint_path is 'nowhere'",
            )

    def test_splits_without_a_label(self):
        with tempfile.TemporaryDirectory() as name:
            paths = np.array(runs.real_films())
            for which in ("train", "val"):
                np.save(Path(name) / f"{which}.npy", paths)
                np.save(Path(name) / f"{which}_labels.npy", np.full(len(paths), -1))
            split = [
                f"++datasets.ucf101.{which}.{what}={name}/{which}{end}.npy"
                for which in ("train", "val")
                for what, end in (("paths", ""), ("labels", "_labels"))
            ]
            with self.assertRaisesRegex(
                UserError, "No sample of the train split of ucf101 has a label(.|\n)*of the val split"
            ):
                preflight.check_run(settings_of("ft", "vitmicro_ft", *split))


class Numbers(unittest.TestCase):
    """Settings that would take mixup or the moving average away without a word."""

    def test_mixup_without_a_partner(self):
        for overrides, videos, views, named in (
            (["launcher.gpus_per_node=2"], 2, 1, ["ucf101"]),
            (["launcher.gpus_per_node=2"], 2, 4, ["ucf101"]),  # partners would be views of the same video
            (["launcher.gpus_per_node=2"], 4, 1, []),
            (["launcher.gpus_per_node=2", "trainer.task.mixing=null"], 2, 1, []),
            (["launcher.gpus_per_node=2", "mixing_prob=0"], 2, 1, []),
            (["launcher.gpus_per_node=1", "trainer.optim.accumulation_steps=8"], 8, 1, []),
        ):
            plan = EpochPlan({"ucf101": SourcePlan(100, videos, views)}, 0)
            warnings = preflight.mixing_warnings(settings_of("ft", "vitmicro_ft", *overrides), plan)
            self.assertEqual(len(warnings), len(named), overrides)
            for warning, name in zip(warnings, named, strict=True):
                self.assertRegex(warning, f"{name}.*trainer.task.mixing.*batch_size")

    def test_a_decay_that_is_not_reached(self):
        for decay, steps, epochs in ((0.9999, 8, 3), (0.9999, 1000, 80), (0.5, 1, 2), (0.999, 80, 100)):
            plan = EpochPlan({"ucf101": SourcePlan(steps, 1)}, 0)
            [warning] = preflight.ema_warnings(settings_of("ft", "vitmicro_ft", *self.ema(decay, epochs)), plan)
            fitting = float(re.search(r"Set trainer\.ema_decay=(0\.\d+) ", warning)[1])
            self.assertLess(fitting, decay)
            self.assertEqual(
                preflight.ema_warnings(settings_of("ft", "vitmicro_ft", *self.ema(fitting, epochs)), plan), []
            )
        for decay, steps, epochs in ((0.9999, 1000, 100), (0.5, 8, 1), (0.9, 100, 1), ("null", 1, 1)):
            plan = EpochPlan({"ucf101": SourcePlan(steps, 1)}, 0)
            settings = settings_of("ft", "vitmicro_ft", *self.ema(decay, epochs))
            self.assertEqual(preflight.ema_warnings(settings, plan), [], decay)

    def ema(self, decay: float | str, epochs: int) -> list[str]:
        return [f"trainer.ema_decay={decay}", f"epochs={epochs}"]


class ClassesOfOnesOwn(unittest.TestCase):
    def test_they_are_built_when_their_package_is_trusted_and_not_before(self):
        with tempfile.TemporaryDirectory() as name:
            (Path(name) / "my_lab.py").write_text(
                "import pathlib\nimport numpy as np\npathlib.Path(__file__ + '.ran').touch()\n"
                "class Left:\n    def __call__(self, grid, rng):\n        hidden = np.zeros(grid, bool)\n"
                "        hidden[..., : grid[2] // 2] = True\n        return hidden\n"
            )
            mask = ["~trainer.data.mask", "++trainer.data.mask={_target_:my_lab.Left}"]
            with mock.patch.object(sys, "path", [name, *sys.path]):
                with self.assertRaisesRegex(UserError, r"^trainer.data.mask._target_ .*trust_targets=\[PACKAGE\]"):
                    settings_of("mae", "vitmicro", *mask)
                for other in ("my", "my_lab.Left.x", "''"):
                    with self.assertRaisesRegex(UserError, "^trainer.data.mask._target_ "):
                        settings_of("mae", "vitmicro", *mask, f"trainer.trust_targets=[{other}]")
                for wrong in ("true", "3", "my_lab", "'${gone}'"):
                    with self.assertRaisesRegex(UserError, "trainer.trust_targets"):
                        settings_of("mae", "vitmicro", f"trainer.trust_targets={wrong}")
                self.assertFalse((Path(name) / "my_lab.py.ran").exists(), "its code ran")
                settings = settings_of("mae", "vitmicro", *mask, "trainer.trust_targets=[my_lab]")
                built = build.build(settings.trainer.data.mask, "trainer.data.mask")
                self.assertEqual(built((2, 4, 4), None).sum(), 16)


if __name__ == "__main__":
    unittest.main()
