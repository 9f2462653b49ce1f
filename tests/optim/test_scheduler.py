"""Schedules and parameter groups: the published figures, and a test for each rule."""

import functools
import subprocess
import sys
import unittest

import torch
from fvcore.common.param_scheduler import CosineParamScheduler
from torch import nn

from omnivision.config.schema import RuleSettings
from omnivision.models.mae import MaskedAutoencoder
from omnivision.models.vit import VisionTransformer
from omnivision.optim.groups import ParamGroup, ScheduledOptimizer, layer_decay_scales, parameter_groups
from omnivision.optim.schedules import Constant, Cosine, Linear, Scaled, SequentialSchedule, WarmupCosine
from omnivision.utils.errors import UserError
from tests.parity_formula import record
from tests.runs import ROOT

NORM = "torch.nn.LayerNorm"


def rule(schedule, names: list[str] | None = None, classes: list[str] | None = None) -> tuple:
    return schedule, RuleSettings(scheduler={"_target_": "any"}, param_names=names, module_cls_names=classes)


def make_groups(model: nn.Module, scales: dict[str, float] | None = None, **options: list[tuple]) -> list[ParamGroup]:
    schedules, rules = ({option: [each[i] for each in given] for option, given in options.items()} for i in (0, 1))
    return parameter_groups(model, rules, schedules, scales and {"lr": scales})


class Schedules(unittest.TestCase):
    def test_published_recipes_with_one_division_and_continuous_phases(self):
        recorded = record("schedules")
        # start, peak, end, warm-up of each recipe
        recipes = {
            "1_mae_pretraining": (1e-6, 1.6e-3, 0, 0.05),
            "2_align": (1e-6, 4e-3, 1e-6, 0.125),
            "3_downstream_finetune": (1e-6, 4e-3, 1e-6, 0.125),
            "4_downstream_linear_probe": (4e-6, 16e-3, 4e-6, 0.125),
        }
        compared = 0
        for name, arguments in recipes.items():
            for case in recorded["recipes"][name]["schedules"]:
                if case["variant"] == "one division, every phase rescaled to its own interval (continuous)":
                    curve = Scaled(WarmupCosine(*arguments), 1 / case["lr_scale_factor"])
                    for where, expected in zip(recorded["where"], case["lr"], strict=True):
                        self.assertAlmostEqual(curve(where) / expected, 1, delta=1e-9, msg=f"{name} at {where}")
                        compared += 1
        self.assertEqual(compared, 4 * 2 * len(recorded["where"]))

    def test_values(self):
        warmup = WarmupCosine(1e-6, 1.6e-3, 0, 0.05)
        self.assertAlmostEqual(warmup(0.05 - 1e-5), warmup(0.05), delta=1e-6)
        self.assertEqual(max(range(1001), key=lambda i: warmup(i / 1000)), 50)
        steps = SequentialSchedule([Constant(1), Constant(2), Constant(3)], [0.1, 0.2, 0.7])
        halves = SequentialSchedule([Linear(0, 1), Cosine(1, 0)], [0.5, 0.5])
        for curve, points in (
            (warmup, {0: 1e-6, 1: 0}),
            (WarmupCosine(5, 2, 1, 0), {0: 2}),
            (halves, {0.25: 0.5, 0.75: 0.5}),  # each is stretched over its share
            (steps, {0.0999: 1, 0.1: 2, 0.1 + 0.2 - 1e-9: 3, 0.3: 3, 1: 3}),  # a boundary belongs to the later phase
        ):
            for progress, value in points.items():
                self.assertAlmostEqual(curve(progress), value, places=12)

    def test_invalid_shares_are_refused(self):
        for shares in ([0.5], [0.5, 0.6], [-0.5, 1.5], [1.0, 0.0]):
            with self.assertRaisesRegex(UserError, "shares"):
                SequentialSchedule([Constant(1), Constant(2)], shares)


class OwnNorm(nn.LayerNorm):
    """A subclass is another class."""


def model() -> nn.Module:
    parts = {
        "a": nn.Linear(2, 2),
        "norm": nn.LayerNorm(2),
        "own": OwnNorm(2),
        "b": nn.Linear(2, 2),
        "head": nn.Linear(2, 1),
    }
    return nn.ModuleDict(parts)


def named(groups: list[ParamGroup], option: str) -> dict[str, object]:
    """The value that each parameter starts with, None where the option is not set."""
    return {n: g.schedules[option](0) if option in g.schedules else None for g in groups for n in g.names}


