"""The shipped configuration: every file composes, checks and builds; the command of the paper works word for word."""

import functools
import itertools
import os
import re
import resource
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import yaml
from omegaconf import OmegaConf
from PIL import Image

from omnivision.config.cross_validate import STAGES, cross_validate, override_warnings
from omnivision.config.flat import flatten
from omnivision.config.schema import Settings, setting_hints
from omnivision.config.validate import validate_config
from omnivision.training import build
from omnivision.utils.errors import UserError
from tests import runs
from tests.runs import ROOT, STAGE_1
from tests.stage_runs import compose_config, run_in_process

CONFIG = ROOT / "config"
MODELS = sorted(path.stem for path in (CONFIG / "trainer" / "model").glob("*.yaml"))
RECIPES = sorted(path.stem for path in (CONFIG / "trainer").glob("mae_*_config.yaml"))
FOLDER = "++launcher.experiment_log_dir=/nowhere/run"
DATASETS = "k150 inpk150 sim150 ucf101 hmdb51 diving48 minissv2 ikea uav".split()
WIDTHS = {"vitmicro": 96, "vittiny": 192, "vitsmall": 384, "vitbase": 768, "vitlarge": 1024, "vithuge": 1280}
STAGE_OF = {
    "": "mae",
    "_ft": "finetune",
    "_average_ft": "average",
    "_attentive": "attentive",
}  # by the ending of a model's name
NOTHING = "pretrained_checkpoint_path=null"
FINETUNE = ("+experiments=omnimae/omnimain_train_video_ft", NOTHING)
TWO_SETS = (*FINETUNE, "+trainer=mae_ft_inpk150_sim150_config")


@functools.cache
def settings(*overrides: str) -> Settings:
    return validate_config(compose_config(*overrides, FOLDER))


def stage_settings(stage: str, *overrides: str) -> Settings:
    return settings(f"+experiments={STAGES[stage].experiment}", f"+trainer={STAGES[stage].recipe}", NOTHING, *overrides)


