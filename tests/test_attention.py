"""Attention on CPUs: what it computes, and that its own backward pass is no less exact than torch's."""

import unittest

import torch
from torch import Tensor
from torch.nn import functional as F

from omnivision.models.attention import _BackwardInFloat32, attention, rows_together


def both_ways(function, given: list[Tensor], out: Tensor) -> list[Tensor]:
    """What a function of q, k and v gives, and the gradients of all three for `out`; in float64."""
    given = [each.detach().requires_grad_() for each in given]
    made = function(*given)
    made.backward(out.to(made.dtype))
    return [each.double() for each in (made.detach(), *(each.grad for each in given))]


class OfACommonProjection(unittest.TestCase):
    def test_copied_or_not_it_is_the_same(self):
        torch.manual_seed(0)
        for width, tokens, copied in ((24, 300, True), (24, 50, False), (64, 300, False)):
            projected = torch.randn(2, tokens, 3, 2, width).permute(2, 0, 3, 1, 4)
            out = torch.randn(2, 2, tokens, width)
            exact = both_ways(F.scaled_dot_product_attention, [each.double() for each in projected], out)
            together = rows_together(projected)
            self.assertEqual(together.is_contiguous(), copied, (width, tokens))
            self.assertFalse(rows_together(projected.bfloat16()).is_contiguous())
            for one, other in zip(both_ways(attention, list(together), out), exact, strict=True):
                self.assertLess(float((one - other).norm() / other.norm()), 1e-6)


class InHalfPrecision(unittest.TestCase):
    def test_no_less_exact_than_torchs(self):
        torch.manual_seed(0)
        for heads, width, queries, tokens in ((4, 24, 300, 300), (2, 64, 50, 50), (4, 24, 90, 30), (2, 64, 300, 300)):
            given = [
                torch.randn(2, length, heads, width).transpose(1, 2).bfloat16() for length in (queries, tokens, tokens)
            ]
            out = torch.randn(2, heads, queries, width)
            exact = both_ways(F.scaled_dot_product_attention, [each.double() for each in given], out)
            ours, torchs = (
                [float((one - other).norm() / other.norm()) for one, other in zip(made, exact, strict=True)]
                for made in (
                    both_ways(function, given, out) for function in (attention, F.scaled_dot_product_attention)
                )
            )
            for mine, other in zip(ours, torchs, strict=True):
                self.assertLess(mine, 0.01)
                self.assertLess(mine, 1.1 * other)

    def test_where_the_backward_pass_is_in_single_precision(self):
        """Narrow heads, or few tokens; on processors, in bfloat16."""
        for width, tokens, dtype, own in (
            (24, 300, torch.bfloat16, True), (64, 50, torch.bfloat16, True),
            (64, 300, torch.bfloat16, False), (24, 300, torch.float32, False),
        ):  # fmt: skip
            q = torch.zeros(1, 1, tokens, width, dtype=dtype, requires_grad=True)
            name = type(attention(q, q, q).grad_fn).__name__
            self.assertEqual(name.startswith(_BackwardInFloat32.__name__), own, (width, tokens, dtype))
