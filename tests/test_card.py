"""An export carries how films are shown to its model, and a card for people that nobody's names break out of."""

import contextlib
import io
import json
import re
import tempfile
import unittest
from pathlib import Path

import torch

import omnivision
from omnivision.checkpoint.state_dict_file import StateDictFile, read
from omnivision.interop.export import escape, training_history
from omnivision.tools.main import main
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
        films = stages.write_films(cls.folder / "films", 6)
        data = [
            *stages.write_split(cls.folder, "ucf101", "train", films),
            *stages.write_split(cls.folder, "ucf101", "val", films[:3]),
            f"++datasets.ucf101.class_names={cls.folder}/names.txt",
        ]
        made = stages.here(stages.command("ft", cls.folder / "ft", *data, "pretrained_checkpoint_path=null"))
        assert made.returncode == 0, made.stderr
        cls.film = films[0]

    def export(self, out: str, to: str, *more: str) -> str:
        with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(io.StringIO()) as errors:
            code = main(["export", str(self.folder / "ft"), str(self.folder / out), "--to", to, *more])
        self.assertEqual(code, 0, errors.getvalue())
        return said.getvalue()

    def test_a_file_predicts_what_its_run_predicts(self):
        wanted = omnivision.load(self.folder / "ft").predict(self.film)
        for out, to in (("model.pt", "pt"), ("other.safetensors", "safetensors")):
            self.export(out, to)
            model = omnivision.load(self.folder / out)
            self.assertEqual(model.config.clip_duration, 0.7)
            self.assertEqual(model.predict(self.film), wanted)
            self.assertRegex(str(read(self.folder / out)), "epoch 1, top-1")
        self.assertEqual({guess.name for guess in wanted}, set(NAMES))

    def test_card_of_a_file(self):
        said = self.export("carded.pt", "pt")
        self.assertIn(f"and {self.folder}/carded.pt.md", said)
        card = (self.folder / "carded.pt.md").read_text()
        self.assertTrue(card.startswith("---\nlibrary_name: omnivision\npipeline_tag: video-classification\n"))
        summary = runs.summary(self.folder / "ft")
        best = torch.load(self.folder / "ft/checkpoints/best.pt", weights_only=True)
        for expected in (
            "# carded.pt",
            f"| top1 | {summary['last']['val_top1']:.4g} |",
            r"run, jump \| \<b\>high\</b\>, turn",
            r"| clip\_duration | 0.7 |",
            f"| steps of the next | {best['step']} |",
            'omnivision.load("carded.pt").predict("film.mp4")',
            "SHA-256",
            "| parameters | ",
        ):
            self.assertIn(expected, card)
        self.assertNotIn("<b>", card)
        (self.folder / "other.pt.md").write_text("mine")
        with contextlib.redirect_stderr(io.StringIO()) as errors:  # what somebody has written is not replaced
            code = main(["export", str(self.folder / "ft"), str(self.folder / "other.pt"), "--to", "pt", "--force"])
        self.assertEqual(code, 1)
        self.assertIn("other.pt.md", errors.getvalue())
        self.assertFalse((self.folder / "other.pt").exists())

    def test_card_and_names_of_a_folder_for_transformers(self):
        self.export("hf", "hf")
        card = (self.folder / "hf/README.md").read_text()
        self.assertIn("library_name: transformers", card)
        self.assertIn('VideoMAEForVideoClassification.from_pretrained("hf")', card)
        config = json.loads((self.folder / "hf/config.json").read_text())
        self.assertEqual(list(config["id2label"].values()), NAMES)

    def test_weights_that_nobody_evaluated_have_no_figures(self):
        found = torch.load(self.folder / "ft/checkpoints/best.pt", weights_only=True)
        name = "trunk.norm.weight"
        torch.save(found | {"ema": {name: found["model"][name]}}, self.folder / "averaged.pt")
        for weights, told in (("ema", True), ("model", False)):
            with contextlib.redirect_stdout(io.StringIO()):
                out = self.folder / f"of_{weights}.pt"
                main(["export", str(self.folder / "averaged.pt"), str(out), "--to", "pt", "--weights", weights])
            self.assertEqual("## Validation" in out.with_name(f"{out.name}.md").read_text(), told)

    def test_starts_are_told_by_the_names_of_their_runs(self):
        experiment = json.loads(torch.load(self.folder / "ft/checkpoints/best.pt", weights_only=True)["experiment"])
        for start, told in (
            (["runs/align", "runs/other/checkpoints/best.pt"], r"align + other"),
            ("a/vit.pt", "vit.pt"),
            (None, "nothing"),
        ):
            experiment["settings"]["pretrained_checkpoint_path"] = start
            source = StateDictFile(Path("x/best.pt"), "0", {}, {"experiment": json.dumps(experiment)})
            self.assertIn(rf"| pretrained\_checkpoint\_path | {told} |", training_history(source))

    def test_an_import_keeps_names_and_seconds(self):
        self.export("again.pt", "pt")
        with contextlib.redirect_stdout(io.StringIO()):
            self.assertEqual(main(["import", str(self.folder / "again.pt"), str(self.folder / "back.pt")]), 0)
        model = omnivision.load(self.folder / "back.pt")
        self.assertEqual((model.config.clip_duration, model.config.class_names), (0.7, [NAMES]))

    def test_text_stays_text(self):
        self.assertEqual(escape("a\n# b `c` [d](e)"), r"a \# b \`c\` \[d\](e)")
        self.assertIsNone(re.search(r"(?<!\\)<", escape("<script>")))


if __name__ == "__main__":
    unittest.main()
