"""Schedules and parameter groups: the published figures, and a test for each sentence of the rules."""

import functools
import unittest

import torch
from fvcore.common.param_scheduler import CosineParamScheduler
from torch import nn

from omnivision.models.mae import MaskedAutoencoder
from omnivision.models.vit import VisionTransformer
from omnivision.optim.groups import Rule, ScheduledOptimizer, layer_decay_scales, parameter_groups
from omnivision.optim.schedules import Constant, Cosine, Linear, Scaled, SequentialSchedule, WarmupCosine
from omnivision.utils.errors import UserError
from tests.parity_formula import record


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

    def test_the_curve_is_continuous_where_phases_meet(self):
        curve = WarmupCosine(1e-6, 1.6e-3, 0, 0.05)
        self.assertAlmostEqual(curve(0.05 - 1e-5), curve(0.05), delta=1e-6)
        self.assertEqual((curve(0), curve(1)), (1e-6, 0.0))
        self.assertEqual(max(range(1001), key=lambda i: curve(i / 1000)), 50)

    def test_a_boundary_belongs_to_the_later_phase_in_spite_of_rounding(self):
        curve = SequentialSchedule([Constant(1), Constant(2), Constant(3)], [0.1, 0.2, 0.7])
        values = [curve(p) for p in (0.0999, 0.1, 0.1 + 0.2 - 1e-9, 0.3, 1.0)]
        self.assertEqual(values, [1, 2, 3, 3, 3])

    def test_without_warm_up(self):
        self.assertEqual(WarmupCosine(5, 2, 1, 0)(0), 2)

    def test_phases_stretch_over_their_share(self):
        curve = SequentialSchedule([Linear(0, 1), Cosine(1, 0)], [0.5, 0.5])
        self.assertAlmostEqual(curve(0.25), 0.5)
        self.assertAlmostEqual(curve(0.75), 0.5)

    def test_shares_that_make_no_sense(self):
        for shares in ([0.5], [0.5, 0.6], [-0.5, 1.5], [1.0, 0.0]):
            with self.assertRaisesRegex(UserError, "shares"):
                SequentialSchedule([Constant(1), Constant(2)], shares)
        with self.assertRaisesRegex(UserError, "warmup"):
            WarmupCosine(0, 1, 0, 1.0)


class OwnNorm(nn.LayerNorm):
    """A subclass is another class."""


def model() -> nn.Module:
    return nn.ModuleDict(
        {
            "a": nn.Linear(2, 2),
            "norm": nn.LayerNorm(2),
            "own": OwnNorm(2),
            "b": nn.Linear(2, 2),
            "head": nn.Linear(2, 1),
        }
    )


def named(groups: list, option: str) -> dict[str, object]:
    """The value that each parameter starts with, None where the option is not set."""
    return {n: g.schedules[option](0) if option in g.schedules else None for g in groups for n in g.names}


