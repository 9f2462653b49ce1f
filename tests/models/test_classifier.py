"""The classifier and the average of classifiers: the published implementation's figures, freezing, sources, merging."""

import unittest
from typing import Any

import numpy as np
import torch
from torch import Tensor

from omnivision.data.batch import Batch
from omnivision.data.catalog import LabelSets
from omnivision.data.mixing import MixupCutmix, soft_targets
from omnivision.models.average import AveragedClassifier
from omnivision.models.classifier import VideoClassifier, train_mode
from omnivision.models.vit import VisionTransformer
from omnivision.tasks.classify import Classify, average_views, soft_cross_entropy
from omnivision.utils.errors import UserError
from tests.parity_formula import GRADIENT_TOLERANCE, TOLERANCE, error, gradient_error, record, stated, tensor, weights

TUBELET = (2, 8, 8)
MODES = ("learned_average_softmax", "learned_average_layer_softmax")


def trunk(**changes: Any) -> VisionTransformer:
    return VisionTransformer(48, 2, 3, num_frames=4, image_size=32, tubelet=TUBELET, **changes)


def published_model(dtype: torch.dtype) -> VideoClassifier:
    model = VideoClassifier(trunk(), [7])
    result = model.load_state_dict(weights(record("classifier")["state_dict"]), strict=False)
    assert result.missing_keys == ["trunk.pos_embed"] and not result.unexpected_keys
    return model.to(dtype).eval()


def soft_labels(name: str, shape: list[int]) -> Tensor:
    values = tensor(name, shape, 0.0, 1.0).double().abs()
    return (values / values.sum(1, keepdim=True)).float()


def batch_of(video: Tensor, label: list[int], views: int = 1, source: str = "a") -> Batch:
    labels = torch.tensor(label).repeat_interleave(views)
    index = torch.arange(len(label)).repeat_interleave(views)
    return Batch(video, labels, index, source, ["x"] * len(video), views=views)


class PublishedFigures(unittest.TestCase):
    def test_logits_losses_and_gradients(self):
        case = record("classifier")["video"]
        for dtype, tolerance in TOLERANCE.items():
            model, video = published_model(dtype), stated(case["input"]).to(dtype)
            seen, expected = {}, case["expected"]["intermediate"]
            block, norm = model.trunk.blocks[0], model.trunk.norm
            block.register_forward_hook(lambda m, x, y, seen=seen: seen.update(encoder_block_0_output=y))
            norm.register_forward_hook(
                lambda m, x, y, seen=seen: seen.update(pooled_tokens_before_norm=x[0], trunk_norm_output=y)
            )
            self.assertLess(error(model(video), case["expected"]["logits"]), tolerance)
            self.assertEqual(set(seen), set(expected))
            for name, got in seen.items():
                self.assertLess(error(got, expected[name]), tolerance, name)
            for variant in case["losses"]:
                model.zero_grad()
                target = soft_labels("soft_labels", [2, 7])
                if variant["title"] == "hard labels":
                    target = soft_targets(torch.tensor(variant["labels"]), 7, 0)
                loss = soft_cross_entropy(model(video), target.to(dtype))
                self.assertLess(abs(loss.item() / variant["loss"][1] - 1), tolerance)
                loss.backward()
                self.assertLess(gradient_error(model, variant["grad_l2_norms"]), GRADIENT_TOLERANCE[dtype])

    def test_several_views(self):
        for case in record("classifier")["multi_view"]:
            for dtype, tolerance in TOLERANCE.items():
                model = published_model(dtype)
                views = [tensor(name, case["input_shape"], 0.0, 2.0).to(dtype) for name in case["input_names"]]
                logits = torch.stack([model(view) for view in views])  # (V, B, classes)
                self.assertLess(error(logits.flatten(0, 1), case["concatenated_logits"]), tolerance)
                # Ours lie video by video, and go through the model together.
                together = torch.stack(views, dim=1).flatten(0, 1)
                averaged = average_views(model(together), case["views"], "logits")
                self.assertLess(error(averaged, case["averaged_logits"]), tolerance)
                probs = average_views(model(together), case["views"], "softmax")
                recorded = case["for_contrast_averaged_softmax_which_is_NOT_what_the_ancestor_ranks"]
                self.assertLess(error(probs.softmax(-1), recorded), tolerance)

    def test_a_confident_model_has_a_finite_loss_with_softmaxed_scores_too(self):
        logits = torch.tensor([[150.0, 0.0], [0.0, -150.0]])  # two views of a video
        averaged = average_views(logits, 2, "softmax")
        self.assertEqual(averaged.softmax(-1).tolist(), [[1.0, 0.0]])
        self.assertEqual(averaged.exp().tolist(), [[1.0, 0.0]], "the logarithm of the mean itself")
        for label in ([1.0, 0.0], [0.0, 1.0]):
            self.assertTrue(soft_cross_entropy(averaged, torch.tensor([label])).isfinite())

    def test_images(self):
        for name in ("model_resolution", "other_resolution"):
            case = record("image")["classifier"][name]
            for dtype, tolerance in TOLERANCE.items():
                got = published_model(dtype)(stated(case["input"]).to(dtype))
                self.assertLess(error(got, case["logits"]), tolerance, name)

    def test_averages(self):
        recorded = record("average")
        entries = [entry for entry in record("classifier")["state_dict"] if entry[2] == "formula"]
        states = [{n: tensor(f"model{k}:{n}", shape, *rest) for n, shape, _, *rest in entries} for k in range(2)]
        for mode in recorded["modes"]:
            for run in mode["runs"]:
                for dtype in TOLERANCE:
                    with self.subTest(mode["combine_mode"], dtype=dtype, point=run["mixing_ratio"]["point"]):
                        self.check_average(mode, run, states, dtype)

    def check_average(self, mode: dict, run: dict, states: list, dtype: torch.dtype) -> None:
        recorded, tolerance = record("average"), TOLERANCE[dtype]
        model = AveragedClassifier(trunk(), [7], 2, mode["combine_mode"])
        self.assertEqual([[n, list(t.shape)] for n, t in model.state_dict().items()], mode["state_dict"])
        self.assertEqual([n for n, _ in model.named_parameters()], mode["trainable_parameters"])
        if isinstance(mode["averaged_entries_in_row_order"], list):
            self.assertEqual([f"trunk.{name}" for name in model.names], mode["averaged_entries_in_row_order"])
        model.load_sources(states)
        given = {name: tensor(name, shape, *rest[1:]) for name, shape, *rest in mode["head"]}
        if run["mixing_ratio"]["point"] == "given":
            given["mixing_ratio"] = stated(run["mixing_ratio"]["values"])
        model.load_state_dict(given, strict=False)
        model = model.to(dtype)
        averaged = model.averaged_trunk()
        for name, expected in run["averaged_weights"].items():
            self.assertLess(error(averaged[name.removeprefix("trunk.")], expected), tolerance, name)
        logits = model(stated(recorded["input"]).to(dtype))
        self.assertLess(error(logits, run["logits"]), tolerance)
        loss = soft_cross_entropy(logits, soft_targets(torch.tensor(recorded["labels"]), 7, 0).to(dtype))
        self.assertLess(abs(loss.item() / run["loss"][1] - 1), tolerance)
        loss.backward()
        self.assertLess(error(model.mixing_ratio.grad, run["d_loss_d_mixing_ratio"]), GRADIENT_TOLERANCE[dtype])
        if dtype == torch.float64:  # the gradient of a ratio is a difference of large numbers
            self.assertLess(gradient_error(model, run["grad_l2_norms"]), 1e-9)


