"""Probes against scikit-learn's, and what they choose by."""

import unittest
from unittest import mock

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from omnivision.data.groups import group_paths
from omnivision.probing import board, methods

CLASSES, DIM = 5, 12


def clouds(samples: int, seed: int = 0, spread: float = 1.5) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples around a center for each class, on different scales by channel."""
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(99).normal(size=(CLASSES, DIM))
    labels = np.arange(samples) % CLASSES
    features = (centers[labels] + spread * rng.normal(size=(samples, DIM))) * np.linspace(0.1, 3, DIM)
    return torch.tensor(features, dtype=torch.float32), torch.tensor(labels)


def probe(given: board.Data, names: list[str]) -> list[board.Result]:
    return [result for name in names for result in board.METHODS[name](given)]


def data(train: int = 200, val: int = 150) -> board.Data:
    return board.Data(
        *(board.Samples(*clouds(size, seed), [str(i) for i in range(size)]) for seed, size in enumerate((train, val))),
        CLASSES,
    )


class Methods(unittest.TestCase):
    def test_knn_is_scikit_learns(self) -> None:
        (x, y), (queries, _) = clouds(200), clouds(90, 1)
        found = methods.knn_scores(x, y, queries, (1, 7, 50), CLASSES)
        for k in (1, 7, 50):
            reference = KNeighborsClassifier(
                k, metric="cosine", algorithm="brute", weights=lambda d: np.exp(-d / 0.07)
            ).fit(x, y)
            shares = found[k] / found[k].sum(1, keepdim=True)
            np.testing.assert_allclose(shares, reference.predict_proba(queries), atol=1e-4)

    def test_logistic_regression_is_scikit_learns(self) -> None:
        (x, y), (queries, _) = clouds(120), clouds(90, 1)
        scale = methods.Scaler.of(x)
        reference_scale = StandardScaler().fit(x.double())
        np.testing.assert_allclose(scale(queries), reference_scale.transform(queries.double()), atol=1e-9)
        strengths = (0.001, 0.1, 10.0)
        for strength, model in zip(strengths, methods.fit_logistic(scale(x), y, strengths, CLASSES), strict=True):
            with self.subTest(C=strength):
                reference = LogisticRegression(C=strength, tol=1e-8, max_iter=10_000).fit(scale(x).numpy(), y)
                self.assertTrue(model.converged)
                np.testing.assert_allclose(
                    model.weight, reference.coef_, atol=2e-3 * max(1, abs(reference.coef_).max())
                )
                found = model(scale(queries)).softmax(1)
                np.testing.assert_allclose(found, reference.predict_proba(scale(queries).numpy()), atol=2e-3)

    def test_stopping_early_is_not_converging(self) -> None:
        x, y = clouds(120)
        with mock.patch.object(methods, "MAX_ITERATIONS", 1):
            (model,) = methods.fit_logistic(x.double(), y, [100.0], CLASSES)
        self.assertFalse(model.converged)

    def test_sgd_separates_what_is_separable(self) -> None:
        (x, y), (queries, labels) = clouds(300, spread=0.3), clouds(90, 1, spread=0.3)
        scale = methods.Scaler.of(x)
        found = methods.fit_sgd(scale(x), y, 0.1, CLASSES, seed=0)
        again = methods.fit_sgd(scale(x), y, 0.1, CLASSES, seed=0)
        self.assertTrue(torch.equal(found.weight, again.weight))
        self.assertGreater((found(scale(queries).float()).argmax(1) == labels).float().mean(), 0.95)

    def test_rank(self) -> None:
        basis = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0))).Q
        for rank in (1, 5, 64):
            self.assertAlmostEqual(methods.effective_rank(basis[:, :rank] @ basis[:rank]), rank, delta=0.02 * rank)


class Board(unittest.TestCase):
    def test_choices_do_not_see_the_validation_split(self) -> None:
        given = data()
        wrong = board.Samples(given.val.features, (given.val.labels + 1) % CLASSES, given.val.groups)
        for right, other in zip(
            probe(given, ["knn", "logistic", "linear"]),
            probe(board.Data(given.train, wrong, CLASSES), ["knn", "logistic", "linear"]),
            strict=True,
        ):
            self.assertEqual((right.chosen, right.held_out_top1), (other.chosen, other.held_out_top1), right.method)
            self.assertGreater(right.top1, other.top1 + 20)

    def test_the_choice_is_fitted_to_the_whole_training_split(self) -> None:
        given = data()
        (result,) = probe(given, ["logistic"])
        scale = StandardScaler().fit(given.train.features.double())
        reference = LogisticRegression(C=result.chosen["C"], tol=1e-8, max_iter=10_000)
        reference.fit(scale.transform(given.train.features.double()), given.train.labels)
        found = reference.score(scale.transform(given.val.features.double()), given.val.labels)
        self.assertAlmostEqual(result.top1, 100 * found)
        self.assertGreater(result.chosen["C"], min(board.STRENGTHS))

    def test_groups_are_held_out_whole(self) -> None:
        features, labels = clouds(200)
        groups = [f"g{i // 10}" for i in range(200)]
        fit, held = board.Data(board.Samples(features, labels, groups), data().val, CLASSES).held_out()
        self.assertFalse(set(fit.groups) & set(held.groups))
        self.assertEqual(len(fit) + len(held), 200)

    def test_low_shot(self) -> None:
        results = {result.method: result for result in probe(data(train=60), ["low-shot"])}
        self.assertEqual(list(results), ["1-shot", "5-shot", "10-shot", "1%", "10%"])  # classes of 12 videos
        self.assertEqual(len(results["1-shot"].draws), board.DRAWS)
        self.assertGreater(len(set(results["1-shot"].draws)), 1, "other videos in each draw")
        self.assertGreater(results["10-shot"].top1, results["1-shot"].top1)
        self.assertEqual(results["1%"].top1, results["1-shot"].top1)  # of 12 videos, at least one

    def test_known_datasets_have_groups(self) -> None:
        paths = [f"v_Archery_g{group:02}_c{clip:02}.avi" for group in range(2) for clip in range(2)]
        self.assertEqual(len(set(group_paths("ucf101", paths))), 2)
        self.assertEqual(len(set(group_paths("mine", paths))), 4)


if __name__ == "__main__":
    unittest.main()
