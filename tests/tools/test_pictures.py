"""Pictures of features: components, neighbors, map."""

import unittest

import numpy as np
import torch
from PIL import Image

from omnivision.checkpoint.inference_config import InferenceConfig
from omnivision.tools.main import main
from omnivision.tools.pictures import component_colors
from tests import stage_runs as stages
from tests import tiny_models as tiny


class Pictures(tiny.WeightsCase):
    def setUp(self) -> None:
        super().setUp()
        self.paths = stages.write_videos(self.folder / "videos", 9)
        self.model = self.save_run(tiny.classifier(3), inference=InferenceConfig(clip_duration=0.5).model_dump())
        self.features = self.folder / "features"
        words = [*self.paths, "--out", str(self.features), "--workers", "0", "--crops", "1"]
        self.assertEqual(main(["features", str(self.model), *words]), 0)

    def call(self, *words: object) -> int:
        return main([str(word) for word in words])

    def test_components(self) -> None:
        out = self.folder / "pca.gif"
        self.assertEqual(self.call("pca", self.model, self.paths[0], out), 0)
        with Image.open(out) as animation:
            self.assertEqual(animation.n_frames, 4)
        self.assertEqual(self.call("pca", self.model, self.paths[0], out), 1)  # exists
        before = out.read_bytes()
        self.assertEqual(self.call("pca", self.model, out, out, "--force"), 1)  # its own video
        self.assertEqual(out.read_bytes(), before)
        self.assertEqual(self.call("pca", self.model, self.paths[0], out.with_suffix(".png")), 0)
        self.assertEqual(self.call("pca", self.model, self.paths[0], self.folder / "x.png", "--components", 47), 1)

    def test_colors_are_the_principal_components(self) -> None:
        rng = np.random.default_rng(0)
        strong = rng.normal(size=200)
        tokens = torch.tensor(np.outer(strong, np.ones(5)) + 0.01 * rng.normal(size=(200, 5)), dtype=torch.float32)
        colors = component_colors(tokens, 0)
        correlation = abs(np.corrcoef(colors[:, 0], np.clip(strong, *np.quantile(strong, [0.02, 0.98])))[0, 1])
        self.assertGreater(correlation, 0.999)
        self.assertLess(abs(np.corrcoef(component_colors(tokens, 1)[:, 0], strong)[0, 1]), 0.3)

    def test_neighbors(self) -> None:
        out = self.folder / "sheet.gif"
        words = "--query-split", "val", "--among", "val", "--count", 3
        self.assertEqual(self.call("neighbors", self.features, 2, out, *words), 0)
        with Image.open(out) as sheet:
            self.assertGreater(sheet.n_frames, 1)
        self.assertEqual(self.call("neighbors", self.features, 9, self.folder / "b.gif", *words), 1)
        self.assertEqual(self.call("neighbors", self.features, 0, self.folder / "b.gif"), 1)  # no training split

    def test_map(self) -> None:
        out = self.folder / "map.html"
        self.assertEqual(self.call("map", self.features, out, "--perplexity", 3), 0)
        self.assertIn("8.mp4", out.read_text())
        self.assertEqual(self.call("map", self.features, self.folder / "b.html"), 1)  # as many neighbors as videos
        self.assertEqual(self.call("map", self.folder, self.folder / "b.html"), 1)


if __name__ == "__main__":
    unittest.main()
