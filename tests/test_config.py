"""The shipped configuration: every file composes, checks and builds; the command of the paper works word for word."""

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
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from omnivision.checkpoint.fingerprint import flat
from omnivision.config.compose import use_yaml12_numbers
from omnivision.config.schema import Settings
from omnivision.config.stages import ENDINGS, EXAMPLE_RECIPES, EXPERIMENTS, stage_problems, stage_warnings
from omnivision.config.stages import MODELS as MODELS_OF
from omnivision.config.validate import validate_config
from omnivision.launch import dry_run as dry
from omnivision.launch.launcher import Job
from omnivision.training import build
from omnivision.utils.errors import UserError
from tests import runs
from tests.runs import ROOT, STAGE_1

CONFIG = ROOT / "config"
MODELS = sorted(path.stem for path in (CONFIG / "trainer" / "model").glob("*.yaml"))
RECIPES = sorted(path.stem for path in (CONFIG / "trainer").glob("mae_*_config.yaml"))
FOLDER = "++launcher.experiment_log_dir=/nowhere/run"


def composed(*overrides: str) -> DictConfig:
    """What a command line composes, YAML numbers read as the script reads them."""
    use_yaml12_numbers()
    with initialize_config_dir(str(CONFIG), version_base="1.3"):
        return compose("config", list(overrides))


def settings(*overrides: str) -> Settings:
    return validate_config(composed(*overrides, FOLDER))


def described(made: Settings) -> str:
    return dry.describe(Job(made, ""), *dry.built(made), [], [], None)


def script(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "train_app_submitit.py"), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


DATASETS = "k150 inpk150 sim150 ucf101 hmdb51 diving48 minissv2 ikea uav".split()
WIDTHS = {"vitmicro": 96, "vittiny": 192, "vitsmall": 384, "vitbase": 768, "vitlarge": 1024, "vithuge": 1280}
# Ending of a model's name -> experiment and recipe that it goes with.
KINDS = {
    "": ("omnimain_train_video", "mae_k150_config"),
    "_ft": ("omnimain_train_video_ft", "mae_ft_ucf101_config"),
    "_average_ft": ("omnimain_train_video_ensemble_ft", "mae_ft_ucf101_config"),
}
NOTHING = "pretrained_checkpoint_path=null"