class Shipped(unittest.TestCase):
    def test_every_recipe_composes_validates_and_is_short(self):
        wanted = [f"mae_{name}" for name in ("k150", "inpk150", "sim150", "inpk150_sim150")]
        wanted += [f"mae_ft_{name}" for name in (*DATASETS, "inpk150_sim150")]
        self.assertLessEqual({f"{name}_config" for name in wanted}, set(RECIPES))
        for recipe in RECIPES:
            with self.subTest(recipe):
                stage = "mae" if not recipe.startswith("mae_ft") else "finetune"
                experiment = f"demo/{stage}" if "demo" in recipe else STAGES[stage].experiment
                run_settings = settings(f"+experiments={experiment}", f"+trainer={recipe}", NOTHING)
                names = recipe.removeprefix("mae_").removeprefix("ft_").removesuffix("_config").split("_")
                if "demo" not in recipe:
                    self.assertEqual(list(run_settings.trainer.data.sources), names)
                if stage == "finetune":
                    sets = {"nohuman": "actions", "synthetic": "actions"}
                    order = list(dict.fromkeys(sets.get(name, name) for name in run_settings.trainer.data.sources))
                    heads = {name: order.index(sets.get(name, name)) for name in run_settings.trainer.data.sources}
                    self.assertEqual(build.build_label_sets(run_settings).head, heads)
                lines = (CONFIG / "trainer" / f"{recipe}.yaml").read_text().splitlines()
                self.assertLessEqual(len(lines), 8)
                self.assertTrue(lines[0].startswith("# "))
        for file in CONFIG.rglob("*.yaml"):
            self.assertIsInstance(yaml.safe_load(file.read_text()), dict, file)

    def test_every_model_builds_with_its_optimizer_on_the_meta_device(self):
        self.assertEqual(set(MODELS), {width + ending for width in WIDTHS for ending in STAGE_OF})
        for name in MODELS:
            with self.subTest(name):
                size, _, kind = name.partition("_")
                run_settings = stage_settings(STAGE_OF[f"_{kind}" if kind else ""], f"trainer/model={name}")
                model = build.build_model(run_settings, device="meta")
                trunk = model.model.trunk if kind == "average_ft" else model.trunk
                self.assertEqual(trunk.norm.weight.shape, (WIDTHS[size],))
                optimizer = build.build_optimizer(run_settings, model)
                trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
                self.assertEqual(sum(len(group.names) for group in optimizer.groups), len(trained))

    def test_every_checkpoint_choice_composes(self):
        choices = sorted(path.stem for path in (CONFIG / "trainer" / "checkpoint").glob("*.yaml"))
        ensembles = ["default_ensemble", "no_heads_ensemble"]
        self.assertEqual(choices, sorted(["default", "load_all", "no_heads", "no_heads_no_decoder", *ensembles]))
        for choice in choices:
            run_settings = stage_settings("finetune", f"trainer/checkpoint={choice}")
            self.assertEqual(run_settings.trainer.checkpoint.strict, choice == "load_all")

    def test_later_stages_have_the_papers_settings(self):
        cases = {  # stage: (ending of models, learning rate at 0, .125 and 1 for the nominal batch)
            "finetune": ("_ft", (1e-6, 4e-3, 1e-6)),
            "probe": ("_ft", (4e-6, 16e-3, 4e-6)),
            "average": ("_average_ft", (16e-3, None, 4e-6)),
        }
        for stage, (kind, rates) in cases.items():
            run_settings = settings(f"+experiments={STAGES[stage].experiment}", "+trainer=mae_ft_hmdb51_config",
                            f"trainer/model=vitbase{kind}", "lr_scale_factor=2", NOTHING)  # fmt: skip
            model = build.build_model(run_settings, device="meta")
            optimizer = build.build_optimizer(run_settings, model)
            for progress, rate in zip((0, 0.125, 1), rates, strict=True):
                optimizer.set_progress(progress)
                if rate is not None:
                    self.assertAlmostEqual(optimizer.lr, rate / 2, places=12)
            self.assertEqual((run_settings.trainer.max_epochs, run_settings.trainer.data.val_clips), (30, 2))
            trained = {name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
            expected = {"_ft": {"trunk", "heads"}, "_average_ft": {"mixing_ratio", "model"}}[kind]
            self.assertEqual(trained, {"heads"} if stage == "probe" else expected)
            heads = model.model.heads if kind == "_average_ft" else model.heads
            self.assertEqual(heads[0][0].weight.shape, (51, 768))

    def test_lr_sets_the_peak_learning_rate_in_every_stage(self):
        def rates(stage: str, model: str, *overrides: str) -> list[list[float]]:
            small = ("image_size=32", "num_frames=4", "mixing_lr_factor=3", f"trainer/model={model}")
            run_settings = stage_settings(stage, *small, *overrides)
            groups = build.build_optimizer(run_settings, build.build_model(run_settings, device="meta")).groups
            return [
                [group.factors.get("lr", 1.0), *(group.schedules["lr"](i / 200) for i in range(201))]
                for group in groups
            ]

        for stage, model, recipe_peak in (
            ("mae", "vitmicro", 1.6e-3),
            ("finetune", "vitmicro_ft", 4e-3),
            ("probe", "vitmicro_ft", 16e-3),
            ("average", "vitmicro_average_ft", 16e-3),
        ):
            with self.subTest(stage):
                recipes, given = rates(stage, model), rates(stage, model, "lr=1e-4")
                self.assertAlmostEqual(min(max(each[1:]) for each in given), 1e-4, delta=1e-12)
                self.assertEqual([each[0] for each in given], [each[0] for each in recipes], "layer decay")
                for one, other in zip(recipes, given, strict=True):
                    for then, now in zip(one[1:], other[1:], strict=True):
                        self.assertAlmostEqual(now, then * 1e-4 / recipe_peak, delta=1e-12)
                self.assertEqual(len({round(max(each[1:]), 9) for each in given}), 1 + (stage == "average"))

    def test_two_label_sets_share_a_head_only_with_share_head(self):
        for overrides, classes in (([], [150, 150]), (["trainer.data.share_head=true"], [150])):
            run_settings = settings(*TWO_SETS, *overrides)
            self.assertEqual(build.build_label_sets(run_settings).classes, classes)
            self.assertEqual(len(build.build_model(run_settings, device="meta").heads), len(classes))
        both = ["++trainer.data.sources.k150=${datasets.k150}"]
        self.assertEqual(
            build.build_label_sets(settings(*TWO_SETS, *both)).head, {"inpk150": 0, "sim150": 1, "k150": 0}
        )

    def test_sources_of_one_head_must_have_the_same_class_names(self):
        classes = [f"++datasets.{name}.num_classes=3" for name in ("inpk150", "sim150")]
        one_set = [f"++datasets.{name}.label_set=mine" for name in ("inpk150", "sim150")]
        with tempfile.TemporaryDirectory() as folder:
            for other, refused in (("abc", ()), ("acb", ("set", "head")), ("abd", ("set",))):
                files = []
                for name, letters in (("inpk150", "abc"), ("sim150", other)):
                    Path(folder, f"{name}.txt").write_text("\n".join(letters))
                    files.append(f"++datasets.{name}.class_names={folder}/{name}.txt")
                for way, more in (("none", []), ("set", one_set), ("head", ["trainer.data.share_head=true"])):
                    run_settings = settings(*TWO_SETS, *classes, *files, *more)
                    if way in refused:
                        with self.assertRaisesRegex(UserError, r"datasets\.sim150\.class_names"):
                            build.resolve_class_names(run_settings)
                    else:
                        self.assertEqual(build.resolve_class_names(run_settings)[0], list("abc"))

    def test_class_count_comes_from_the_catalog_or_video_labels(self):
        unknown = "++datasets.ucf101.num_classes=null"
        self.assertEqual(build.build_label_sets(stage_settings("finetune", "++video_labels=101")).classes, [101])
        self.assertEqual(build.build_label_sets(stage_settings("finetune", unknown, "++video_labels=7")).classes, [7])
        with self.assertRaisesRegex(UserError, r"^datasets\.ucf101\.num_classes .*video_labels"):
            stage_settings("finetune", "++video_labels=51")
        with self.assertRaisesRegex(UserError, r"datasets\.ucf101\.num_classes"):
            build.build_label_sets(stage_settings("finetune", unknown))

    def test_pretraining_has_the_papers_settings(self):
        run_settings = settings(*STAGE_1, FOLDER)
        model = build.build_model(run_settings, device="meta")
        self.assertEqual((model.trunk.grid, len(model.trunk.blocks)), ((8, 14, 14), 12))
        self.assertEqual(model.heads[0].projector.weight.shape, (1536, 384))
        self.assertEqual((run_settings.clips_per_step, run_settings.trainer.max_epochs), (128, 200))
        optimizer = build.build_optimizer(run_settings, model)
        rates = {}
        for progress in (0, 0.05, 1):
            optimizer.set_progress(progress)
            rates[progress] = optimizer.lr
        self.assertEqual(rates, {0: 5e-7, 0.05: 8e-4, 1: 0})
        self.assertEqual(optimizer.optimizer.defaults["betas"], (0.9, 0.95))
        self.assertEqual(run_settings.trainer.distributed.comms_dtype, "auto")
        self.assertEqual(
            (run_settings.trainer.checkpoint.save_freq, run_settings.trainer.logging.pictures_every_epochs), (50, 10)
        )
        self.assertEqual(
            (run_settings.trainer.seed_value, run_settings.clip_duration, run_settings.short_side), (123, 2.7, 256)
        )

    def test_types_of_settings_match_the_configuration(self):
        types = setting_hints()
        self.assertIn("trainer.optim.amp.amp_dtype", types)
        self.assertLessEqual(set(OmegaConf.to_container(compose_config(*STAGE_1))), set(types))

    def test_user_dataset_and_recipe_as_documented(self):
        with tempfile.TemporaryDirectory() as name:
            site, page = Path(name), (ROOT / "docs/index.md").read_text()
            recipe = page.partition("mae_ft_mine_config.yaml <<'END'\n")[2].partition("END")[0]
            entry = "  mine: {kind: video, num_classes: 3, train: {paths: p.npy, labels: l.npy}}\n"
            for file, text in (("trainer/mae_ft_mine_config", recipe),
                               ("experiments/my_datasets", f"# @package _global_\ndatasets:\n{entry}")):  # fmt: skip
                (site / file).parent.mkdir()
                (site / f"{file}.yaml").write_text(text)
            run_settings = settings(*FINETUNE, "+trainer=mae_ft_mine_config", f"hydra.searchpath=[file://{site}]")
            self.assertEqual(list(run_settings.trainer.data.sources), ["mine"])

    def test_groups_compose_in_any_order_with_or_without_yaml(self):
        groups = ["+experiments=omnimae/omnimain_train_video", "trainer/model=vitsmall", "+trainer=mae_sim150_config"]
        reference = settings(*groups)
        for order in itertools.permutations(groups):
            self.assertEqual(settings(*(f"{g}.yaml" if g[0] == "+" else g for g in order)), reference, order)


class Stages(unittest.TestCase):
    def test_every_combination_of_experiment_recipe_and_model(self):
        whole = {stage: stage_settings(stage) for stage in STAGES}
        for (stage, run_settings), data, other in itertools.product(whole.items(), whole.values(), whole.values()):
            changed = run_settings.with_trainer(model=other.trainer.model, task=data.trainer.task)
            problems = [each for each in cross_validate(changed) if "one stage" in each]
            same_model = STAGES[other.stage].model == STAGES[stage].model
            fits = same_model and STAGES[data.stage].task == STAGES[stage].task
            self.assertEqual(problems == [], fits, (stage, data.stage, other.stage))
            if not fits:
                self.assertIn(f"+trainer={STAGES[stage].recipe} trainer/model={STAGES[stage].size} ", problems[0])
        for run_settings in whole.values():
            self.assertEqual(cross_validate(run_settings.with_trainer(model={"_target_": "mine.Model"})), [])

    def test_overrides_without_effect_are_warned_of(self):
        align = ("+experiments=demo/align", "+trainer=mae_ft_demo_synthetic_config", NOTHING)
        for chosen, argument, warned in (
            (FINETUNE, "trainer/optim=mae", True),
            (FINETUNE, "trainer/optim=finetune", False),
            (FINETUNE, "++mask_ratio=0.5", True),
            (FINETUNE, "mixing_prob=0.5", False),
            (FINETUNE, "lr=1e-3", False),
            (STAGE_1, "++mixing_prob=0.5", True),
            (STAGE_1, "num_frames=8", False),
            (align, "++crop_scale=[0.5,1]", True),
            (align, "short_side=100", False),
        ):
            recipe = () if chosen is not FINETUNE else ("+trainer=mae_ft_ucf101_config",)
            config = compose_config(*chosen, *recipe, FOLDER, argument)
            warnings = override_warnings(
                validate_config(config), OmegaConf.to_yaml(config), [*chosen, FOLDER, argument]
            )
            self.assertEqual([argument.lstrip("+").partition("=")[0] in each for each in warnings], [True] * warned)

    def test_every_experiment_names_its_stage(self):
        for file in CONFIG.glob("experiments/*/*.yaml"):
            if file.stem != "base":
                stage = compose_config(f"+experiments={file.parent.name}/{file.stem}").stage
                self.assertIn(stage, STAGES, file)
                if file.parent.name == "demo" and file.stem != "align":
                    self.assertEqual(stage, file.stem)


class Script(unittest.TestCase):
    def test_help_and_cfg_do_not_import_torch(self):
        command = [sys.executable, "-X", "importtime", str(ROOT / "train_app_submitit.py")]
        for arguments in (["--help"], ["--cfg", "job"]):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            result = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            self.assertEqual(result.returncode, 0, result.stderr)
            self.assertIn("lr_scale_factor: 1", result.stdout)
            if arguments == ["--help"]:
                for name in [*MODELS, *RECIPES, "omnimae/omnimain_train_video"]:
                    self.assertIn(name, result.stdout)
            # Of the processor, which does not depend on who else works on this machine.
            self.assertLess(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1.5, arguments)
            self.assertNotRegex(result.stderr, r"\| +torch\n")

    def test_the_page_of_settings_names_every_setting(self):
        """Also the arguments of the objects that a run builds."""
        text = (ROOT / "docs/settings.md").read_text()
        for experiment, recipe in (("_ft", "ft_ucf101"), ("_ensemble_ft", "ft_ucf101"), ("", "in1k_k150")):
            chosen = f"+experiments=omnimae/omnimain_train_video{experiment}", f"+trainer=mae_{recipe}_config"
            composed = compose_config(*chosen, NOTHING, FOLDER)
            del composed.datasets, composed.trainer.data.sources, composed.data_root
            for name in flatten(OmegaConf.to_container(composed, resolve=False)):
                last = name.rpartition(".")[2]
                if last != "_target_" and ".options." not in name and not name.startswith("trainer.optim.optimizer."):
                    self.assertTrue(re.search(rf"\b({re.escape(name)}|{last})`", text), name)

    def test_dry_run_describes_the_run_and_draws_its_schedules(self):
        with tempfile.TemporaryDirectory() as name:
            data = runs.write_split(Path(name), runs.real_videos() * 16 + ["/gone.mp4"] * 16)
            settings = (f"launcher.experiment_log_dir={name}/run", "batch_size=8", "epochs=3", "trainer.mode=dry")
            result = run_in_process([*STAGE_1, *data, *settings])
            self.assertIn(result.returncode, (0, 1))  # 0 where a cluster would take it
            self.assertEqual(result.stderr, "")
            for line in (
                r"model +MaskedAutoencoder: 94\.\d+ M parameters",
                r"operations +\d+\.\d+ GFLOPs per clip",
                r"batch +64 clips per step = 16 videos x 4 views, over 8 ranks",
                r"k150, train: 64 samples; 12 of 16 checked files exist",
                r"steps +1 per epoch x 3 epochs = 3",
                r"groups +2, of AdamW:\n  0: \d+ tensors, .* lr 5e-07 -> peak 0.0008 -> 0; weight_decay 0.05\n  1: .* 0\n",
                "#SBATCH --nodes=8",
            ):
                self.assertRegex(result.stdout, line)
            self.assertEqual(os.listdir(f"{name}/run"), ["dry.png"])
            with Image.open(f"{name}/run/dry.png") as picture:
                self.assertGreater(picture.width, 500)


if __name__ == "__main__":
    unittest.main()
