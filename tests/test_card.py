"""An export holds how to prepare videos for its model, and a model card that nobody's names break out of."""

import json
import tempfile
import unittest
from pathlib import Path

import torch

import omnivision
from omnivision.checkpoint.state_dict_file import StateDictFile, read
from omnivision.interop.export import escape, training_history
from omnivision.utils.errors import UserError
from tests import runs
from tests import stage_runs as stages

NAMES = ["run", "jump | <b>high</b>", "turn"]


class Exported(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        temporary = tempfile.TemporaryDirectory()
        cls.addClassCleanup(temporary.cleanup)
        cls.folder = Path(temporary.name)
        (cls.folder / "names.txt").write_text("".join(f"{name}\n" for name in NAMES))
        videos = stages.write_films(cls.folder / "videos", 6)
        data = [
            *stages.write_split(cls.folder, "ucf101", "train", videos),
            *stages.write_split(cls.folder, "ucf101", "val", videos[:3]),
            f"++datasets.ucf101.class_names={cls.folder}/names.txt",
        ]
        result = stages.here(stages.command("ft", cls.folder / "ft", *data, "pretrained_checkpoint_path=null"))
        assert result.returncode == 0, result.stderr
        cls.video, cls.best = videos[0], cls.folder / "ft/checkpoints/best.pt"

    def export(self, out: str, to: str, *more: str, source: str = "ft") -> str:
        return runs.call_command("export", self.folder / source, self.folder / out, "--to", to, *more)[1]

    def test_a_file_predicts_what_its_run_predicts(self):
        expected = omnivision.load(self.folder / "ft").predict(self.video)
        self.assertEqual({each.name for each in expected}, set(NAMES))
        for out, to in (("model.pt", "pt"), ("other.safetensors", "safetensors")):
            self.export(out, to)
            model = omnivision.load(self.folder / out)
            self.assertEqual(model.config.clip_duration, 0.7)
            self.assertEqual(model.predict(self.video), expected)
            self.assertRegex(str(read(self.folder / out)), "epoch 1, top-1")
        runs.call_command("import", self.folder / "model.pt", self.folder / "back.pt")
        model = omnivision.load(self.folder / "back.pt")
        self.assertEqual((model.config.clip_duration, model.config.class_names), (0.7, [NAMES]))

    def test_card_of_a_file(self):
        self.assertIn(f"{self.folder}/carded.pt.md", self.export("carded.pt", "pt"))
        card = (self.folder / "carded.pt.md").read_text()
        self.assertTrue(card.startswith("---\nlibrary_name: omnivision\npipeline_tag: video-classification\n"))
        for expected in (
            "# carded.pt",
            f"| top1 | {runs.summary(self.folder / 'ft')['last']['val_top1']:.4g} |",
            r"run, jump \| \<b\>high\</b\>, turn",
            r"| clip\_duration | 0.7 |",
            'omnivision.load("carded.pt").predict(',
            "SHA-256",
            " M parameters, ",
        ):
            self.assertIn(expected, card)
        self.assertNotIn("<b>", card)
        self.assertEqual(escape("a\n# b `c` [d](e) <f>"), r"a \# b \`c\` \[d\](e) \<f\>")
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

    def test_weights_that_nobody_evaluated_have_no_metrics(self):
        checkpoint = torch.load(self.best, weights_only=True)
        name = "trunk.norm.weight"
        torch.save(checkpoint | {"ema": {name: checkpoint["model"][name]}}, self.folder / "averaged.pt")
        for weights, evaluated in (("ema", True), ("model", False)):
            self.export(f"of_{weights}.pt", "pt", "--weights", weights, source="averaged.pt")
            self.assertEqual("## Validation" in (self.folder / f"of_{weights}.pt.md").read_text(), evaluated)

    def test_starts_are_named_by_their_runs(self):
        experiment = json.loads(torch.load(self.best, weights_only=True)["experiment"])
        for start, name in (
            (["runs/align", "runs/other/checkpoints/best.pt"], r"align + other"),
            ("a/vit.pt", "vit.pt"),
            (None, "nothing"),
        ):
            experiment["settings"]["pretrained_checkpoint_path"] = start
            source = StateDictFile(Path("x/best.pt"), "0", {}, {"experiment": json.dumps(experiment)})
            self.assertIn(rf"| pretrained\_checkpoint\_path | {name} |", training_history(source))


if __name__ == "__main__":
    unittest.main()
