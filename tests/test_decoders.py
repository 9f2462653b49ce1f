"""The cheaper decoders: a share of the masked tokens, and attention to the visible ones alone."""

import tempfile
import unittest
from pathlib import Path

import torch
from torch.nn import functional as F

from omnivision.interop.published import convert_state_dict
from omnivision.models.architecture import build, describe
from omnivision.models.mae import CrossAttention, MaskedAutoencoder, split_tokens
from omnivision.models.vit import VisionTransformer
from omnivision.tasks.reconstruct import Reconstruct
from tests import stage_runs as stages
from tests.test_mae import TUBELET, some_masks

VIDEO = torch.rand(2, 3, 4, 32, 32, generator=torch.Generator().manual_seed(1))
HIDDEN = 24


def model(checkpointing: bool = False, **decoder: object) -> MaskedAutoencoder:
    torch.manual_seed(0)
    trunk = VisionTransformer(
        48, 2, 3, num_frames=4, image_size=32, tubelet=TUBELET, activation_checkpointing=checkpointing
    )
    return MaskedAutoencoder(trunk, {"width": 24, "depth": 2, "heads": 4} | decoder)


class Share(unittest.TestCase):
    def test_training_decodes_a_share_and_evaluation_all(self):
        half, mask = model(share=0.5), some_masks(2)
        masked = split_tokens(mask)[1]
        prediction = half(VIDEO, mask, HIDDEN)
        self.assertEqual(prediction.pixels.shape[:2], (2, 12))
        for some, all_of_them in zip(prediction.masked_idx.tolist(), masked.tolist(), strict=True):
            self.assertEqual(some, sorted(set(some)))
            self.assertLessEqual(set(some), set(all_of_them))
        self.assertTrue(torch.equal(half.eval()(VIDEO, mask).masked_idx, masked))

    def test_every_masked_token_has_its_turn(self):
        decoder = model(share=0.25).trunk.decoder
        masked = torch.arange(8).expand(4000, -1) * 3
        counts = decoder.sample_masked(masked).flatten().bincount(minlength=22)[::3].float()
        self.assertLess((counts / 1000 - 1).abs().max(), 0.15)  # five deviations
        self.assertEqual(decoder.sample_masked(masked[:, :3]).shape[1], 1, "at least one")

    def test_of_all_it_is_the_recipe(self):
        mask = some_masks(2)
        self.assertTrue(torch.equal(model(share=1)(VIDEO, mask).pixels, model()(VIDEO, mask).pixels))


