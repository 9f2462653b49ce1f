"""`omnivision.load`, `predict` and `reconstruct`: a film that is nobody's data set gets what an evaluation would say of it."""

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
from omnivision.tools.main import main
from omnivision.tools.predict import BAR, bar
from omnivision.utils.errors import UserError
from tests import runs
from tests import stage_runs as stages


class Trained(unittest.TestCase):
    """A tiny classifier and a tiny autoencoder, trained for a step or two."""

    @classmethod
    def setUpClass(cls):
        temporary = tempfile.TemporaryDirectory()
        cls.addClassCleanup(temporary.cleanup)
        cls.folder = Path(temporary.name)
        (cls.folder / "names.txt").write_text("run\njump\n<turn & stand>\n")
        films = stages.write_films(cls.folder / "films", 6)
        data = [
            *stages.write_split(cls.folder, "ucf101", "train", films),
            *stages.write_split(cls.folder, "ucf101", "val", films[:3]),
            f"++datasets.ucf101.class_names={cls.folder}/names.txt",
        ]
        command = stages.command("ft", cls.folder / "ft", *data, "pretrained_checkpoint_path=null")
        ft = stages.here([*command, "launcher.num_nodes=1"])
        assert ft.returncode == 0, ft.stderr
        split = runs.write_split(cls.folder, runs.real_films() * 6)
        mae = stages.here(runs.command(cls.folder / "mae", *split, "epochs=1", "clip_duration=0.9")[2:])
        assert mae.returncode == 0, mae.stderr

    def command(self, *arguments: object) -> tuple[int, str, str]:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main([str(argument) for argument in arguments])
        return code, out.getvalue(), err.getvalue()

    def test_scores_are_those_of_the_evaluation(self):
        with np.load(self.folder / "ft/predictions/ucf101.npz") as said:
            paths, scores = said["path"], said["scores"]
        model = omnivision.load(self.folder / "ft")
        self.assertEqual(model.shown.clip_duration, 0.7)
        for path, wanted in zip(paths[:3], scores, strict=False):
            self.assertTrue(np.allclose(model.scores(str(path)), wanted, atol=1e-5))
        best = model.predict(str(paths[0]), top=2)
        shares = torch.from_numpy(scores[0]).softmax(0)
        self.assertEqual([guess.label for guess in best], shares.argsort(descending=True)[:2].tolist())
        self.assertAlmostEqual(best[0].probability, float(shares.max()), places=5)
        self.assertEqual({guess.name for guess in model.predict(str(paths[0]))}, {"run", "jump", "<turn & stand>"})

    def test_a_folder_of_several_series(self):
        folder = self.folder / "series"
        folder.mkdir()
        for name in ("img_1", "img_2", "flow_1", "flow_2"):
            Image.new("RGB", (64, 48)).save(folder / f"{name}.png")
        code, _, err = self.command("predict", self.folder / "ft", folder)
        self.assertEqual((code, "flow_*.png, img_*.png" in err), (1, True))
        for fps, said in (([], True), (["--fps", 12.5], False)):
            code, _, err = self.command("predict", self.folder / "ft", folder, "--frame-pattern", "img_*.png", *fps)
            self.assertEqual((code, "--fps" in err), (0, said))

    def test_predict(self):
        film = str(self.folder / f"a path of more than a line {'-' * 80}.mp4")
        Path(film).symlink_to(runs.real_films()[0])
        code, out, err = self.command("predict", self.folder / "ft", film, "/gone.mp4", "--top", 2)
        self.assertEqual((code, out.splitlines()[0]), (1, film))
        self.assertEqual(len(out.splitlines()), 3)
        self.assertRegex(err, "^Model from .*best.pt .epoch 1, top-1 .*\nerror: /gone.mp4 cannot be read: No such file")
        code, out, err = self.command("predict", self.folder / "ft", film, "--json")
        guesses = json.loads(out)[film]
        self.assertEqual((code, len(guesses)), (0, 3))
        self.assertAlmostEqual(sum(guess["probability"] for guess in guesses), 1, places=5)
        for share, length in ((0, 0), (1, BAR), (0.5, BAR / 2)):
            self.assertEqual((len(bar(share)), bar(share).count("█")), (BAR, length))

    def test_reconstruct(self):
        film = runs.real_films()[0]
        for name, frames in (("x.gif", 4), ("x.png", 1)):
            code, out, _ = self.command("reconstruct", self.folder / "mae", film, self.folder / name, "--start", 1)
            self.assertEqual((code, out), (0, f"Wrote {self.folder / name}\n"))
            with Image.open(self.folder / name) as picture:
                self.assertEqual(getattr(picture, "n_frames", 1), frames)
        model = omnivision.load(self.folder / "mae")
        one, same, other = (model.reconstruct(film, seed=seed).columns["visible"] for seed in (1, 1, 2))
        self.assertTrue(np.array_equal(one, same))
        self.assertFalse(np.array_equal(one, other))
        self.assertEqual(model.shown.clip_duration, 0.9)

    def test_refused(self):
        film, ft, mae = runs.real_films()[0], self.folder / "ft", self.folder / "mae"
        found = torch.load(ft / "checkpoints/checkpoint.pt", weights_only=True)
        for name, value in (("nan.pt", float("nan")), ("huge.pt", 3e38)):
            found["model"]["heads.0.0.weight"][:] = value
            torch.save(found, self.folder / name)
        for name in ("in.gif", "kept.gif"):
            (self.folder / name).write_bytes(b"GIF8")
        torch.save({"trunk.norm.weight": torch.ones(3)}, self.folder / "bare.pt")
        for arguments, saying in (
            (("predict", mae, film), "masked autoencoder.* no classes"),
            (("reconstruct", ft, film, "x.gif"), "classifier.* no decoder"),
            (("export", ft, "a" * 300 + ".pt", "--to", "pt"), "cannot be used: File name too long"),
            (("reconstruct", mae, film, "x.jpg"), "must end in .gif"),
            (("reconstruct", mae, film, "/nowhere/x.gif"), "/nowhere/x.gif cannot be written"),
            (("reconstruct", mae, film, "x.gif", "--start", 99), "start must .* 99"),
            (("reconstruct", mae, film, "x.gif", "--mask-ratio", 1), "--mask-ratio"),
            (("predict", self.folder / "nan.pt", film), "heads.0.0.weight .*not finite"),
            (("predict", self.folder / "huge.pt", film), "not finite"),
            (("reconstruct", mae, film, film, "--force"), "must end in .gif"),
            (("reconstruct", mae, self.folder / "in.gif", self.folder / "in.gif"), "OUT is"),
            (("reconstruct", mae, film, self.folder / "kept.gif"), "--force"),
            (("predict", ft, film, "--head", 1), "head must .* 1"),
            (("predict", "", film), "'' is not a file"),
            (("predict", self.folder / "bare.pt", film), "omnivision import"),
            (("predict", self.folder / "none", film), "none.* is not a file"),
        ):
            with self.subTest(saying):
                code, _, err = self.command(*arguments)
                self.assertEqual((code, re.sub(r"^Model from .*\n", "", err).count("\n")), (1, 1))
                self.assertRegex(err, saying)
        self.assertEqual(self.command("predict", ft, film, "--top", 0)[0], 1)
        with self.assertRaises(UserError):
            omnivision.load(ft).predict("/gone.mp4")
        for asked, saying in (
            ({"top": 0}, "top must"),
            ({"clips": 0}, "clips must"),
            ({"crops": 2}, "crops must"),
        ):
            with self.assertRaisesRegex(UserError, saying):
                omnivision.load(ft).predict(film, **asked)
        with self.assertRaisesRegex(UserError, "mask_ratio must"):
            omnivision.load(mae).reconstruct(film, mask_ratio=0)


if __name__ == "__main__":
    unittest.main()