class Freezing(unittest.TestCase):
    def test_a_frozen_trunk_records_nothing_and_stays_as_at_evaluation(self):
        model = VideoClassifier(trunk(drop_path=0.9), [7])
        model.trunk.requires_grad_(False)
        train_mode(model)
        self.assertTrue(model.training and model.heads.training)
        self.assertFalse(any(module.training for module in model.trunk.modules()))
        video = torch.rand(4, 3, 4, 32, 32)
        scores = model(video)
        self.assertTrue(torch.equal(scores, model(video)), "no drop path")
        with torch.no_grad():
            self.assertTrue(torch.equal(scores, model.heads[0](model.features(video))))
        scores.sum().backward()
        learning = [name for name, p in model.named_parameters() if p.grad is not None]
        self.assertEqual(learning, ["heads.0.0.weight", "heads.0.0.bias"])
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            model(video)
        self.assertLess(sum(t.numel() for t in kept), 4 * 48 + 7 * 48 + 1, "nothing of the trunk is kept")
        # A trained trunk trains.
        model = VideoClassifier(trunk(drop_path=0.5), [7])
        train_mode(model)
        self.assertTrue(all(module.training for module in model.modules()))
        model(torch.rand(2, 3, 4, 32, 32)).sum().backward()
        self.assertTrue(all(p.grad is not None for p in model.parameters()))


