"""Operations of a clip are counted right, and peaks are found by the names of devices."""

import unittest
from pathlib import Path

import torch

from omnivision.config.validate import validate_config
from omnivision.training import build, flops
from tests import stage_runs as stages

WIDTH, DEPTH = 96, 2  # of vitmicro
TOKENS = 4 * 4  # of 4 frames of 32 x 32 in tubelets of 4 x 8 x 8

LABELLED = ("pretrained_checkpoint_path=null", "++datasets.ucf101.num_classes=3")


def settings_of(stage: str, *overrides: str):
    dataset = "k150" if stage == "mae" else "ucf101"
    return validate_config(stages.compose_config(*stages.command(stage, Path("/nowhere"), *overrides, dataset=dataset)))


def cost_of(stage: str, *overrides: str) -> flops.ClipFlops:
    settings = settings_of(stage, *overrides)
    return build.measure_clip_cost(settings, build.build_model(settings, device="meta"))


class Operations(unittest.TestCase):
    def test_forward_and_backward_flops(self):
        """A trained model costs three times its forward pass; a frozen trunk has no backward pass."""
        cost = cost_of("ft", *LABELLED)
        linear = 2 * TOKENS * DEPTH * 12 * WIDTH**2  # qkv, output, two of the MLP of four times the width
        attention = 2 * 2 * DEPTH * TOKENS**2 * WIDTH
        patches = 2 * TOKENS * WIDTH * 3 * 4 * 8 * 8
        self.assertAlmostEqual(cost.forward_flops / (linear + attention + patches), 1, delta=0.01)
        # Pixels need no gradient; attention recomputes its scores.
        self.assertAlmostEqual(cost.step_flops / cost.forward_flops, 3, delta=0.35)
        frozen = cost_of("lp", *LABELLED)
        self.assertLess(frozen.step_flops, 1.01 * frozen.forward_flops)

    def test_activation_bytes(self):
        """As much as a real step keeps, each tensor once; checkpointed blocks keep less, a frozen trunk next to nothing."""
        whole = cost_of("ft", *LABELLED).activation_bytes
        self.assertGreater(whole, 4 * DEPTH * TOKENS * 12 * WIDTH)  # inputs of the matmuls and of the activation
        checkpointed = cost_of("ft", *LABELLED, "++trainer.model.trunk.activation_checkpointing=true")
        self.assertLess(checkpointed.activation_bytes, 0.6 * whole)
        self.assertLess(cost_of("lp", *LABELLED).activation_bytes, 0.1 * whole)

    def test_hidden_tokens_cost_nothing_to_embed(self):
        few, many = (cost_of("mae", f"mask_ratio={ratio}", "image_size=64").step_flops for ratio in (0.9, 0.5))
        self.assertGreater(many, 1.1 * few)


class Peaks(unittest.TestCase):
    def test_peak_flops_by_device_name(self):
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
            self.assertEqual(flops.peak_flops_by_name(name, dtype), 1e12 * expected, name)
        for name in ("Some Card 9000", "NVIDIA RTX A4000", "NVIDIA RTX A1000", "NVIDIA T400"):
            self.assertIsNone(flops.peak_flops_by_name(name, torch.bfloat16), name)

    def test_peak_from_the_settings(self):
        self.assertIsNone(flops.peak_flops(torch.device("cpu"), None, None))
        settings = settings_of("mae", "trainer.logging.peak_tflops=1")
        speed = build.estimate_peak_clips_per_second(settings, torch.device("cpu"))
        self.assertEqual(speed, 1e12 / cost_of("mae").step_flops)
        settings.trainer.logging.peak_tflops = None
        self.assertIsNone(build.estimate_peak_clips_per_second(settings, torch.device("cpu")))


if __name__ == "__main__":
    unittest.main()