class Shipped(unittest.TestCase):
    def test_every_recipe_composes_and_checks(self):
        wanted = [f"mae_{name}" for name in ("k150", "inpk150", "sim150", "inpk150_sim150")]
        wanted += [f"mae_ft_{name}" for name in (*DATASETS, "inpk150_sim150")]
        self.assertLessEqual({f"{name}_config" for name in wanted}, set(RECIPES))
        for recipe in RECIPES:
            with self.subTest(recipe):
                stage = "mae" if not recipe.startswith("mae_ft") else "finetune"
                experiments = {"mae": "omnimain_train_video", "finetune": "omnimain_train_video_ft"}
                experiment = f"demo/{stage}" if "demo" in recipe else f"omnimae/{experiments[stage]}"
                made = settings(f"+experiments={experiment}", f"+trainer={recipe}", NOTHING)
                names = recipe.removeprefix("mae_").removeprefix("ft_").removesuffix("_config").split("_")
                if "demo" not in recipe:
                    self.assertEqual(list(made.trainer.data.sources), names)
                if stage == "finetune":
                    sets = {"nohuman": "actions", "synthetic": "actions"}
                    order = list(dict.fromkeys(sets.get(name, name) for name in made.trainer.data.sources))
                    heads = {name: order.index(sets.get(name, name)) for name in made.trainer.data.sources}
                    self.assertEqual(build.labels(made).head, heads)

    def test_every_model_builds_with_its_optimizer_on_the_meta_device(self):
        self.assertEqual(set(MODELS), {width + kind for width in WIDTHS for kind in KINDS})
        for name in MODELS:
            with self.subTest(name):
                size, _, kind = name.partition("_")
                experiment, recipe = KINDS[f"_{kind}" if kind else ""]
                made = settings(
                    f"+experiments=omnimae/{experiment}", f"+trainer={recipe}", f"trainer/model={name}", NOTHING
                )
                model = build.model(made, device="meta")
                trunk = model.model.trunk if kind == "average_ft" else model.trunk
                self.assertEqual(trunk.norm.weight.shape, (WIDTHS[size],))
                optimizer = build.optimizer(made, model)
                self.assertEqual(sum(len(group.names) for group in optimizer.groups), len(list(model.parameters())))

    def test_parameters_without_a_learning_rate_are_told(self):
        checked = settings(
            "+experiments=omnimae/omnimain_train_video",
            "+trainer=mae_k150_config",
            "trainer/model=vitmicro",
            "image_size=64",
            '++trainer.optim.options.lr.0.param_names=["*.bias"]',
        )
        with self.assertRaisesRegex(UserError, r"options\.lr has no rule for \d+ parameters, \S+ for one"):
            build.optimizer(checked, build.model(checked, device="meta"))

    def test_every_checkpoint_choice_composes(self):
        choices = sorted(path.stem for path in (CONFIG / "trainer" / "checkpoint").glob("*.yaml"))
        ensembles = ["default_ensemble", "no_heads_ensemble"]
        self.assertEqual(choices, sorted(["default", "load_all", "no_heads", "no_heads_no_decoder", *ensembles]))
        for choice in choices:
            made = settings(
                "+experiments=omnimae/omnimain_train_video_ft",
                "+trainer=mae_ft_ucf101_config",
                f"trainer/checkpoint={choice}",
                NOTHING,
            )
            self.assertEqual(made.trainer.checkpoint.strict, choice == "load_all")

    def test_the_later_stages_of_the_paper(self):
        cases = {  # experiment: (models, learning rate at 0, .125 and 1 for the nominal batch)
            "omnimain_train_video_ft": ("_ft", (1e-6, 4e-3, 1e-6)),
            "omnimain_train_video_lp": ("_ft", (4e-6, 16e-3, 4e-6)),
            "omnimain_train_video_ensemble_ft": ("_average_ft", (16e-3, None, 4e-6)),
        }
        for experiment, (kind, rates) in cases.items():
            made = settings(
                f"+experiments=omnimae/{experiment}",
                "+trainer=mae_ft_hmdb51_config",
                f"trainer/model=vitbase{kind}",
                "lr_scale_factor=2",
                NOTHING,
            )
            model = build.model(made, device="meta")
            optimizer = build.optimizer(made, model)
            for progress, rate in zip((0, 0.125, 1), rates, strict=True):
                optimizer.set_progress(progress)
                if rate is not None:
                    self.assertAlmostEqual(optimizer.lr, rate / 2, places=12)
            self.assertEqual((made.trainer.max_epochs, made.trainer.data.val_clips), (30, 2))
            trained = {name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
            expected = {"_ft": {"trunk", "heads"}, "_average_ft": {"mixing_ratio", "model"}}[kind]
            self.assertEqual(trained, {"heads"} if experiment.endswith("lp") else expected)
            heads = model.model.heads if kind == "_average_ft" else model.heads
            self.assertEqual(heads[0][0].weight.shape, (51, 768))

    def test_a_peak_of_the_learning_rate_in_every_stage(self):
        def rates(*overrides: str) -> list[list[float]]:
            made = settings(*overrides, NOTHING, "image_size=32", "num_frames=4", "mixing_lr_factor=3")
            groups = build.optimizer(made, build.model(made, device="meta")).groups
            return [[group.scale, *(group.schedules["lr"](i / 200) for i in range(201))] for group in groups]

        for experiment, recipe, model, recipe_peak in (
            ("omnimain_train_video", "mae_k150_config", "vitmicro", 1.6e-3),
            ("omnimain_train_video_ft", "mae_ft_ucf101_config", "vitmicro_ft", 4e-3),
            ("omnimain_train_video_lp", "mae_ft_ucf101_config", "vitmicro_ft", 16e-3),
            ("omnimain_train_video_ensemble_ft", "mae_ft_ucf101_config", "vitmicro_average_ft", 16e-3),
        ):
            with self.subTest(experiment):
                stage = [f"+experiments=omnimae/{experiment}", f"+trainer={recipe}", f"trainer/model={model}"]
                recipes, given = rates(*stage), rates(*stage, "lr=1e-4")
                self.assertAlmostEqual(min(max(each[1:]) for each in given), 1e-4, delta=1e-12)
                self.assertEqual([each[0] for each in given], [each[0] for each in recipes], "layer decay")
                for one, other in zip(recipes, given, strict=True):
                    for then, now in zip(one[1:], other[1:], strict=True):
                        self.assertAlmostEqual(now, then * 1e-4 / recipe_peak, delta=1e-12)
                self.assertEqual(len({round(max(each[1:]), 9) for each in given}), 1 + ("ensemble" in experiment))

    def test_two_label_sets_share_a_head_only_when_told(self):
        recipe = ["+experiments=omnimae/omnimain_train_video_ft", "+trainer=mae_ft_inpk150_sim150_config", NOTHING]
        for overrides, classes in (([], [150, 150]), (["trainer.data.share_head=true"], [150])):
            made = settings(*recipe, *overrides)
            self.assertEqual(build.labels(made).classes, classes)
            self.assertEqual(len(build.model(made, device="meta").heads), len(classes))
        both = ["++trainer.data.sources.k150=${datasets.k150}"]
        self.assertEqual(build.labels(settings(*recipe, *both)).head, {"inpk150": 0, "sim150": 1, "k150": 0})

    def test_sources_of_one_head_name_its_classes_alike(self):
        recipe = ["+experiments=omnimae/omnimain_train_video_ft", "+trainer=mae_ft_inpk150_sim150_config", NOTHING]
        classes = [f"++datasets.{name}.num_classes=3" for name in ("inpk150", "sim150")]
        one_set = [f"++datasets.{name}.label_set=mine" for name in ("inpk150", "sim150")]
        with tempfile.TemporaryDirectory() as folder:
            for other, refused in (("abc", ()), ("acb", ("set", "head")), ("abd", ("set",))):
                files = []
                for name, letters in (("inpk150", "abc"), ("sim150", other)):
                    file = Path(folder, f"{name}.txt")
                    file.write_text("\n".join(letters))
                    files.append(f"++datasets.{name}.class_names={file}")
                for way, more in (("none", []), ("set", one_set), ("head", ["trainer.data.share_head=true"])):
                    made = settings(*recipe, *classes, *files, *more)
                    if way in refused:
                        with self.assertRaisesRegex(UserError, r"datasets\.sim150\.class_names"):
                            build.class_names(made)
                    else:
                        self.assertEqual(build.class_names(made)[0], list("abc"))

    def test_video_labels_and_the_catalog(self):
        recipe = ["+experiments=omnimae/omnimain_train_video_ft", "+trainer=mae_ft_ucf101_config", NOTHING]
        self.assertEqual(build.labels(settings(*recipe, "++video_labels=101")).classes, [101])
        unknown = "++datasets.ucf101.num_classes=null"
        self.assertEqual(build.labels(settings(*recipe, unknown, "++video_labels=7")).classes, [7])
        with self.assertRaisesRegex(UserError, r"datasets\.ucf101\.num_classes is 101 and video_labels is 51"):
            settings(*recipe, "++video_labels=51")
        with self.assertRaisesRegex(UserError, r"datasets.ucf101.num_classes"):
            build.labels(settings(*recipe, unknown))

    def test_the_recipe_of_the_paper(self):
        made = settings(*STAGE_1, FOLDER)
        model = build.model(made, device="meta")
        self.assertEqual((model.trunk.grid, len(model.trunk.blocks)), ((8, 14, 14), 12))
        self.assertEqual(model.heads[0].projector.weight.shape, (1536, 384))
        self.assertEqual((made.clips_per_step, made.trainer.max_epochs), (128, 200))
        optimizer = build.optimizer(made, model)
        rates = {}
        for progress in (0, 0.05, 1):
            optimizer.set_progress(progress)
            rates[progress] = optimizer.lr
        self.assertEqual(rates, {0: 5e-7, 0.05: 8e-4, 1: 0})
        self.assertEqual(optimizer.optimizer.defaults["betas"], (0.9, 0.95))
        self.assertEqual(made.trainer.distributed.comms_dtype, "auto")
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


class Stages(unittest.TestCase):
    """Experiments, recipes, models and checkpoint choices: what does not go together is refused with advice that works."""

    @classmethod
    def setUpClass(cls):
        path = "pretrained_checkpoint_path=null"
        cls.whole = {stage: settings(f"+experiments={experiment}", f"+trainer={EXAMPLE_RECIPES[stage]}", path)
                     for stage, experiment in EXPERIMENTS.items()}  # fmt: skip
        whole = {MODELS_OF[stage]: made.trainer.model for stage, made in cls.whole.items()}
        cls.kind = {name: next(kind for kind, end in ENDINGS.items() if name.endswith(end)) for name in MODELS}
        cls.models = {name: whole[kind] for name, kind in cls.kind.items()}
        cls.task = {recipe: cls.whole["finetune" if "_ft_" in recipe else "mae"].trainer.task for recipe in RECIPES}

    def refusal(self, choices: dict[str, str]) -> str:
        """What is said about these choices; settings are put together from those that were composed, to save time."""
        stage = next(stage for stage, experiment in EXPERIMENTS.items() if experiment == choices["experiments"])
        made = self.whole[stage]
        model = self.models[choices["trainer/model"]] if "trainer/model" in choices else made.trainer.model
        weights = choices.get("pretrained_checkpoint_path", "[a,b]" if stage == "average" else "run")
        source = weights.strip("[]").split(",") if "[" in weights else weights
        changed = made.with_trainer(model=model, task=self.task[choices["trainer"]])
        changed = changed.model_copy(update={"pretrained_checkpoint_path": source})
        return "".join(stage_problems(changed, choices, [CONFIG]))

    def test_a_model_of_a_class_of_the_users_own_fits_every_stage(self):
        for stage, made in self.whole.items():
            own = made.with_trainer(model={"_target_": "mine.Model"})
            self.assertEqual(stage_problems(own, {}, [CONFIG]), [], stage)

    def of_kind(self, wanted: str) -> list[str]:
        return [name for name, kind in self.kind.items() if kind == wanted]

    def test_advice_for_every_combination(self):
        wrong, followed = 0, set()
        for (stage, experiment), recipe, model in itertools.product(EXPERIMENTS.items(), RECIPES, [None, *MODELS]):
            choices = {"experiments": experiment, "trainer": recipe} | ({"trainer/model": model} if model else {})
            said = self.refusal(choices)
            right = (stage == "mae") != ("_ft_" in recipe) and model in (None, *self.of_kind(MODELS_OF[stage]))
            self.assertEqual(said == "", right, (choices, said))
            if right:
                continue
            wrong += 1
            for advice in said.rpartition("Choose ")[2].removesuffix(".").split(", or "):
                changes = dict(change.split("=", 1) for change in advice.split())
                changes = {name.lstrip("+"): value.replace("RUN", "run") for name, value in changes.items()}
                self.assertEqual(self.refusal(choices | changes), "", (choices, advice))
                followed.add(tuple((choices | changes).items()))
        self.assertGreater(wrong, 500)
        # Of what the advice leads to, one of each kind is composed and checked as a whole.
        kinds = {(each["experiments"], "trainer/model" in each): each for each in map(dict, sorted(followed))}
        for each in kinds.values():
            names = [f"{'' if '/' in name or '_path' in name else '+'}{name}={value}" for name, value in each.items()]
            if "pretrained_checkpoint_path" not in each:
                names.append(f"pretrained_checkpoint_path={'[a,b]' if 'ensemble' in each['experiments'] else 'run'}")
            settings(*names)

    def test_choices_of_another_stage_that_the_model_allows_are_warned_of(self):
        for stage, choices, key in (
            ("finetune", {"trainer/optim": "mae"}, "trainer/optim=finetune"),
            ("finetune", {"trainer/optim": "probe"}, "trainer/optim=finetune"),
            ("finetune", {"stage": "probe"}, r"\+experiments="),
            ("finetune", {"trainer/checkpoint": "default_ensemble"}, "trainer/checkpoint="),
            ("average", {"trainer/checkpoint": "no_heads"}, "trainer/checkpoint="),
        ):
            [warning] = stage_warnings(self.whole[stage], choices)
            self.assertRegex(warning, key)
        for stage, choices in (
            ("finetune", {"trainer/optim": "finetune", "trainer/checkpoint": "load_all"}),
            ("average", {"trainer/checkpoint": "no_heads_ensemble"}),
            ("mae", {}),
        ):
            self.assertEqual(stage_warnings(self.whole[stage], choices), [])

    def test_samples(self):
        for choices, advice in (
            (("omnimain_train_video_ft", "mae_k150_config"),
             "+trainer=mae_ft_k150_config, or +experiments=omnimae/omnimain_train_video"),
            (("omnimain_train_video_ft", "mae_k150_config", "vitbase"), "+experiments=omnimae/omnimain_train_video"),
            (("omnimain_train_video_ft", "mae_in1k_k150_config"), "+experiments=omnimae/omnimain_train_video"),
            (("omnimain_train_video_lp", "mae_ft_ucf101_config", "vittiny"), "trainer/model=vittiny_ft"),
            (("omnimain_train_video", "mae_ft_ucf101_config", "vitbase_average_ft"),
             "+experiments=omnimae/omnimain_train_video_ensemble_ft pretrained_checkpoint_path=[RUN,RUN]"),
            (("omnimain_train_video_ensemble_ft", "mae_sim150_config"),
             "+trainer=mae_ft_sim150_config, or +experiments=omnimae/omnimain_train_video pretrained_checkpoint_path=RUN"),
        ):  # fmt: skip
            names = ("experiments", "trainer", "trainer/model")
            said = self.refusal(dict(zip(names, (f"omnimae/{choices[0]}", *choices[1:]), strict=False)))
            self.assertTrue(said.endswith(f" Choose {advice}."), said)

    def test_every_experiment_says_its_stage(self):
        for file in CONFIG.glob("experiments/*/*.yaml"):
            if file.stem != "base":
                stage = composed(f"+experiments={file.parent.name}/{file.stem}").stage
                self.assertIn(stage, EXPERIMENTS, file)
                if file.parent.name == "demo" and file.stem != "align":
                    self.assertEqual(stage, file.stem)

    def test_masks_and_weights_of_another_stage(self):
        stage = ("+experiments=omnimae/omnimain_train_video_ft", "+trainer=mae_ft_ucf101_config", NOTHING)
        for overrides, key in (
            (["trainer/data=unlabelled_video"], "trainer/data=labelled_video"),
            (["pretrained_checkpoint_path=[a,b]"], "omnimain_train_video_ensemble_ft"),
            (["trainer/optim=average"], "trainer/optim=finetune"),
        ):
            self.assertRaisesRegex(UserError, key, settings, *stage, *overrides)


class Script(unittest.TestCase):
    def test_answers_at_once_and_without_torch(self):
        for arguments in (["--help"], ["--cfg", "job"]):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            result = script(*arguments)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            self.assertEqual(result.returncode, 0, result.stderr)
            self.assertIn("lr_scale_factor: 1", result.stdout)
            # Of the processor, which does not depend on who else works on this machine.
            self.assertLess(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1.5, arguments)
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

    def test_the_page_of_settings_names_every_setting(self):
        """Also the arguments of the objects that a run builds, with their values and meanings."""
        text = (ROOT / "docs/settings.md").read_text()
        for line in (
            "| `trainer.task.mixing.mixup_alpha` | `float` | `0.8` | the share",
            "| `trainer.model.trunk.drop_path` | `float` | `0",
            "| `trainer.optim.options.lr.0.scheduler.warmup` | `float` | `0.125` |",
            "| `trainer.data.view.rand_augment.magnitude` | `float` | `7` | mean strength",
            "| `trainer.data.view.scale` | `tuple[float, float]` | ",
        ):
            self.assertIn(line, text)
        data = ["+trainer=mae_ft_ucf101_config", "+trainer=mae_in1k_k150_config"]
        for experiment, recipe in (("_ft", data[0]), ("_ensemble_ft", data[0]), ("", data[1])):
            made = composed(f"+experiments=omnimae/omnimain_train_video{experiment}", recipe, NOTHING, FOLDER)
            del made.datasets, made.trainer.data.sources, made.data_root
            for name in flat(OmegaConf.to_container(made, resolve=False)):
                last = name.rpartition(".")[2]
                if last != "_target_" and ".options." not in name and not name.startswith("trainer.optim.optimizer."):
                    self.assertTrue(re.search(rf"\b({re.escape(name)}|{last})`", text), name)

    def test_dry_tells_what_the_run_would_be_and_touches_nothing(self):
        made = settings(*STAGE_1, FOLDER)
        text = described(made)
        self.assertRegex(text, r"94\.\d+ M parameters")
        self.assertRegex(text, r"128 clips a step = 32 videos x 4 views, over 8 processes")
        self.assertIn("lr 5e-07 -> peak 0.0008 -> 0", text)
        self.assertRegex(text, r"\d+\.\d+ GFLOPs")
        self.assertEqual(text.count("tensors, "), 2)
        self.assertFalse(os.path.exists("/nowhere"))
        [line] = [line for line in text.splitlines() if line.startswith("lr ")]
        curve = line.split()[1]
        self.assertEqual((len(curve), curve[0], curve[-1]), (dry.WIDTH, dry.BLOCKS[0], dry.BLOCKS[0]))
        self.assertEqual(curve.index(dry.BLOCKS[-1]), curve.find(dry.BLOCKS[-1]))
        peak = curve.index(dry.BLOCKS[-1]) / dry.WIDTH
        self.assertLess(abs(peak - 0.05), 0.05, "warm-up takes a twentieth")
        self.assertRegex(text, r"weight_decay ▅{60}  epoch 0 to 200: 0.05 \(group 0\)")
        self.assertRegex(text, r"weight_decay ▁{60}  epoch 0 to 200: 0 \(group 1\)")

    def test_dry_tells_the_size_of_weights_in_a_run_folder(self):
        with tempfile.TemporaryDirectory() as name:
            (Path(name) / "checkpoints").mkdir()
            (Path(name) / "checkpoints/best.pt").write_bytes(bytes(5_000_000))
            made = settings(*STAGE_1, FOLDER, f"pretrained_checkpoint_path={name}")
            self.assertEqual(
                dry.weights_lines(Job(made, ""), None), [f"weights      from {name}/checkpoints/best.pt, 5.0 MB"]
            )

    def test_dry_refuses_views_and_masks_that_cannot_be(self):
        for wrong, saying in (
            ("++trainer.data.view.scale=[1,0.2]", "trainer.data.view.scale"),
            ("trainer.data.mask.ratio=2", "mask_ratio must"),
        ):
            with self.assertRaisesRegex(UserError, saying):
                dry.built(settings(*STAGE_1, FOLDER, wrong))

    def test_dry_tells_the_scale_of_each_group(self):
        made = settings(
            "+experiments=omnimae/omnimain_train_video_ft", "+trainer=mae_ft_ucf101_config", FOLDER, NOTHING
        )
        text = described(made)
        self.assertRegex(
            text,
            r"4 tensors, 7\.08 M parameters; lr x 0\.75: 7\.5e-07 -> peak 0\.003 -> 7\.5e-07; weight_decay 0\.0001",
        )

    def test_dry_counts_samples_files_and_steps_and_draws(self):
        with tempfile.TemporaryDirectory() as name:
            data = runs.write_split(Path(name), runs.real_films() * 16 + ["/gone.mp4"] * 16)
            script_made = script(*STAGE_1, *data, f"launcher.experiment_log_dir={name}/run", "submitit.use_cluster=true",
                                 "batch_size=8", "epochs=3", "trainer.mode=dry")  # fmt: skip
            self.assertIn(script_made.returncode, (0, 1))  # 0 where a cluster would take it
            self.assertEqual(script_made.stderr, "")
            self.assertRegex(script_made.stdout, r"k150, train: 64 samples; 12 of 16 sampled files exist")
            self.assertRegex(script_made.stdout, r"steps +1 an epoch x 3 epochs = 3")
            self.assertIn("#SBATCH --nodes=8", script_made.stdout)
            self.assertEqual(os.listdir(f"{name}/run"), ["dry.png"])
            with Image.open(f"{name}/run/dry.png") as picture:
                self.assertGreater(picture.width, 500)

    def test_dry_of_every_stage(self):
        for kind, (experiment, recipe) in KINDS.items():
            made = settings(
                f"+experiments=omnimae/{experiment}", f"+trainer={recipe}", f"trainer/model=vittiny{kind}", NOTHING
            )
            self.assertRegex(described(made), r"GFLOPs a clip")
        probe = settings("+experiments=omnimae/omnimain_train_video_lp", "+trainer=mae_ft_ucf101_config", NOTHING)
        self.assertRegex(described(probe), r"frozen +86\.\d+ M parameters: a forward pass alone")

    def test_flops_are_those_of_the_layers(self):
        made = settings(*STAGE_1, FOLDER)
        visible, tokens, width, small = 157, 1568, 768, 384

        def block(n, d):
            return 24 * n * d * d + 4 * n * n * d

        expected = 12 * block(visible, width) + 4 * block(tokens, small)
        expected += 2 * visible * 1536 * width + 2 * tokens * width * small + 2 * 1411 * small * 1536
        self.assertAlmostEqual(
            build.clip_cost(made, build.model(made, "meta")).forward_flops / 1e9, expected / 1e9, delta=0.01
        )


if __name__ == "__main__":
    unittest.main()