class Averages(unittest.TestCase):
    def sources(self, count: int) -> list[dict[str, Tensor]]:
        states = []
        for seed in range(count):
            torch.manual_seed(seed)
            states.append(VideoClassifier(trunk(), [7]).state_dict())
        return states

    def average(self, count: int = 2, mode: str = MODES[0]) -> AveragedClassifier:
        model = AveragedClassifier(trunk(), [7], count, mode)
        model.load_sources(self.sources(count))
        return model

    def test_merged_gives_the_same_logits(self):
        for mode in MODES:
            for count in (2, 3):
                model, merged = self.average(count, mode), VideoClassifier(trunk(), [7])
                torch.nn.init.normal_(model.mixing_ratio)
                merged.load_state_dict(model.merged())
                video = torch.rand(2, 3, 4, 32, 32)
                self.assertTrue(torch.equal(model(video), merged(video)))

    def test_the_average_is_exact(self):
        """Under autocast, and where weights far apart choose one source."""
        model, last = self.average(), self.sources(2)[1]
        with torch.autocast("cpu", torch.bfloat16):
            averaged = model.averaged_trunk()
            self.assertEqual(model(torch.rand(2, 3, 4, 32, 32)).shape, (2, 7))
        for name, weight in model.averaged_trunk().items():
            self.assertTrue(torch.equal(weight, averaged[name]), name)
        with torch.no_grad():
            model.mixing_ratio.copy_(torch.tensor([0.0, 200.0]))
        for name, weight in model.averaged_trunk().items():
            self.assertTrue(torch.equal(weight, last[f"trunk.{name}"]), name)

    def test_sources_that_do_not_fit_are_refused(self):
        first, second, third = self.sources(3)
        lacking = {name: tensor for name, tensor in second.items() if name != "trunk.norm.bias"}
        for states, message in (
            ([first, second, third], "ensemble_num_models"),
            ([first, lacking], r"B\.pt .*trunk\.norm\.bias"),
            ([first, second | {"trunk.norm.bias": torch.zeros(3)}], r"B\.pt .*trunk\.norm\.bias.*\(3,\)"),
        ):
            with self.assertRaisesRegex(UserError, message):
                AveragedClassifier(trunk(), [7], 2).load_sources(states, ["A.pt", "B.pt"])
        with self.assertRaisesRegex(UserError, "activation_checkpointing"):
            AveragedClassifier(trunk(activation_checkpointing=True), [7])


class Task(unittest.TestCase):
    labels = LabelSets([7, 5], {"a": 0, "b": 1})

    def test_ignored_samples_do_not_count(self):
        model, task = VideoClassifier(trunk(), [7, 5]).eval(), Classify(self.labels)
        video = torch.randint(0, 256, (3, 3, 4, 32, 32), dtype=torch.uint8)
        for step in (task.training_step, task.evaluation_step):
            all_three, two = step(model, batch_of(video, [1, -1, 4])), step(model, batch_of(video[[0, 2]], [1, 4]))
            self.assertAlmostEqual(float(all_three.loss), float(two.loss), places=5)
            self.assertEqual(float(all_three.sums["top1"]), float(two.sums["top1"]))
            none = step(model, batch_of(video, [-1, -1, -1]))
            self.assertEqual(float(none.loss), 0)

    def test_hits_are_counted_without_label_smoothing(self):
        task, label = Classify(self.labels, MixupCutmix(prob=0)), [1, 4, -1, 0]
        video = torch.randint(0, 256, (4, 3, 4, 32, 32), dtype=torch.uint8)
        perfect = torch.nn.functional.one_hot(torch.tensor(label).clamp(min=0), 7).float()
        output = task.training_step(lambda *_: perfect.requires_grad_(), batch_of(video, label))
        self.assertEqual((int(output.count), float(output.sums["top1"])), (3, 300.0))
        task.mixing = MixupCutmix(cutmix_alpha=0)
        for seed in range(4):
            torch.manual_seed(seed)
            share, _ = task.mixing.draw(32, 32, np.random.default_rng(seed))
            output = task.training_step(lambda *_: perfect[:2], batch_of(video[:2], [1, 4]))
            self.assertAlmostEqual(float(output.sums["top1"]), 200 * share, places=3)
            same = task.training_step(lambda *_: perfect[[0, 0]], batch_of(video[:2], [1, 1]))
            self.assertAlmostEqual(float(same.sums["top1"]), 200, places=3)

    def test_mixing_is_drawn_from_the_step(self):
        model, task = VideoClassifier(trunk(), [7, 5]), Classify(self.labels, MixupCutmix())
        batch = batch_of(torch.randint(0, 256, (4, 3, 4, 32, 32), dtype=torch.uint8), [0, 1, 2, 3])
        losses = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            losses.append(float(task.training_step(model, batch).loss))
        self.assertEqual(losses[0], losses[1])
        self.assertNotEqual(losses[0], losses[2])

    def test_recorded_cross_entropies(self):
        recorded = record("metrics")
        scores, label = stated(recorded["predictions"])[:6], torch.tensor(recorded["labels"])
        targets = {
            "hard": soft_targets(label, 9, 0),
            "second_label_set_to_-1": soft_targets(label.where(torch.arange(6) != 1, torch.tensor(-1)), 9, 0),
            "soft": soft_labels("metric.soft", [6, 9]),
        }
        for dtype, tolerance in TOLERANCE.items():
            for name, target in targets.items():
                loss = soft_cross_entropy(scores.to(dtype), target.to(dtype))
                self.assertLess(abs(loss.item() / recorded["cross_entropy"][name][1] - 1), tolerance, name)


if __name__ == "__main__":
    unittest.main()