class Groups(unittest.TestCase):
    def test_patterns_and_exact_classes_are_united(self):
        groups = make_groups(model(), weight_decay=[rule(Constant(1)), rule(Constant(0), ["*.bias"], [NORM])])
        zero = {name for name, value in named(groups, "weight_decay").items() if value == 0}
        self.assertEqual(zero, {"a.bias", "b.bias", "head.bias", "own.bias", "norm.bias", "norm.weight"})

    def test_groups_are_intersections_and_hold_each_trained_parameter_once(self):
        network = model()
        network["a"].requires_grad_(False)
        groups = make_groups(
            network,
            lr=[rule(Constant(1)), rule(Constant(2), ["head.*"])],
            weight_decay=[rule(Constant(3)), rule(Constant(0), ["*.bias"])],
        )
        names = sorted(name for group in groups for name in group.names)
        self.assertEqual(names, sorted(name for name, p in network.named_parameters() if p.requires_grad))
        pairs = {(g.schedules["lr"](0), g.schedules["weight_decay"](0)): set(g.names) for g in groups}
        self.assertEqual(set(pairs), {(1, 3), (1, 0), (2, 3), (2, 0)})
        self.assertEqual(pairs[2, 0], {"head.bias"})

    def test_without_a_default_the_rest_keep_the_optimizers_own_value(self):
        network = model()
        groups = make_groups(network, weight_decay=[rule(Constant(0.5), ["a.*"])])
        self.assertIsNone(named(groups, "weight_decay")["b.weight"])
        optimizer = ScheduledOptimizer(network, groups, lambda params: torch.optim.AdamW(params, weight_decay=0.25))
        decays = {len(g["params"]): g["weight_decay"] for g in optimizer.optimizer.param_groups}
        self.assertEqual(decays, {2: 0.5, 8: 0.25})

    def test_invalid_rules_are_refused(self):
        for where, rules in (
            (r"options\.lr .*param_names", [rule(Constant(1)), rule(Constant(2))]),
            (r"options\.lr.*both match a\.bias", [rule(Constant(1), ["a.*"]), rule(Constant(2), ["*.bias"])]),
            (r"options\.lr\[0\]\.param_names: '\*\.biass'", [rule(Constant(0), ["a.*", "*.biass"])]),
            *(
                (rf"options\.lr\[0\]\.module_cls_names: '{name}'", [rule(Constant(0), None, [name])])
                for name in ("torch.nn.BatchNorm1d", "torch.nn.LayerNrom", "LayerNorm", "os.system")
            ),
        ):
            with self.subTest(where), self.assertRaisesRegex(UserError, where):
                make_groups(model(), lr=rules)

    def test_invalid_optimizers_are_refused(self):
        groups = make_groups(model(), momentumm=[rule(Constant(0))])
        with self.assertRaisesRegex(UserError, "trainer.optim.options.*momentumm"):
            ScheduledOptimizer(model(), groups, torch.optim.AdamW)
        groups = make_groups(model(), lr=[rule(Constant(1.0))])
        for arguments in ({"betas": [0.9]}, {"beta": 1}, {"eps": -1.0}, {"fused": True, "foreach": True}):
            with self.subTest(arguments), self.assertRaisesRegex(UserError, "trainer.optim.optimizer"):
                ScheduledOptimizer(model(), groups, functools.partial(torch.optim.AdamW, **arguments))

    def test_values_follow_progress_and_any_callable_will_do(self):
        network = model()
        groups = make_groups(network, lr=[rule(Linear(0, 1))], weight_decay=[rule(CosineParamScheduler(1.0, 0.0))])
        optimizer = ScheduledOptimizer(network, groups, torch.optim.AdamW)
        self.assertEqual(optimizer.lr, 0)
        optimizer.set_progress(0.5)
        self.assertEqual(optimizer.lr, 0.5)
        self.assertAlmostEqual(optimizer.optimizer.param_groups[0]["weight_decay"], 0.5)


class PublishedGroups(unittest.TestCase):
    def published(self, depth: int = 2) -> MaskedAutoencoder:
        trunk = VisionTransformer(48, depth, 3, num_frames=4, image_size=32, tubelet=(2, 8, 8))
        return MaskedAutoencoder(trunk, {"width": 24, "depth": 2, "heads": 4})

    def test_weight_decay_of_the_mae_recipe(self):
        recorded = record("weight_decay")["recipes"]["1_mae_pretraining"]
        groups = make_groups(
            self.published(), weight_decay=[rule(Constant(0.05)), rule(Constant(0), ["*.bias"], [NORM])]
        )
        self.assertEqual(len(groups), recorded["number_of_param_groups"])
        values = named(groups, "weight_decay")
        self.assertEqual({n for n, v in values.items() if v == 0}, set(recorded["not_decayed"]))
        self.assertEqual({n for n, v in values.items() if v == 0.05}, set(recorded["decayed"]))

    def test_layer_decay_follows_beit_and_scales_learning_rates_alone(self):
        recorded = record("schedules")["layer_decay_multipliers"]
        for table in recorded["tables"]:
            scales = layer_decay_scales(self.published(table["depth"]), recorded["layer_decay"])
            for name, _, beit in table["rows"]:
                if name in scales:
                    self.assertAlmostEqual(scales[name], beit, places=12, msg=name)
            self.assertEqual(scales["heads.0.projector.weight"], 1.0)
        network = self.published()
        groups = make_groups(
            network, layer_decay_scales(network, 0.5), lr=[rule(Constant(1))], weight_decay=[rule(Constant(1))]
        )
        optimizer = ScheduledOptimizer(network, groups, torch.optim.AdamW)
        self.assertEqual({g["lr"] for g in optimizer.optimizer.param_groups}, {1.0, 0.5, 0.25, 0.125})
        self.assertEqual({g["weight_decay"] for g in optimizer.optimizer.param_groups}, {1.0})
        self.assertEqual(optimizer.lr, 1.0)

    def test_a_step_does_not_import_the_compiler(self):
        program = (
            "import sys, torch; from omnivision.optim.groups import ParamGroup, ScheduledOptimizer; "
            "model = torch.nn.Linear(1, 1); model(torch.ones(1)).backward(); groups = [ParamGroup(['weight', 'bias'])]; "
            "ScheduledOptimizer(model, groups, torch.optim.AdamW).step(torch.tensor(False)); "
            "sys.exit('torch._dynamo' in sys.modules)"
        )
        self.assertEqual(subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode, 0)


if __name__ == "__main__":
    unittest.main()
