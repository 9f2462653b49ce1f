"""The masked autoencoder and its decoders: the published figures, and what must hold whatever the figures are."""

import hashlib
import tempfile
import unittest
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omnivision.data.batch import Batch
from omnivision.data.masking import RandomMask
from omnivision.interop.formats import convert_state_dict
from omnivision.models.architecture import architecture_of, from_architecture
from omnivision.models.mae import (
    CrossAttention,
    MaskedAutoencoder,
    patch_statistics,
    reconstruction_loss,
    reconstruction_target,
    split_tokens,
)
from omnivision.models.patches import normalize_pixels, pick_tubelets, unnormalize_pixels
from omnivision.models.vit import DropPath, VisionTransformer, as_video
from omnivision.tasks.reconstruct import Reconstruct
from omnivision.utils.errors import UserError
from tests import stage_runs as stages
from tests.parity_formula import (
    GRADIENT_TOLERANCE,
    TOLERANCE,
    error,
    gradient_error,
    record,
    stated,
    tensor,
    token_mask,
    weights,
)

TUBELET = (2, 8, 8)
VIDEO = torch.rand(2, 3, 4, 32, 32, generator=torch.Generator().manual_seed(1))


def published_model(dtype: torch.dtype) -> MaskedAutoencoder:
    trunk = VisionTransformer(48, 2, 3, num_frames=4, image_size=32, tubelet=TUBELET)
    model = MaskedAutoencoder(trunk, {"width": 24, "depth": 2, "heads": 4})
    result = model.load_state_dict(weights(record("mae")["state_dict"]), strict=False)
    assert set(result.missing_keys) == {"trunk.pos_embed", "trunk.decoder.pos_embed"} and not result.unexpected_keys
    return model.to(dtype)


def norm_of(settings: dict[str, Any]) -> str:
    if not settings["norm_pix_loss"]:
        return "none"
    return "channel" if settings["norm_pix_per_channel"] else "patch"


def target_of(video: Tensor, masked: Tensor, settings: dict[str, Any]) -> Tensor:
    if settings["unnormalize_img"] is not None:
        return reconstruction_target(video, TUBELET, masked, norm_of(settings))
    # A variant that the recipe does not use: targets from the normalized image.
    pixels = pick_tubelets(as_video(video, TUBELET), TUBELET, masked).flatten(3).transpose(2, 3)
    mean, std = patch_statistics(pixels, norm_of(settings))
    return ((pixels - mean) / std).flatten(2)


