"""Muon beside timm's, and what it refuses."""

import copy
import functools
import unittest
from unittest import mock

import torch
from timm.optim import muon as timm_muon
from torch import nn

from omnivision.optim.muon import Muon, orthogonalize


class MuonTest(unittest.TestCase):
    def test_trains_as_timm_in_float32(self):
        def train(optimizer: type[torch.optim.Optimizer], **options: object) -> list[torch.Tensor]:
            torch.manual_seed(0)
            parts = (
                nn.Conv3d(3, 8, (2, 4, 4)),
                nn.Flatten(),
                nn.LayerNorm(8),
                nn.Linear(8, 32),
                nn.GELU(),
                nn.Linear(32, 6),
            )
            model = nn.Sequential(*parts)
            stepper = optimizer(model.parameters(), lr=1e-2, weight_decay=0.05, **options)
            for clips in torch.randn(20, 16, 3, 2, 4, 4):
                model(clips).square().mean().backward()
                stepper.step()
                stepper.zero_grad()
            return [parameter.detach() for parameter in model.parameters()]

        iterate = functools.partial(timm_muon.zeropower_via_newtonschulz, dtype=torch.float32)
        with mock.patch.object(timm_muon, "zeropower_via_newtonschulz", iterate):
            expected = train(timm_muon.Muon, nesterov=True)
        for own, other in zip(train(Muon), expected, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)

    def test_resumes_exactly(self):
        def train(weights: list[torch.Tensor], optimizer: Muon, steps: range) -> None:
            for step in steps:
                for weight in weights:
                    weight.grad = torch.sin(weight.detach() * (step + 1))
                optimizer.step()

        start = [torch.linspace(-1, 1, 12).reshape(3, 4), torch.linspace(-1, 1, 5)]
        whole = [nn.Parameter(weight.clone()) for weight in start]
        optimizer = Muon(whole, weight_decay=0.1)
        train(whole, optimizer, range(5))
        resumed = [nn.Parameter(weight.detach().clone()) for weight in whole]
        other = Muon(resumed)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(whole, optimizer, range(5, 10))
        train(resumed, other, range(5, 10))
        for weight, expected in zip(resumed, whole, strict=True):
            self.assertTrue(weight.equal(expected))

    def test_orthogonalizes_wide_tall_and_zero_matrices(self):
        torch.manual_seed(0)
        for shape in ((20, 60), (60, 20)):
            values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)))
            self.assertTrue(0.9 < values.min() and values.max() < 1.1, values)
        self.assertTrue((orthogonalize(torch.zeros(3, 4)) == 0).all())

    def test_values_out_of_range_are_refused(self):
        weights = [nn.Parameter(torch.ones(2, 2))]
        for options in ({"lr": -1.0}, {"momentum": 1.0}, {"betas": (0.9, 1.0)}, {"weight_decay": float("nan")}):
            with self.subTest(options), self.assertRaisesRegex(ValueError, next(iter(options))):
                Muon(weights, **options)
