"""Operations of a clip are counted right, and peaks are found by the names of devices."""

import unittest
from pathlib import Path

import torch

from omnivision.config.validate import validate_config
from omnivision.training import build
from omnivision.training import flops as utilisation
from tests import stage_runs as stages

WIDTH, DEPTH = 96, 2  # of vitmicro
TOKENS = 4 * 4  # of 4 frames of 32 x 32 in tubelets of 4 x 8 x 8


def settings_of(stage: str, *overrides: str):
    dataset = "k150" if stage == "mae" else "ucf101"
    return validate_config(stages.composed(*stages.command(stage, Path("/nowhere"), *overrides, dataset=dataset)))


class Operations(unittest.TestCase):
    def test_a_trained_model_costs_three_times_its_forward_pass(self):
        settings = settings_of("ft", "pretrained_checkpoint_path=null", "++datasets.ucf101.num_classes=3")
        model = build.model(settings, device="meta")
        cost = build.clip_cost(settings, model)
        forward, both = cost.forward_flops, cost.step_flops
        linear = 2 * TOKENS * DEPTH * 12 * WIDTH**2  # qkv, output, two of the MLP of four times the width
        attention = 2 * 2 * DEPTH * TOKENS**2 * WIDTH
        patches = 2 * TOKENS * WIDTH * 3 * 4 * 8 * 8
        self.assertAlmostEqual(forward / (linear + attention + patches), 1, delta=0.01)
        self.assertAlmostEqual(
            both / forward, 3, delta=0.35
        )  # pixels need no gradient; attention recomputes its scores

    def test_a_frozen_trunk_has_no_backward_pass(self):
        settings = settings_of("lp", "pretrained_checkpoint_path=null", "++datasets.ucf101.num_classes=3")
        model = build.model(settings, device="meta")
        cost = build.clip_cost(settings, model)
        forward, both = cost.forward_flops, cost.step_flops
        self.assertLess(both, 1.01 * forward)

    def test_what_is_kept_for_the_backward_pass(self):
        """As much as a real step keeps, each tensor once; checkpointed blocks keep less, a frozen trunk next to nothing."""
        bytes_of = {}
        for stage, more in (("ft", ()), ("ft", ("++trainer.model.trunk.activation_checkpointing=true",)), ("lp", ())):
            settings = settings_of(stage, "pretrained_checkpoint_path=null", "++datasets.ucf101.num_classes=3", *more)
            bytes_of[stage, more] = build.clip_cost(settings, build.model(settings, device="meta")).kept_bytes
        whole, checkpointed, frozen = bytes_of.values()
        self.assertGreater(whole, 4 * DEPTH * TOKENS * 12 * WIDTH)  # inputs of the matmuls and of the activation
        self.assertLess(checkpointed, 0.6 * whole)
        self.assertLess(frozen, 0.1 * whole)

    def test_what_a_mask_hides_is_not_embedded(self):
        costs = []
        for ratio in (0.5, 0.9):
            settings = settings_of("mae", f"mask_ratio={ratio}", "image_size=64")
            costs.append(build.clip_cost(settings, build.model(settings, device="meta")).step_flops)
        self.assertGreater(costs[0], 1.1 * costs[1])


class Peaks(unittest.TestCase):
    def test_by_name(self):
        for name, dtype, expected in (
            ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312),
            ("NVIDIA A100-SXM4-80GB", None, 19.5),
            ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989),
            ("NVIDIA H100 PCIe", torch.float16, 756),
            ("Tesla V100-SXM2-32GB", torch.float16, 125),
            ("NVIDIA A10G", torch.bfloat16, 70),
            ("NVIDIA A40", torch.bfloat16, 149.7),
            ("NVIDIA L40S", torch.bfloat16, 362),
        ):
            self.assertEqual(utilisation.peak_of(name, dtype), 1e12 * expected, name)
        for name in ("Some Card 9000", "NVIDIA RTX A4000", "NVIDIA RTX A1000", "NVIDIA T400"):
            self.assertIsNone(utilisation.peak_of(name, torch.bfloat16), name)

    def test_nobody_knows_a_cpu(self):
        self.assertIsNone(utilisation.peak_flops(torch.device("cpu"), None, None))
        self.assertEqual(utilisation.peak_flops(torch.device("cpu"), None, 2.0), 2e12)

    def test_full_speed(self):
        settings = settings_of("mae", "trainer.logging.peak_tflops=1")
        flops = build.clip_cost(settings, build.model(settings, device="meta")).step_flops
        self.assertEqual(build.peak_clips_per_second(settings, torch.device("cpu")), 1e12 / flops)
        settings.trainer.logging.peak_tflops = None
        self.assertIsNone(build.peak_clips_per_second(settings, torch.device("cpu")))


if __name__ == "__main__":
    unittest.main()