class PublishedFigures(unittest.TestCase):
    def check_case(self, case: dict[str, Any], dtype: torch.dtype) -> None:
        model, video, mask = published_model(dtype), stated(case["input"]).to(dtype), token_mask(case["mask"])
        visible, masked = split_tokens(mask)
        self.assertEqual(masked.sum(1).tolist(), case["mask"]["sum_of_masked_indices"])
        everything = torch.arange(mask.shape[1]).expand(len(mask), -1)
        places = torch.cat([visible, masked], 1).argsort(1)  # where our decoder has the tokens
        tolerance, seen = TOLERANCE[dtype], case["expected"]["intermediate"]

        captured: dict[str, Tensor] = {}
        decoder = model.trunk.decoder

        def raster(tokens: Tensor) -> Tensor:
            return tokens.gather(1, places[..., None].expand_as(tokens))

        def capture(module: nn.Module, note: Callable[[Tensor, Tensor], dict[str, Tensor]]) -> None:
            module.register_forward_hook(lambda _, inputs, output: captured.update(note(inputs[0], output)))

        capture(decoder.decoder_blocks[-1], lambda x, y: {"decoder_norm_output": raster(decoder.norm(y))})
        capture(model.trunk.blocks[0], lambda x, y: {"encoder_input_visible_tokens": x, "encoder_block_0_output": y})
        capture(
            decoder.decoder_embed,
            lambda x, y: {"decoder_embed_input": raster(x), "decoder_embed_output": raster(y)},
        )
        captured["patch_embed_output_all_tokens"] = model.trunk.patch_embed(as_video(video, TUBELET))
        captured["encoder_norm_output"] = model.encode(video, visible)
        model.decode(video, captured["encoder_norm_output"], visible, masked)
        self.assertEqual(set(captured), set(seen))
        for name, got in captured.items():
            self.assertLess(error(got, seen[name]), tolerance, name)
        everywhere = model.heads[0](captured["decoder_norm_output"])
        self.assertLess(error(everywhere, case["expected"]["prediction"]), tolerance)
        prediction = model(video, mask)
        self.assertTrue(torch.equal(prediction.masked_idx, masked))
        picked = everywhere.gather(1, masked[..., None].expand_as(prediction.pixels))
        self.assertLess((prediction.pixels - picked).abs().max(), tolerance)

        for variant in case["losses"]:
            model.zero_grad()
            target = target_of(video, masked, variant["settings"])
            loss = reconstruction_loss(model(video, mask).pixels, target)
            self.assertLess(abs(float(loss.detach()) / variant["loss"][1] - 1), tolerance, variant["title"])
            if "target_before_masking" in variant:
                at_all = target_of(video, everything, variant["settings"])
                self.assertLess(error(at_all, variant["target_before_masking"]), tolerance)
            loss.backward()
            got = gradient_error(model, variant["grad_l2_norms"])
            self.assertLess(got, GRADIENT_TOLERANCE[dtype], variant["title"])

    def test_a_video_and_images_of_the_models_resolution_and_another(self):
        images = record("image")["mae"]
        for case in (record("mae")["video"], images["model_resolution"], images["other_resolution"]):
            for dtype in TOLERANCE:
                with self.subTest(case["input"]["name"], dtype=dtype):
                    self.check_case(case, dtype)

    def test_loss_on_a_low_contrast_clip_with_unequal_masks(self):
        case = record("mae")["loss_on_given_tensors"]
        mask = torch.zeros(2, 32, dtype=torch.bool)
        for sample, indices in enumerate(case["mask"]["masked_indices"]):
            mask[sample, indices] = True
        everything = torch.arange(32).expand(2, -1)
        for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
            video = stated(case["input"]).to(dtype)
            for variant in case["losses"]:
                prediction = stated(case["prediction_tensor"]).to(dtype).requires_grad_()
                target = target_of(video, everything, variant["settings"])
                self.assertLess(error(target, variant["target_before_masking"]), tolerance, variant["title"])
                loss = reconstruction_loss(prediction[mask], target[mask])
                self.assertLess(abs(float(loss.detach()) / variant["loss"][1] - 1), tolerance)
                loss.backward()
                self.assertLess(error(prediction.grad, variant["d_loss_d_prediction"]), tolerance)

    def test_formula_is_the_stated_one(self):
        entries = weights(record("mae")["state_dict"])
        digest = hashlib.sha256(b"".join(t.numpy().tobytes() for t in entries.values())).hexdigest()
        self.assertEqual(digest, record("mae")["parameters_sha256"])
        self.assertEqual(tensor("x", [2, 3], 0.5, 0.0).tolist(), [[0.5] * 3] * 2)


def small_model(checkpointing: bool = False, **decoder: Any) -> MaskedAutoencoder:
    torch.manual_seed(0)
    trunk = VisionTransformer(
        48, 2, 3, num_frames=4, image_size=32, tubelet=TUBELET, activation_checkpointing=checkpointing
    )
    return MaskedAutoencoder(trunk, {"width": 24, "depth": 2, "heads": 4} | decoder)


def some_masks(samples: int) -> Tensor:
    rng = np.random.default_rng(0)
    return torch.stack([torch.from_numpy(RandomMask(0.75)((2, 4, 4), rng)) for _ in range(samples)])


