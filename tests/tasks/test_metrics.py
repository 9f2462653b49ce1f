"""Accuracies, confusions, and the meter that adds up over batches and processes."""

import unittest
from datetime import timedelta

import numpy as np
import torch

from omnivision.distributed.process_group import Dist, RankInfo
from omnivision.tasks.classify import average_views
from omnivision.tasks.metrics import Meter, averages, confusion_matrix, mean_class_accuracy, topk_hits
from tests.parity_formula import record, stated, tensor


class PublishedFigures(unittest.TestCase):
    recorded = record("metrics")
    label = torch.tensor(recorded["labels"])
    views = stated(recorded["predictions"]).unflatten(0, (6, 6))  # (V, B, classes), view by view

    def pooled(self, average: str) -> torch.Tensor:
        video_by_video = self.views.transpose(0, 1).flatten(0, 1)
        return average_views(video_by_video, 6, average)

    def test_accuracy_over_views(self):
        for k in (1, 2, 5):
            expected = self.recorded["accuracy"][f"top{k}"]
            pooled = topk_hits(self.pooled("logits"), self.label, k)
            first = topk_hits(self.views[0], self.label, k)
            self.assertAlmostEqual(float(pooled.mean()), expected["pooled_over_views"], places=6)
            self.assertAlmostEqual(float(first.mean()), expected["first_view_only"], places=6)
            softmax = topk_hits(self.pooled("softmax"), self.label, k)
            self.assertAlmostEqual(float(softmax.mean()), expected["for_contrast_softmax_averaged"], places=6)
            meter = Meter()
            for hits in (pooled, first):
                meter.add("a", {"top": hits.sum()}, len(hits))
            dist = Dist(RankInfo(), "cpu", None, timedelta(minutes=1))
            both = averages(meter.all_gather_totals(dist))["top"]
            self.assertAlmostEqual(both, expected["after_two_updates_pooled_then_first_view"], places=6)

    def test_soft_targets(self):
        weights = tensor("metric.soft", [6, 9], 0.0, 1.0).double().abs()
        target = (weights / weights.sum(1, keepdim=True)).float()
        for k in (1, 5):
            got = topk_hits(self.views[0], target, k).mean()
            self.assertAlmostEqual(float(got), self.recorded["accuracy_soft_targets"][f"top{k}"], places=6)

    def test_labels_of_minus_one_and_more_than_there_are_classes(self):
        self.assertEqual(topk_hits(torch.rand(3, 4), torch.full((3,), -1), 4).tolist(), [0, 0, 0])
        self.assertEqual(topk_hits(torch.rand(3, 2), torch.tensor([0, 1, 1]), 5).tolist(), [1, 1, 1])

    def test_confusion_matrix(self):
        label, predicted = np.array([0, 0, 1, -1, 2]), np.array([0, 1, 1, 0, 1])
        got = confusion_matrix(label, predicted, 4)
        self.assertEqual(got.tolist(), [[1, 1, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]])
        # Class 3 does not occur: the mean is over the others.
        self.assertAlmostEqual(mean_class_accuracy(got), (0.5 + 1 + 0) / 3)
        self.assertTrue(np.isnan(mean_class_accuracy(confusion_matrix(np.array([-1]), np.array([0]), 2))))


if __name__ == "__main__":
    unittest.main()
