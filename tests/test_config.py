"""The shipped configuration: every file composes, checks and builds; the command of the paper works word for word."""

import itertools
import os
import subprocess
import sys
import time
import unittest
from pathlib import Path

import yaml
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from omnivision import build, dry
from omnivision.settings import Settings, check
from omnivision.settings_yaml import read_numbers_as_written
from tests.runs import ROOT, STAGE_1

CONFIG = ROOT / "config"
MODELS = sorted(path.stem for path in (CONFIG / "trainer" / "model").glob("*.yaml"))
RECIPES = sorted(path.stem for path in (CONFIG / "trainer").glob("mae_*_config.yaml"))
FOLDER = "++launcher.experiment_log_dir=/nowhere/run"


def composed(*overrides: str) -> DictConfig:
    """What a command line composes, YAML numbers read as the script reads them."""
    read_numbers_as_written()
    with initialize_config_dir(str(CONFIG), version_base="1.3"):
        return compose("config", list(overrides))


def settings(*overrides: str) -> Settings:
    return check(composed(*overrides, FOLDER))


def script(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "train_app_submitit.py"), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


class Shipped(unittest.TestCase):
    def test_every_recipe_composes_and_checks(self):
        self.assertEqual(len(RECIPES), 5)
        for recipe in RECIPES:
            with self.subTest(recipe):
                experiment = "demo/mae" if "demo" in recipe else "omnimae/omnimain_train_video"
                made = settings(f"+experiments={experiment}", f"+trainer={recipe}")
                names = recipe.removeprefix("mae_").removesuffix("_config").split("_")
                sources = ["nohuman", "synthetic"] if "demo" in recipe else names
                self.assertEqual(list(made.trainer.data.sources), sources)

    def test_every_model_builds_with_its_optimizer_on_the_meta_device(self):
        widths = {"vitmicro": 96, "vittiny": 192, "vitsmall": 384, "vitbase": 768, "vitlarge": 1024, "vithuge": 1280}
        self.assertEqual(set(MODELS), set(widths))
        for name in MODELS:
            with self.subTest(name):
                made = settings(
                    "+experiments=omnimae/omnimain_train_video", "+trainer=mae_k150_config", f"trainer/model={name}"
                )
                model = build.model(made, device="meta")
                self.assertEqual(model.trunk.norm.weight.shape, (widths[name],))
                optimizer = build.optimizer(made, model)
                self.assertEqual(sum(len(group.names) for group in optimizer.groups), len(list(model.parameters())))

    def test_the_recipe_of_the_paper(self):
        made = settings(*STAGE_1, FOLDER)
        model = build.model(made, device="meta")
        self.assertEqual((model.trunk.grid, len(model.trunk.blocks)), ((8, 14, 14), 12))
        self.assertEqual(model.heads[0].projector.weight.shape, (1536, 384))
        self.assertEqual((made.clips_per_step, made.videos_per_step, made.trainer.max_epochs), (128, 32, 200))
        optimizer = build.optimizer(made, model)
        rates = {}
        for progress in (0, 0.05, 1):
            optimizer.set_progress(progress)
            rates[progress] = optimizer.lr
        self.assertEqual(rates, {0: 5e-7, 0.05: 8e-4, 1: 0})
        self.assertEqual(optimizer.optimizer.defaults["betas"], (0.9, 0.95))
        self.assertEqual(made.trainer.distributed.comms_dtype, "fp16")
        self.assertEqual((made.trainer.checkpoint.save_freq, made.trainer.logging.pictures_every_epochs), (50, 10))
        self.assertEqual((made.trainer.seed_value, made.clip_duration, made.short_side), (123, 2.7, 256))

    def test_any_order_of_the_groups_and_with_or_without_yaml(self):
        groups = [
            "+experiments=omnimae/omnimain_train_video{}",
            "trainer/model=vitsmall",
            "+trainer=mae_sim150_config{}",
        ]
        reference = settings(*(group.format("") for group in groups))
        for order in itertools.permutations(groups):
            for ending in ("", ".yaml"):
                self.assertEqual(settings(*(group.format(ending) for group in order)), reference, order)

    def test_recipes_are_a_few_lines(self):
        for recipe in RECIPES:
            lines = (CONFIG / "trainer" / f"{recipe}.yaml").read_text().splitlines()
            self.assertLessEqual(len(lines), 8, recipe)
            self.assertTrue(lines[0].startswith("# "), recipe)

    def test_every_file_says_what_it_is_and_is_yaml(self):
        files = list(CONFIG.rglob("*.yaml"))
        self.assertGreater(len(files), 20)
        for file in files:
            self.assertIsInstance(yaml.safe_load(file.read_text()), dict, file)


class Script(unittest.TestCase):
    def test_answers_at_once_and_without_torch(self):
        for arguments in (["--help"], ["--cfg", "job"]):
            times = []
            for _ in range(3):
                began = time.perf_counter()
                result = script(*arguments)
                times.append(time.perf_counter() - began)
                self.assertEqual(result.returncode, 0, result.stderr)
            self.assertIn("lr_scale_factor: 1", result.stdout)
            self.assertLess(min(times), 1.5, arguments)
        traced = subprocess.run(
            [sys.executable, "-X", "importtime", str(ROOT / "train_app_submitit.py"), "--cfg", "job"],
            capture_output=True,
            text=True,
        )
        self.assertIn("hydra", traced.stderr)
        self.assertNotRegex(traced.stderr, r"\| +torch\n")

    def test_help_names_every_choice(self):
        text = script("--help").stdout
        for name in [*MODELS, *RECIPES, "omnimae/omnimain_train_video"]:
            self.assertIn(name, text)

    def test_dry_tells_what_the_run_would_be_and_touches_nothing(self):
        made = settings(*STAGE_1, FOLDER)
        text = dry.describe(made)
        self.assertRegex(text, r"94\.\d+ M parameters")
        self.assertRegex(text, r"128 clips a step = 32 videos x 4 views, over 8 processes")
        self.assertIn("lr 5e-07 -> peak 0.0008 -> 0", text)
        self.assertRegex(text, r"\d+\.\d+ GFLOPs")
        self.assertEqual(text.count("tensors, "), 2)
        self.assertFalse(os.path.exists("/nowhere"))

    def test_flops_are_those_of_the_layers(self):
        made = settings(*STAGE_1, FOLDER)
        visible, tokens, width, small = 157, 1568, 768, 384

        def block(n, d):
            return 24 * n * d * d + 4 * n * n * d

        expected = 12 * block(visible, width) + 4 * block(tokens, small)
        expected += 2 * visible * 1536 * width + 2 * tokens * width * small + 2 * 1411 * small * 1536
        self.assertAlmostEqual(dry.gflops(made, build.model(made, "meta")), expected / 1e9, delta=0.01)


if __name__ == "__main__":
    unittest.main()