class Model(unittest.TestCase):
    def test_raw_pixels_equal_normalized_ones(self):
        model, mask = small_model(), some_masks(2)
        video = torch.randint(0, 256, (2, 3, 4, 32, 32), dtype=torch.uint8)
        raw = model(video, mask).pixels
        normalized = model(normalize_pixels(video, channel_dim=1), mask).pixels
        self.assertLess((raw - normalized).abs().max(), 1e-5)
        target = reconstruction_target(video, TUBELET, torch.arange(32).expand(2, -1), "none")
        same = reconstruction_target(normalize_pixels(video, 1), TUBELET, torch.arange(32).expand(2, -1), "none")
        self.assertLess((target - same).abs().max(), 1e-5)
        self.assertLess((unnormalize_pixels(video, 1) - video / 255).abs().max(), 1e-6)

    def test_hidden_pixels_do_not_reach_the_encoder(self):
        model, mask, video = small_model(), some_masks(2), torch.rand(2, 3, 4, 32, 32)
        hidden = mask[:, None].repeat_interleave(2, 2).repeat_interleave(8, 3).repeat_interleave(8, 4)
        noisy = torch.where(hidden, torch.rand_like(video), video)
        self.assertTrue(torch.equal(model(video, mask).pixels, model(noisy, mask, 24).pixels))  # given the count, too

    def test_activation_checkpointing_computes_twice_and_changes_nothing(self):
        mask = some_masks(2)
        for attention in ("self", "cross"):
            gradients = []
            for on in (False, True):
                model, calls = small_model(on, attention=attention), []
                for block in (model.trunk.blocks[1], model.trunk.decoder.decoder_blocks[0]):
                    block.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
                model(VIDEO, mask).pixels.square().mean().backward()
                self.assertEqual(len(calls), 4 if on else 2)
                gradients.append([p.grad for p in model.parameters()])
            for plain, again in zip(*gradients, strict=True):
                self.assertTrue(torch.equal(plain, again))

    def test_unequal_masks_are_refused(self):
        mask = some_masks(2)
        mask[0] = False
        with self.assertRaisesRegex(UserError, "0, 24"):
            small_model()(torch.rand(2, 3, 4, 32, 32), mask)

        with self.assertRaisesRegex(UserError, "trainer.model.trunk.heads"):
            VisionTransformer(48, 1, 5)

    def test_drop_path_keeps_the_mean_and_grows_with_depth(self):
        torch.manual_seed(0)
        trunk = VisionTransformer(48, 3, 3, num_frames=4, image_size=32, tubelet=TUBELET, drop_path=0.9)
        video = torch.rand(8, 3, 4, 32, 32)
        for training in (True, False):
            trunk.train(training)
            self.assertEqual(torch.equal(trunk(video), trunk(video)), not training)
        drop = DropPath(0.25).train()
        x = drop(torch.ones(4000, 2, 3))
        self.assertEqual(sorted({round(float(value), 4) for value in x.flatten()}), [0, round(1 / 0.75, 4)])
        self.assertTrue(torch.equal(x.amax((1, 2)), x.amin((1, 2))), "a sample is dropped whole")
        self.assertAlmostEqual(float(x.mean()), 1, delta=0.05)
        trunk = VisionTransformer(48, 5, 3, num_frames=4, image_size=32, tubelet=TUBELET, drop_path=0.1)
        rates = torch.tensor([block.drop_path.rate for block in trunk.blocks])
        torch.testing.assert_close(rates, torch.tensor([0, 0.025, 0.05, 0.075, 0.1]))

    def test_the_pictures_show_what_they_say(self):
        model, mask, video = small_model(), some_masks(1), torch.randint(0, 256, (1, 3, 4, 32, 32), dtype=torch.uint8)
        batch = Batch(video, torch.zeros(1), torch.zeros(1), "a", ["x"], mask, 24)
        hidden = mask[0].repeat_interleave(2, 0).repeat_interleave(8, 1).repeat_interleave(8, 2).numpy()  # (T, H, W)
        shown = Reconstruct(TUBELET).visualize(model, batch).columns
        original = video[0].permute(1, 2, 3, 0).numpy()
        self.assertTrue((shown["original"] == original).all())
        self.assertTrue((shown["visible"][~hidden] == original[~hidden]).all())
        self.assertTrue((shown["visible"][hidden] == 128).all())
        self.assertTrue((shown["mask"][hidden] == 255).all() and (shown["mask"][~hidden] == 0).all())
        # The first model predicts nearly nothing: with true statistics a hidden tubelet has its mean, with those of visible
        # ones all hidden tubelets look alike.
        true = shown["reconstruction (true patch statistics)"]
        honest = shown["reconstruction (statistics of visible patches)"]
        for picture in (true, honest):
            self.assertTrue((picture[~hidden] == original[~hidden]).all())
            self.assertFalse((picture[hidden] == original[hidden]).all())
        mean = original[~hidden].mean(0)
        self.assertLess(abs(honest[hidden].mean(0) - mean).max(), 30)
        t, h, w = (int(i[0]) for i in mask[0].nonzero(as_tuple=True))
        box = (slice(2 * t, 2 * t + 2), slice(8 * h, 8 * h + 8), slice(8 * w, 8 * w + 8))
        self.assertLess(abs(true[box].mean((0, 1, 2)) - original[box].mean((0, 1, 2))).max(), 30)

    def test_starting_weights(self):
        model = small_model()
        self.assertEqual(float(model.trunk.mask_token.detach().abs().max()), 0)
        weight = model.trunk.patch_embed.proj[1].weight
        bound = (6 / (weight[0].numel() + len(weight))) ** 0.5  # Xavier-uniform of the flattened weight
        self.assertLessEqual(float(weight.detach().abs().max()), bound)
        self.assertGreater(float(weight.detach().abs().max()), 0.99 * bound)
        self.assertAlmostEqual(float(model.heads[0].projector.weight.detach().std()), 0.02, delta=0.002)