class Cross(unittest.TestCase):
    def test_attention_is_softmax_of_scaled_products(self):
        torch.manual_seed(0)
        attention = CrossAttention(24, 4).double()
        x, memory = torch.rand(2, 5, 24).double(), torch.rand(2, 7, 24).double()
        q = F.linear(x, attention.q.weight, attention.q.bias).reshape(2, 5, 4, 6)
        k, v = F.linear(memory, attention.kv.weight, attention.kv.bias).reshape(2, 7, 2, 4, 6).unbind(2)
        weights = (torch.einsum("bmhd,bkhd->bhmk", q, k) / 6**0.5).softmax(-1)
        expected = attention.proj(torch.einsum("bhmk,bkhd->bmhd", weights, v).reshape(2, 5, 24))
        self.assertLess((attention(x, memory) - expected).abs().max(), 1e-12)

    def test_a_token_does_not_depend_on_which_others_are_asked_for(self):
        mask = some_masks(2)
        visible, masked = split_tokens(mask)
        for attention, depends in (("cross", False), ("self", True)):
            made = model(attention=attention)
            x = made.encode(VIDEO, visible)
            few, many = made.decode(VIDEO, x, visible, masked[:, ::3]), made.decode(VIDEO, x, visible, masked)[:, ::3]
            self.assertEqual((few - many).abs().max() > 1e-5, depends, attention)

    def test_it_learns_and_every_parameter_takes_part(self):
        made, mask = model(attention="cross", share=0.5), some_masks(2)
        optimizer, losses = torch.optim.AdamW(made.parameters(), 3e-3), []
        for _ in range(30):
            prediction = made(VIDEO, mask, HIDDEN)
            loss = (prediction.pixels - prediction.masked_idx[..., None] / 32).square().mean()
            loss.backward()
            self.assertEqual([name for name, p in made.named_parameters() if p.grad is None], [])
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        self.assertLess(losses[-1], 0.2 * losses[0])

    def test_activation_checkpointing_changes_nothing(self):
        mask, gradients = some_masks(2), []
        for on in (False, True):
            made, calls = model(on, attention="cross"), []
            made.trunk.decoder.decoder_blocks[0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
            made(VIDEO, mask).pixels.square().mean().backward()
            self.assertEqual(len(calls), 2 if on else 1, "made again in the backward pass")
            gradients.append([p.grad for p in made.parameters()])
        for plain, again in zip(*gradients, strict=True):
            self.assertTrue(torch.equal(plain, again))

    def test_its_file_says_what_it_is_and_so_do_its_weights(self):
        made = model(attention="cross", share=0.5)
        told = describe(made)
        self.assertEqual(told["decoder"], {"width": 24, "depth": 2, "heads": 4, "attention": "cross"})
        build(told, "here").load_state_dict(made.state_dict())
        self.assertEqual(convert_state_dict("omnivision", made.state_dict(), told).architecture, told)
        older = told | {"decoder": {"width": 24, "depth": 2, "heads": 4}}
        self.assertEqual(describe(build(older, "here"))["decoder"]["attention"], "self")

    def test_only_two_kinds(self):
        for override, saying in (
            ("attention=both", "trainer.model.decoder.attention .*'both'"),
            ("share=0", "trainer.model.decoder.share .*> 0"),
            ("share=half", "trainer.model.decoder.share .*'half'"),
            ("shrae=1", "trainer.model.decoder.shrae .* mean trainer.model.decoder.share"),
        ):
            with tempfile.TemporaryDirectory() as folder:
                made = stages.here(
                    stages.command("mae", Path(folder) / "run", f"++trainer.model.decoder.{override}", dataset="k150")
                )
            self.assertEqual(made.returncode, 1)
            self.assertRegex(made.stderr, saying)


class Compiled(unittest.TestCase):
    def test_no_graph_breaks_in_trunk_and_decoders(self):
        """Each break would leave the device to Python again."""
        mask = some_masks(2)
        for decoder in ({}, {"attention": "cross"}, {"share": 0.5}):
            made = model(**decoder)
            torch._dynamo.reset()
            found = torch._dynamo.explain(made)(VIDEO, mask, HIDDEN)
            self.assertEqual((found.graph_break_count, found.graph_count), (0, 1), found.break_reasons)

    def test_nor_in_bf16_and_in_the_loss(self):
        mask, made = some_masks(2), model()
        task = Reconstruct(TUBELET)
        with torch.autocast("cpu", torch.bfloat16):
            for what, given in ((made, (VIDEO, mask, HIDDEN)), (task.loss, (made(VIDEO, mask, HIDDEN), VIDEO))):
                torch._dynamo.reset()
                found = torch._dynamo.explain(what)(*given)
                self.assertEqual((found.graph_break_count, found.graph_count), (0, 1), found.break_reasons)


class InARun(unittest.TestCase):
    def test_a_trunk_pretrained_with_them_is_aligned(self):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            data = stages.write_split(folder, "k150", "train", stages.write_films(folder / "films", 8))
            data += [text.replace(".train.", ".val.") for text in data]
            cheap = ["trainer.model.decoder.attention=cross", "trainer.model.decoder.share=0.5"]
            run = stages.here(stages.command("mae", folder / "mae", *data, *cheap, dataset="k150"))
            self.assertEqual(run.returncode, 0, run.stderr)
            self.assertIsInstance(stages.state(folder / "mae")["model"]["trunk.decoder.norm.weight"], torch.Tensor)
            self.assertEqual(stages.state(folder / "mae")["architecture"]["decoder"]["attention"], "cross")
            start = f"++pretrained_checkpoint_path={folder / 'mae'}"
            run = stages.here(stages.command("ft", folder / "ft", *data, start, dataset="k150"))
            self.assertEqual(run.returncode, 0, run.stderr)
            self.assertRegex(run.stdout, "loaded")


if __name__ == "__main__":
    unittest.main()
