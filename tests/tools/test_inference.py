"""`omnivision.load`, `predict` and `reconstruct`: a video outside any dataset gets the scores of an evaluation.

Exports hold how to prepare videos for their model, and a model card that nobody's names break out of.
"""

import contextlib
import io
import json
import re
import tempfile
import unittest
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import omnivision
from omnivision.checkpoint.inference_config import InferenceConfig
from omnivision.checkpoint.state_dict_file import StateDictFile, read_weights
from omnivision.interop.export import escape_markdown, training_facts
from omnivision.tools.main import main
from omnivision.utils.errors import UserError
from tests import runs
from tests import stage_runs as stages

NAMES = ["run", "jump | <b>high</b>", "turn"]


class Trained(unittest.TestCase):
    """A tiny classifier and a tiny autoencoder, trained for a step or two."""

    @classmethod
    def setUpClass(cls):
        cls.folder = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        cls.ft, cls.mae = cls.folder / "ft", cls.folder / "mae"
        (cls.folder / "names.txt").write_text("\n".join(NAMES))
        videos = stages.write_videos(cls.folder / "videos", 6)
        cls.video, cls.best = videos[0], cls.ft / "checkpoints/best.pt"
        data = [
            *stages.write_split(cls.folder, "ucf101", "train", videos),
            *stages.write_split(cls.folder, "ucf101", "val", videos[:3]),
            f"++datasets.ucf101.class_names={cls.folder}/names.txt",
        ]
        split = runs.write_split(cls.folder, runs.real_videos() * 6)
        mask = (
            "trainer.task.norm=none",
            "mask_ratio=0.75",
            "trainer.data.mask._target_=omnivision.data.masking.TubeMask",
        )
        for command in (
            stages.command("ft", cls.ft, *data, "pretrained_checkpoint_path=null", "launcher.num_nodes=1"),
            runs.command(cls.mae, *split, *mask, "epochs=1", "clip_duration=0.9")[2:],
        ):
            result = stages.run_in_process(command)
            assert result.returncode == 0, result.stderr

    def command(self, *arguments: object) -> tuple[int, str, str]:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main([str(argument) for argument in arguments])
        return code, out.getvalue(), err.getvalue()

    def test_scores_equal_those_of_the_evaluation(self):
        with np.load(self.ft / "predictions/ucf101.npz") as saved:
            paths, scores = saved["path"], saved["scores"]
        model = omnivision.load(self.ft)
        self.assertEqual(model.config.clip_duration, 0.7)
        for path, expected in zip(paths[:3], scores, strict=False):
            self.assertTrue(np.allclose(model.scores(str(path)), expected, atol=1e-5))
        best = model.predict(str(paths[0]), top=2)
        shares = torch.from_numpy(scores[0]).softmax(0)
        self.assertEqual([each.label for each in best], shares.argsort(descending=True)[:2].tolist())
        self.assertAlmostEqual(best[0].probability, float(shares.max()), places=5)
        self.assertEqual({each.name for each in model.predict(str(paths[0]))}, set(NAMES))

    def test_a_folder_of_several_series(self):
        folder = self.folder / "series"
        folder.mkdir()
        for name in ("img_1", "img_2", "flow_1", "flow_2"):
            Image.new("RGB", (64, 48)).save(folder / f"{name}.png")
        code, _, err = self.command("predict", self.ft, folder)
        self.assertEqual((code, "flow_*.png, img_*.png" in err), (1, True))
        for fps, assumed in (([], True), (["--fps", 12.5], False)):
            code, _, err = self.command("predict", self.ft, folder, "--frame-pattern", "img_*.png", *fps)
            self.assertEqual((code, "--fps" in err), (0, assumed))

    def test_predict(self):
        video = str(self.folder / f"a path of more than a line {'-' * 80}.mp4")
        Path(video).symlink_to(runs.real_videos()[0])
        code, out, err = self.command("predict", self.ft, video, "/gone.mp4", "--top", 2)
        self.assertEqual((code, out.splitlines()[0], len(out.splitlines())), (1, video, 3))
        self.assertRegex(err, "^Model from .*best.pt .epoch 1, top-1 .*\nerror: /gone.mp4 cannot be read")
        code, out, err = self.command("predict", self.ft, video, "--json")
        predictions = json.loads(out)[video]
        self.assertEqual((code, {each["name"] for each in predictions}), (0, set(NAMES)))
        self.assertAlmostEqual(sum(each["probability"] for each in predictions), 1, places=5)

    def test_reconstruct(self):
        video = runs.real_videos()[0]
        for name, frames in (("x.gif", 4), ("x.png", 1)):
            code, out, _ = self.command("reconstruct", self.mae, video, self.folder / name, "--start", 1)
            self.assertEqual((code, out), (0, f"Wrote {self.folder / name}\n"))
            with Image.open(self.folder / name) as image:
                self.assertEqual(getattr(image, "n_frames", 1), frames)
        model = omnivision.load(self.mae)
        one, same, other = (model.reconstruct(video, seed=seed).columns["visible"] for seed in (1, 1, 2))
        self.assertTrue(np.array_equal(one, same))
        self.assertFalse(np.array_equal(one, other))
        self.assertEqual(model.config.clip_duration, 0.9)

    def test_reconstruct_masks_as_the_run_did(self):
        self.export("mae.pt", "pt", source="mae")
        for source in (self.mae, self.folder / "mae.pt"):
            config = omnivision.load(source).config
            self.assertEqual((config.mask, config.mask_ratio, config.norm), ("TubeMask", 0.75, "none"))
        for settings in ({}, {"trainer.data.mask._target_": "own.Mask"}, {"trainer.data.mask.ratio": "much"}):
            self.assertEqual(InferenceConfig().with_settings(settings).mask, "RandomMask")
        for norm, expected in (("patch", "patch"), ("none", "none"), ("own", "channel"), (None, "channel")):
            self.assertEqual(InferenceConfig().with_settings({"trainer.task.norm": norm}).norm, expected)
        columns = omnivision.load(self.mae).reconstruct(self.video).columns
        self.assertEqual(set(columns), {"original", "visible", "mask", "reconstruction"}, "of plain pixels")
        mask = columns["mask"]
        self.assertTrue((mask == mask[:1]).all(), "a tube hides the same tokens of every frame")
        self.assertAlmostEqual(mask.mean() / 255, 0.75)

    def test_refused(self):
        video, ft, mae = runs.real_videos()[0], self.ft, self.mae
        checkpoint = torch.load(ft / "checkpoints/checkpoint.pt", weights_only=True)
        for name, value in (("nan.pt", float("nan")), ("huge.pt", 3e38)):
            checkpoint["model"]["heads.0.0.weight"][:] = value
            torch.save(checkpoint, self.folder / name)
        for name in ("in.gif", "kept.gif"):
            (self.folder / name).write_bytes(b"GIF8")
        torch.save({"trunk.norm.weight": torch.ones(3)}, self.folder / "bare.pt")
        for arguments, named in (
            (("predict", mae, video), "MaskedAutoencoder.* no classes"),
            (("predict", self.folder / "nan.pt", video), "heads.0.0.weight .*not finite"),
            (("predict", self.folder / "huge.pt", video), "not finite"),
            (("predict", ft, video, "--head", 1), "head 0 to 0 .* 1"),
            (("predict", ft, video, "--device", "tpu"), "device"),
            (("predict", self.folder / "bare.pt", video), "omnivision import"),
            (("export", ft, "a" * 300 + ".pt", "--to", "pt"), "File name too long"),
            (("reconstruct", ft, video, "x.gif"), "VideoClassifier.* no decoder"),
            (("reconstruct", mae, video, "x.jpg"), "OUT"),
            (("reconstruct", mae, video, video, "--force"), "OUT"),
            (("reconstruct", mae, self.folder / "in.gif", self.folder / "in.gif", "--force"), "OUT"),
            (("reconstruct", mae, video, self.folder / "kept.gif"), "--force"),
            (("reconstruct", mae, video, "/nowhere/x.gif"), "/nowhere/"),
            (("reconstruct", mae, video, "x.gif", "--start", 99), "start must .* 99"),
            (("reconstruct", mae, video, "x.gif", "--mask-ratio", 1), "--mask-ratio"),
        ):
            with self.subTest(arguments[2:]):
                code, _, err = self.command(*arguments)
                self.assertEqual((code, re.sub(r"^Model from .*\n", "", err).count("\n")), (1, 1), err)
                self.assertRegex(err, named)
        for options, named in (({"clips": 0}, "clips"), ({"crops": 2}, "crops"), ({"head": -1}, "head")):
            with self.assertRaisesRegex(UserError, named):
                omnivision.load(ft).predict(video, **options)
        with self.assertRaisesRegex(UserError, "mask_ratio"):
            omnivision.load(mae).reconstruct(video, mask_ratio=0)

    def export(self, out: str, to: str, *more: str, source: str = "ft") -> str:
        return runs.call_command("export", self.folder / source, self.folder / out, "--to", to, *more)[1]

    def test_exported_file_predicts_like_its_run(self):
        expected = omnivision.load(self.folder / "ft").predict(self.video)
        self.assertEqual({each.name for each in expected}, set(NAMES))
        for out, to in (("model.pt", "pt"), ("other.safetensors", "safetensors")):
            self.export(out, to)
            model = omnivision.load(self.folder / out)
            self.assertEqual(model.config.clip_duration, 0.7)
            self.assertEqual(model.predict(self.video), expected)
            self.assertRegex(str(read_weights(self.folder / out)), "epoch 1, top-1")
        runs.call_command("import", self.folder / "model.pt", self.folder / "back.pt")
        model = omnivision.load(self.folder / "back.pt")
        self.assertEqual((model.config.clip_duration, model.config.class_names), (0.7, [NAMES]))

    def test_card_of_a_file(self):
        self.assertIn(f"{self.folder}/carded.pt.md", self.export("carded.pt", "pt"))
        card = (self.folder / "carded.pt.md").read_text()
        self.assertTrue(card.startswith("---\nlibrary_name: omnivision\npipeline_tag: video-classification\n"))
        for expected in (
            "# carded.pt",
            f"| top1 | {runs.read_summary(self.folder / 'ft')['last']['val_top1']:.4g} |",
            r"run, jump \| \<b\>high\</b\>, turn",
            r"| clip\_duration | 0.7 |",
            'omnivision.load("carded.pt").predict(',
            "SHA-256",
            " M parameters, ",
        ):
            self.assertIn(expected, card)
        self.assertNotIn("<b>", card)
        self.assertEqual(escape_markdown("a\n# b `c` [d](e) <f>"), r"a \# b \`c\` \[d\](e) \<f\>")
        (self.folder / "mine.pt.md").write_text("mine")
        with self.assertRaisesRegex(UserError, "mine.pt.md"):  # a file of the user's is not replaced
            self.export("mine.pt", "pt", "--force")
        self.assertFalse((self.folder / "mine.pt").exists())

    def test_card_and_names_of_a_folder_for_transformers(self):
        self.export("hf", "hf")
        card = (self.folder / "hf/README.md").read_text()
        self.assertIn("library_name: transformers", card)
        self.assertIn('VideoMAEForVideoClassification.from_pretrained("hf")', card)
        config = json.loads((self.folder / "hf/config.json").read_text())
        self.assertEqual(list(config["id2label"].values()), NAMES)

    def test_weights_without_evaluation_have_no_metrics(self):
        checkpoint = torch.load(self.best, weights_only=True)
        name = "trunk.norm.weight"
        torch.save(checkpoint | {"ema": {name: checkpoint["model"][name]}}, self.folder / "averaged.pt")
        for weights, evaluated in (("ema", True), ("model", False)):
            self.export(f"of_{weights}.pt", "pt", "--weights", weights, source="averaged.pt")
            self.assertEqual("## Validation" in (self.folder / f"of_{weights}.pt.md").read_text(), evaluated)

    def test_starts_are_named_by_their_runs(self):
        experiment = json.loads(torch.load(self.best, weights_only=True)["experiment"])
        for start, name in (
            (["runs/align", "runs/other/checkpoints/best.pt"], "align + other"),
            ("a/vit.pt", "vit.pt"),
            (None, "nothing"),
        ):
            experiment["settings"]["pretrained_checkpoint_path"] = start
            source = StateDictFile(Path("x/best.pt"), "0", {}, {"experiment": json.dumps(experiment)})
            self.assertEqual(training_facts(source)["pretrained_checkpoint_path"], name)


if __name__ == "__main__":
    unittest.main()