class Share(unittest.TestCase):
    def test_training_decodes_a_share_and_evaluation_all(self):
        half, mask = small_model(share=0.5), some_masks(2)
        masked = split_tokens(mask)[1]
        prediction = half(VIDEO, mask, 24)
        self.assertEqual(prediction.pixels.shape[:2], (2, 12))
        for some, all_of_them in zip(prediction.masked_idx.tolist(), masked.tolist(), strict=True):
            self.assertEqual(some, sorted(set(some)))
            self.assertLessEqual(set(some), set(all_of_them))
        self.assertTrue(torch.equal(half.eval()(VIDEO, mask).masked_idx, masked))

    def test_every_masked_token_has_its_turn(self):
        decoder = small_model(share=0.25).trunk.decoder
        masked = torch.arange(8).expand(4000, -1) * 3
        counts = decoder.sample_masked(masked).flatten().bincount(minlength=22)[::3].float()
        self.assertLess((counts / 1000 - 1).abs().max(), 0.15)  # five deviations
        self.assertEqual(decoder.sample_masked(masked[:, :3]).shape[1], 1, "at least one")

    def test_of_all_it_is_the_recipe(self):
        mask = some_masks(2)
        self.assertTrue(torch.equal(small_model(share=1)(VIDEO, mask).pixels, small_model()(VIDEO, mask).pixels))


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
            model = small_model(attention=attention)
            x = model.encode(VIDEO, visible)
            few, many = model.decode(VIDEO, x, visible, masked[:, ::3]), model.decode(VIDEO, x, visible, masked)[:, ::3]
            self.assertEqual((few - many).abs().max() > 1e-5, depends, attention)

    def test_it_learns_and_every_parameter_takes_part(self):
        model, mask = small_model(attention="cross", share=0.5), some_masks(2)
        optimizer, losses = torch.optim.AdamW(model.parameters(), 3e-3), []
        for _ in range(30):
            prediction = model(VIDEO, mask, 24)
            loss = (prediction.pixels - prediction.masked_idx[..., None] / 32).square().mean()
            loss.backward()
            self.assertEqual([name for name, p in model.named_parameters() if p.grad is None], [])
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        self.assertLess(losses[-1], 0.2 * losses[0])

    def test_its_file_says_what_it_is_and_so_do_its_weights(self):
        model = small_model(attention="cross", share=0.5)
        architecture = architecture_of(model)
        self.assertEqual(architecture["decoder"], {"width": 24, "depth": 2, "heads": 4, "attention": "cross"})
        from_architecture(architecture, "here").load_state_dict(model.state_dict())
        self.assertEqual(convert_state_dict("omnivision", model.state_dict(), architecture).architecture, architecture)
        older = architecture | {"decoder": {"width": 24, "depth": 2, "heads": 4}}
        self.assertEqual(architecture_of(from_architecture(older, "here"))["decoder"]["attention"], "self")


class Compiled(unittest.TestCase):
    def test_no_graph_breaks_in_trunk_decoders_and_loss(self):
        """Each break would leave the device to Python again."""
        inputs = VIDEO, some_masks(2), 24
        parts = [(small_model(**decoder), inputs) for decoder in ({}, {"attention": "cross"}, {"share": 0.5})]
        parts.append((Reconstruct(TUBELET).loss, (small_model()(*inputs), VIDEO)))
        for part, given in parts:
            torch._dynamo.reset()
            with torch.autocast("cpu", torch.bfloat16):
                found = torch._dynamo.explain(part)(*given)
            self.assertEqual((found.graph_break_count, found.graph_count), (0, 1), found.break_reasons)


class InARun(unittest.TestCase):
    def test_a_trunk_pretrained_with_them_is_aligned(self):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            data = stages.write_split(folder, "k150", "train", stages.write_videos(folder / "videos", 8))
            data += [text.replace(".train.", ".val.") for text in data]
            cheap = ["trainer.model.decoder.attention=cross", "trainer.model.decoder.share=0.5"]
            run = stages.run_in_process(stages.command("mae", folder / "mae", *data, *cheap, dataset="k150"))
            self.assertEqual(run.returncode, 0, run.stderr)
            self.assertIsInstance(
                stages.load_checkpoint(folder / "mae")["model"]["trunk.decoder.norm.weight"], torch.Tensor
            )
            self.assertEqual(stages.load_checkpoint(folder / "mae")["architecture"]["decoder"]["attention"], "cross")
            start = f"++pretrained_checkpoint_path={folder / 'mae'}"
            run = stages.run_in_process(stages.command("ft", folder / "ft", *data, start, dataset="k150"))
            self.assertEqual(run.returncode, 0, run.stderr)
            self.assertRegex(run.stdout, "loaded")


if __name__ == "__main__":
    unittest.main()