class Groups(unittest.TestCase):
    def test_patterns_and_classes_are_united(self):
        rules = [Rule(Constant(1)), Rule(Constant(0), ["*.bias"], ["torch.nn.LayerNorm"])]
        values = named(parameter_groups(model(), {"weight_decay": rules}), "weight_decay")
        zero = {name for name, value in values.items() if value == 0}
        self.assertEqual(zero, {"a.bias", "b.bias", "head.bias", "own.bias", "norm.bias", "norm.weight"})

    def test_a_class_is_matched_exactly(self):
        rules = [Rule(Constant(1)), Rule(Constant(0), module_cls_names=["torch.nn.LayerNorm"])]
        values = named(parameter_groups(model(), {"weight_decay": rules}), "weight_decay")
        self.assertEqual(values["own.weight"], 1)
        self.assertEqual(values["norm.weight"], 0)

    def test_groups_are_intersections_and_hold_each_parameter_once(self):
        options = {
            "lr": [Rule(Constant(1)), Rule(Constant(2), ["head.*"])],
            "weight_decay": [Rule(Constant(3)), Rule(Constant(0), ["*.bias"])],
        }
        groups = parameter_groups(model(), options)
        found = [name for group in groups for name in group.names]
        self.assertEqual(sorted(found), sorted(name for name, _ in model().named_parameters()))
        pairs = {(g.schedules["lr"](0), g.schedules["weight_decay"](0)): set(g.names) for g in groups}
        self.assertEqual(set(pairs), {(1, 3), (1, 0), (2, 3), (2, 0)})
        self.assertEqual(pairs[2, 0], {"head.bias"})

    def test_two_defaults_are_refused(self):
        with self.assertRaisesRegex(UserError, r"options\.lr .*param_names"):
            parameter_groups(model(), {"lr": [Rule(Constant(1)), Rule(Constant(2))]})

    def test_without_a_default_the_rest_keep_the_optimizers_own_value(self):
        made = model()
        groups = parameter_groups(made, {"weight_decay": [Rule(Constant(0.5), ["a.*"])]})
        self.assertIsNone(named(groups, "weight_decay")["b.weight"])
        optimizer = ScheduledOptimizer(made, groups, lambda params: torch.optim.AdamW(params, weight_decay=0.25))
        decays = {len(g["params"]): g["weight_decay"] for g in optimizer.optimizer.param_groups}
        self.assertEqual(decays, {2: 0.5, 8: 0.25})

    def test_a_pattern_that_matches_nothing_is_named_with_its_option(self):
        for rule in (Rule(Constant(0), ["*.biass"]), Rule(Constant(0), ["a.*", "*.biass"])):
            with self.assertRaisesRegex(UserError, r"options\.weight_decay\[0\]\.param_names: '\*\.biass'"):
                parameter_groups(model(), {"weight_decay": [rule]})

    def test_a_class_that_does_not_occur_or_does_not_exist(self):
        for name in ("torch.nn.BatchNorm1d", "torch.nn.LayerNrom", "os.system"):
            with self.assertRaisesRegex(UserError, f"module_cls_names.*{name}"):
                parameter_groups(model(), {"lr": [Rule(Constant(0), module_cls_names=[name])]})

    def test_two_rules_that_overlap_are_named(self):
        rules = [Rule(Constant(1), ["a.*"]), Rule(Constant(2), ["*.bias"])]
        with self.assertRaisesRegex(UserError, r"options\.lr: rules 0 and 1 both match a\.bias"):
            parameter_groups(model(), {"lr": rules})

    def test_an_option_that_the_optimizer_does_not_know(self):
        groups = parameter_groups(model(), {"momentumm": [Rule(Constant(0))]})
        with self.assertRaisesRegex(UserError, "trainer.optim.options.*momentumm"):
            ScheduledOptimizer(model(), groups, torch.optim.AdamW)

    def test_arguments_that_the_optimizer_does_not_take(self):
        groups = parameter_groups(model(), {"lr": [Rule(Constant(1.0))]})
        for arguments in ({"betas": [0.9]}, {"beta": 1}, {"eps": -1.0}, {"fused": True, "foreach": True}):
            with self.subTest(arguments), self.assertRaisesRegex(UserError, "trainer.optim.optimizer cannot be built"):
                ScheduledOptimizer(model(), groups, functools.partial(torch.optim.AdamW, **arguments))

    def test_frozen_parameters_are_in_no_group(self):
        made = model()
        made["a"].requires_grad_(False)
        names = [n for g in parameter_groups(made, {"lr": [Rule(Constant(1))]}) for n in g.names]
        self.assertEqual(len(names), 8)
        self.assertNotIn("a.weight", names)

    def test_values_follow_progress_and_any_callable_will_do(self):
        made = model()
        rules = {"lr": [Rule(Linear(0, 1))], "weight_decay": [Rule(CosineParamScheduler(1.0, 0.0))]}
        optimizer = ScheduledOptimizer(made, parameter_groups(made, rules), torch.optim.AdamW)
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
        rules = [Rule(Constant(0.05)), Rule(Constant(0), ["*.bias"], ["torch.nn.LayerNorm"])]
        groups = parameter_groups(self.published(), {"weight_decay": rules})
        self.assertEqual(len(groups), recorded["number_of_param_groups"])
        values = named(groups, "weight_decay")
        self.assertEqual({n for n, v in values.items() if v == 0}, set(recorded["not_decayed"]))
        self.assertEqual({n for n, v in values.items() if v == 0.05}, set(recorded["decayed"]))

    def test_layer_decay_follows_beit(self):
        recorded = record("schedules")["layer_decay_multipliers"]
        for table in recorded["tables"]:
            scales = layer_decay_scales(self.published(table["depth"]), recorded["layer_decay"])
            for name, _, beit in table["rows"]:
                if name in scales:
                    self.assertAlmostEqual(scales[name], beit, places=12, msg=name)
            self.assertEqual(scales["heads.0.projector.weight"], 1.0)

    def test_layer_decay_scales_learning_rates_alone(self):
        made = self.published()
        rules = {"lr": [Rule(Constant(1.0))], "weight_decay": [Rule(Constant(1.0))]}
        groups = parameter_groups(made, rules, layer_decay_scales(made, 0.5))
        optimizer = ScheduledOptimizer(made, groups, torch.optim.AdamW)
        self.assertEqual({g["lr"] for g in optimizer.optimizer.param_groups}, {1.0, 0.5, 0.25, 0.125})
        self.assertEqual({g["weight_decay"] for g in optimizer.optimizer.param_groups}, {1.0})
        self.assertEqual(optimizer.lr, 1.0)


if __name__ == "__main__":
    unittest.main()
