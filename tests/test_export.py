"""`omnivision export`: what is written computes what it was made from, comes back the same, and replaces nothing unasked."""

import builtins
import copy
import hashlib
import json
import re
import tempfile
import unittest
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import VideoMAEForVideoClassification, VideoMAEImageProcessor, VideoMAEModel
from transformers.utils.logging import disable_progress_bar

from omnivision.checkpoint.state_dict_file import read
from omnivision.models.architecture import build, describe
from omnivision.models.average import AveragedClassifier
from omnivision.models.classifier import VideoClassifier
from omnivision.models.mae import MaskedAutoencoder
from omnivision.models.vit import VisionTransformer
from omnivision.tools import export
from omnivision.utils.errors import UserError
from omnivision.utils.io import safe_load
from tests import other_transformers, runs

disable_progress_bar()


def trunk() -> VisionTransformer:
    return VisionTransformer(48, 2, 3, num_frames=4, image_size=32, tubelet=(2, 8, 8))


def scrambled(model: nn.Module, seed: int = 3) -> Any:
    torch.manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def classifier(*classes: int, seed: int = 3) -> VideoClassifier:
    return scrambled(VideoClassifier(trunk(), classes or [7]), seed)


def autoencoder() -> MaskedAutoencoder:
    return scrambled(MaskedAutoencoder(trunk(), {"width": 24, "depth": 2, "heads": 4}))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Case(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.folder = Path(temporary.name)

    def save(self, model: nn.Module, name: str = "checkpoint.pt", /, **more: Any) -> Path:
        """A checkpoint as a run writes it, as far as it matters here."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        said = {"format": 1, "architecture": describe(model), "ema": None, "sources": [], "optimizer": {"state": {}}}
        torch.save(said | {"model": model.state_dict()} | more, path)
        return path

    def run_command(self, name: str, *arguments: object) -> str:
        code, out, _ = runs.call_command(name, *arguments)
        self.assertEqual(code, 0)
        return out

    def assert_read_rightly(self, version: str) -> None:
        """What a version of transformers makes of a classifier and of an autoencoder is what we make of them."""
        folders, wanted = [], []
        for name, model in (("classifier", classifier()), ("autoencoder", autoencoder())):
            folder, clip = self.folder / version / name, torch.randn(2, 3, 4, 32, 32)
            self.run_command("export", self.save(model), folder, "--to", "hf")
            torch.save(clip.transpose(1, 2), folder / "clip.pt")
            with torch.no_grad():
                wanted.append(model(clip) if name == "classifier" else model.trunk.norm(model.trunk(clip)))
            folders.append(folder)
        other_transformers.run_receiver(version, folders)
        for folder, ours in zip(folders, wanted, strict=True):
            # Rounding in single precision, and the other epsilon of the last norm.
            torch.testing.assert_close(torch.load(folder / "outputs.pt"), ours, rtol=0, atol=5e-5)

    def assert_equal_states(self, one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
        self.assertEqual(set(one), set(other))
        for name, tensor in one.items():
            self.assertTrue(torch.equal(tensor, other[name]), name)


class OurNames(Case):
    def test_out_and_in_again_is_the_same(self):
        for model in (classifier(), classifier(4, 9), autoencoder()):
            source = self.save(model)
            for to in ("pt", "safetensors"):
                out, back = self.folder / f"out.{to}", self.folder / "back.pt"
                told = self.run_command("export", source, out, "--to", to, "--force")
                self.assertIn("of width 48, depth 2, 3 heads", told)
                self.assertIn("format omnivision", self.run_command("import", out, back, "--force"))
                found = safe_load(back)
                self.assert_equal_states(found["model"], model.state_dict())
                self.assertEqual(found["architecture"], describe(model))
                self.assertEqual(read(out).metadata["origin"]["sha256"], sha256(source))
                self.assertLess(out.stat().st_size, 1.2 * source.stat().st_size)

    def test_a_run_folder_gives_its_best(self):
        best = self.save(classifier(seed=5), "run/checkpoints/best.pt")
        self.save(classifier(seed=6), "run/checkpoints/checkpoint.pt")
        self.run_command("export", self.folder / "run", self.folder / "out.safetensors", "--to", "safetensors")
        self.assert_equal_states(load_file(self.folder / "out.safetensors"), safe_load(best)["model"])

    def test_the_moving_average(self):
        model, average = classifier(), dict(classifier(seed=9).named_parameters())
        ema = {name: tensor.detach() for name, tensor in average.items() if "heads" in name}
        source, out = self.save(model, ema=ema), self.folder / "out.pt"
        for options, averaged in (((), True), (("--weights", "ema"), True), (("--weights", "model"), False)):
            told = self.run_command("export", source, out, "--to", "pt", "--force", *options)
            self.assertEqual("moving average" in told, averaged)
            self.assert_equal_states(safe_load(out)["model"], model.state_dict() | (ema if averaged else {}))
        with self.assertRaisesRegex(UserError, "EMA.*--weights model"):
            self.run_command("export", self.save(model), out, "--to", "pt", "--force", "--weights", "ema")
        with self.assertRaisesRegex(UserError, "EMA.*'x'"):
            self.run_command("export", self.save(model, ema={"x": torch.zeros(1)}), out, "--to", "pt", "--force")

    def test_nothing_is_replaced_unasked(self):
        source, taken = self.save(classifier()), self.folder / "taken"
        for to in ("pt", "safetensors", "hf"):
            out = self.folder / f"taken.{to}"
            out.mkdir() if to == "hf" else out.touch()
            precious = out / "config.json" if to == "hf" else out
            precious.write_text("precious")
            with self.assertRaisesRegex(UserError, "exists.*--force"):
                self.run_command("export", source, out, "--to", to)
            self.assertEqual(precious.read_text(), "precious")
            self.run_command("export", source, out, "--to", to, "--force")
            self.assertNotEqual(precious.read_bytes(), b"precious")
        for out, to, message in (
            (self.folder, "hf", "OUT"),
            (source, "pt", "OUT"),
            (self.folder / "taken.pt", "hf", "OUT"),
            (self.folder / "taken.hf", "pt", "OUT"),
            (taken, "pt", r"end in \.pt"),
            (taken, "safetensors", r"end in \.safetensors"),
        ):
            with self.assertRaisesRegex(UserError, message):
                self.run_command("export", source, out, "--to", to, "--force")
        self.assertEqual([path.name for path in self.folder.glob(".*")], [], "no temporary files")

    def test_what_makes_no_sense_is_refused(self):
        source, out = self.save(classifier()), self.folder / "out.pt"
        torch.save(classifier().state_dict(), self.folder / "bare.pt")
        said = describe(autoencoder())
        for part, option in (("trunk", "num"), ("decoder", "decoder")):  # an export assumes nothing
            silent = said | {part: {key: value for key, value in said[part].items() if key != "heads"}}
            with self.assertRaisesRegex(UserError, rf"--{option}-heads"):
                file = self.save(autoencoder(), "silent.pt", architecture=silent)
                self.run_command("export", file, out, "--to", "pt")
        for arguments, message in (
            ((self.folder / "bare.pt", out, "--to", "pt"), "omnivision import"),
            ((source, out, "--to", "pt", "--merge"), "classifier. Leave --merge out"),
            ((source, out, "--to", "pt", "--sources", "a"), "--sources.*--merge"),
            ((source, out, "--to", "pt", "--class-names", "a"), "--class-names.*--to hf"),
            ((source, out, "--to", "pt", "--head", "1"), "--head.*--to hf"),
            ((self.save(classifier(), "b.pt", model={}), out, "--to", "pt"), "no tensors"),
        ):
            with self.assertRaisesRegex(UserError, message):
                self.run_command("export", *arguments)
        self.assertFalse(out.exists())


class HuggingFace(Case):
    def test_classifier(self):
        model, out, names = classifier(), self.folder / "out", self.folder / "names.txt"
        names.write_text("\n".join("äbcdefg") + "\n", encoding="utf-8")
        told = self.run_command("export", self.save(model), out, "--to", "hf", "--class-names", names)
        same, as_is = map(float, re.search(r"Verified: .* by (\S+) \(.* by (\S+) with", told).groups())
        self.assertLess(same, 1e-9)
        self.assertLess(as_is, 5e-5)
        self.assertNotIn("not carried", told)
        theirs = VideoMAEForVideoClassification.from_pretrained(out, local_files_only=True)
        self.assertEqual(theirs.config.id2label[0], "ä")
        self.assertEqual(theirs.config.label2id["g"], 6)
        clip = torch.randn(2, 3, 4, 32, 32)
        with torch.no_grad():
            self.assertLess((theirs(clip.transpose(1, 2)).logits - model(clip)).abs().max(), 5e-5)
        self.assertEqual({path.name for path in out.iterdir()}, {
            "README.md", "config.json", "model.safetensors", "preprocessor_config.json"
        })  # fmt: skip
        pixels = VideoMAEImageProcessor.from_pretrained(out, local_files_only=True)
        frame = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
        seen = torch.as_tensor(pixels([[frame.permute(1, 2, 0).numpy()]], return_tensors="pt")["pixel_values"])[0, 0]
        mean, std = torch.tensor(pixels.image_mean)[:, None, None], torch.tensor(pixels.image_std)[:, None, None]
        self.assertLess((seen - (frame / 255 - mean) / std).abs().max(), 1e-5)

    def test_encoder_and_back(self):
        model, out, back = autoencoder(), self.folder / "out", self.folder / "back.pt"
        told = self.run_command("export", self.save(model), out, "--to", "hf")
        self.assertLess(float(re.search(r"Verified: .* tokens .* by (\S+) ", told)[1]), 1e-9)
        self.assertRegex(told, r"trunk\.mask_token, .*its decoder")
        theirs = VideoMAEModel.from_pretrained(out, local_files_only=True).double()
        clip = torch.randn(2, 3, 4, 32, 32).double()
        model.double()
        ours = model.trunk.norm(model.trunk(clip))
        self.assertLess((theirs(clip.transpose(1, 2)).last_hidden_state - ours).abs().max(), 1e-9)
        self.run_command("import", out, back)
        found, wanted = safe_load(back)["model"], model.float().trunk.state_dict()
        self.assert_equal_states(found, {f"trunk.{n}": t for n, t in wanted.items() if f"trunk.{n}" in found})

    def test_every_bias_has_the_names_of_all_versions(self):
        for model, base in ((classifier(), "videomae."), (autoencoder(), "")):
            self.run_command("export", self.save(model), self.folder / "out", "--to", "hf", "--force")
            stored = load_file(self.folder / "out" / "model.safetensors")
            for number, block in enumerate(model.trunk.blocks):
                attention = f"{base}encoder.layer.{number}.attention.attention."
                for part, bias in zip(("query", "key", "value"), block.attn.qkv.bias.chunk(3), strict=True):
                    self.assertTrue(torch.equal(stored[f"{attention}{part}.bias"], bias))
                    if part != "key":  # the other versions have none
                        self.assertTrue(torch.equal(stored[f"{attention}{part[0]}_bias"], bias))

    def test_a_version_that_reads_other_names(self):
        version = other_transformers.IN_SUITE
        if not other_transformers.folder_of(version).is_dir():
            self.skipTest(f"needs another version of transformers: make build/transformers/{version}")
        self.assert_read_rightly(version)

    def test_one_of_several_heads(self):
        model, out = classifier(4, 9), self.folder / "out"
        told = self.run_command("export", self.save(model), out, "--to", "hf", "--head", "1")
        self.assertRegex(told, r"not carried +2  heads\.0\.0\.weight, heads\.0\.0\.bias \(another head")
        self.assertEqual(json.loads((out / "config.json").read_text())["id2label"]["8"], "LABEL_8")
        self.assertTrue(
            torch.equal(load_file(out / "model.safetensors")["classifier.weight"], model.heads[1][0].weight)
        )

    def test_16_bits(self):
        for dtype in (torch.float16, torch.bfloat16):
            model, out = classifier().to(dtype), self.folder / "out"
            told = self.run_command("export", self.save(model), out, "--to", "hf", "--force")
            self.assertRegex(told, r"not carried +1  trunk\.pos_embed \(rounded to 16 bits")
            self.assertLess(float(re.search(r"Verified: .* by (\S+) \(", told)[1]), 1e-9)
            stored = load_file(out / "model.safetensors")["classifier.weight"]
            self.assertTrue(torch.equal(stored, model.heads[0][0].weight))

    def test_names_and_folders_that_cannot_be(self):
        source, out, names = self.save(classifier()), self.folder / "out", self.folder / "names.txt"
        (self.folder / "films").mkdir()
        (self.folder / "films/a.mp4").touch()
        with self.assertRaisesRegex(UserError, "OUT.*config.json"):
            self.run_command("export", source, self.folder / "films", "--to", "hf", "--force")
        for text in ("", "a\n\nb\nc\nd\ne\nf\n"):
            names.write_text(text)
            with self.assertRaisesRegex(UserError, "--class-names"):
                self.run_command("export", source, out, "--to", "hf", "--class-names", names)
        with self.assertRaisesRegex(UserError, "--class-names is '/dev/zero', which cannot be read"):
            self.run_command("export", source, out, "--to", "hf", "--class-names", "/dev/zero")

    def test_an_import_keeps_class_names(self):
        source, names, out = self.save(classifier()), self.folder / "names.txt", self.folder / "out"
        wanted = [f"class {label}" for label in range(classifier().heads[0][0].out_features)]
        names.write_text("\n".join(wanted))
        self.run_command("export", source, out, "--to", "hf", "--class-names", names)
        self.run_command("import", out, self.folder / "back.pt")
        self.assertEqual(read(self.folder / "back.pt").class_names, [wanted])
        config = json.loads((out / "config.json").read_text())
        placeholders = {str(label): f"LABEL_{label}" for label in range(len(wanted))}
        for labels in (placeholders, {"0": "a"}, {"a": "b"}, [1], {str(label): label for label in range(len(wanted))}):
            (out / "config.json").write_text(json.dumps(config | {"id2label": labels}))
            self.run_command("import", out, self.folder / "back.pt", "--force")
            self.assertEqual(read(self.folder / "back.pt").class_names, [], labels)

    def test_a_model_that_diverged_is_not_blamed_on_the_library(self):
        for model in (classifier(), autoencoder()):
            model.trunk.norm.weight.data[0] = float("nan")
            with self.assertRaisesRegex(UserError, "not finite"):
                self.run_command("export", self.save(model), self.folder / "out", "--to", "hf")
            self.assertEqual([path.name for path in self.folder.iterdir()], ["checkpoint.pt"])

    def test_other_tubelets_and_ratios(self):
        model = scrambled(VideoClassifier(VisionTransformer(48, 1, 3, 2.5, 4, 32, (4, 8, 16)), [3]))
        self.assertIn("Verified", self.run_command("export", self.save(model), self.folder / "out", "--to", "hf"))
        self.run_command("import", self.folder / "out", self.folder / "back.pt")
        self.assertEqual(safe_load(self.folder / "back.pt")["architecture"], describe(model) | {"classes": [3]})

    def test_features_that_vary_little_are_told(self):
        model = classifier()
        with torch.no_grad():
            for block in model.trunk.blocks:
                block.attn.proj.weight.zero_()
                block.mlp.fc2.weight.zero_()
                block.attn.proj.bias.zero_()
                block.mlp.fc2.bias.zero_()
            model.trunk.patch_embed.proj[1].weight.mul_(1e-3)
            model.trunk.patch_embed.proj[1].bias.copy_(-model.trunk.pos_embed.mean((0, 1)))
        told = self.run_command("export", self.save(model), self.folder / "out", "--to", "hf")
        self.assertIn("fc_norm.eps", told)

    def test_a_wrong_tensor_is_found_and_nothing_is_written(self):
        source, out = self.save(classifier()), self.folder / "out"
        right = export.to_hf

        def wrong(*arguments: Any) -> Any:
            made = right(*arguments)
            attention = "videomae.encoder.layer.1.attention.attention."
            for name in ("q_bias", "query.bias"):  # whichever this version reads
                made.state[f"{attention}{name}"] = made.state[f"{attention}v_bias"].clone()
            return made

        with mock.patch.object(export, "to_hf", wrong), self.assertRaisesRegex(UserError, "--to pt"):
            self.run_command("export", source, out, "--to", "hf")
        self.assertEqual([path.name for path in self.folder.iterdir()], ["checkpoint.pt"])

    def test_without_the_library_it_says_that_nothing_was_proved(self):
        original = builtins.__import__

        def missing(name: str, *arguments: Any, **more: Any) -> Any:
            if name.partition(".")[0] == "transformers":
                raise ModuleNotFoundError(name)
            return original(name, *arguments, **more)

        with mock.patch("builtins.__import__", missing):
            told = self.run_command("export", self.save(classifier()), self.folder / "out", "--to", "hf")
        self.assertIn("omnivision[hf]", told)
        VideoMAEForVideoClassification.from_pretrained(self.folder / "out", local_files_only=True)

    def test_class_names_must_fit(self):
        source, names = self.save(classifier()), self.folder / "names.txt"
        for model, text, message in (
            (source, "a\nb\n", "--class-names must have 7.* got 2"),
            (source, "a\n" * 7, "--class-names.*7"),
            (self.save(autoencoder(), "mae.pt"), "a\n", "--class-names.*no classes"),
        ):
            names.write_text(text)
            with self.assertRaisesRegex(UserError, message):
                self.run_command("export", model, self.folder / "out", "--to", "hf", "--class-names", names)
        names.write_bytes(b"\xff")
        with self.assertRaisesRegex(UserError, "cannot be read"):
            self.run_command("export", source, self.folder / "out", "--to", "hf", "--class-names", names)


class Merging(Case):
    def average(self, mode: str, name: str = "average.pt", **more: Any) -> tuple[AveragedClassifier, Path, list[Path]]:
        """An average of an autoencoder and a classifier, with mixing weights that are not equal, and its checkpoint."""
        files = [self.save(autoencoder(), "a.pt"), self.save(classifier(5, seed=8), "b.pt")]
        model = AveragedClassifier(trunk(), [7, 3], 2, mode)
        scrambled(model, 11)
        model.load_sources([safe_load(file)["model"] for file in files])
        noted = [{"path": str(file), "sha256": sha256(file)} for file in files]
        return model, self.save(model, name, **{"sources": noted} | more), files

    def test_one_model_computes_what_the_average_does(self):
        clip = torch.randn(2, 3, 4, 32, 32)
        for mode in ("learned_average_softmax", "learned_average_layer_softmax"):
            average, source, _ = self.average(mode)
            out = self.folder / "one.pt"
            told = self.run_command("export", source, out, "--to", "pt", "--merge", "--force")
            difference = float(re.search(r"Merged 2 checkpoints; .* differ by (\S+) from", told)[1])
            self.assertLessEqual(difference, 1e-6)
            found = safe_load(out)
            self.assertEqual(found["architecture"], describe(classifier(7, 3)))
            one = build(found["architecture"], "here").eval()
            one.load_state_dict(found["model"])
            with torch.no_grad():
                for head in (0, 1):
                    self.assertLessEqual((one(clip, head) - average(clip, head)).abs().max(), 1e-6)
                    self.assertGreater((one(clip, head) - classifier(7, 3)(clip, head)).abs().max(), 0.1)
        told = self.run_command("export", source, self.folder / "hf", "--to", "hf", "--merge")
        self.assertIn("Verified", told)

    def test_sources_may_have_more_than_the_average_takes(self):
        """Positions of another clip size, and an embedding of depth: training leaves both in the sources, too."""
        for clip, depth in ((8, False), (4, True)):
            source_trunks = [VisionTransformer(48, 2, 3, 4, 4, 32, (2, 8, 8), rgbd=depth) for _ in range(2)]
            models = [scrambled(VideoClassifier(trunk, [5]), seed) for seed, trunk in enumerate(source_trunks)]
            files = [self.save(model, f"source_{number}.pt") for number, model in enumerate(models)]
            average = AveragedClassifier(VisionTransformer(48, 2, 3, 4, clip, 32, (2, 8, 8)), [7])
            average.load_sources([model.state_dict() for model in models])
            noted = [{"path": str(file), "sha256": sha256(file)} for file in files]
            source, out = self.save(average, "average.pt", sources=noted), self.folder / "one.pt"
            self.run_command("export", source, out, "--to", "pt", "--merge", "--force")
            self.assert_equal_states(safe_load(out)["model"], average.merged())
            self.assertEqual(safe_load(out)["architecture"]["trunk"]["num_frames"], clip)

    def test_what_the_average_took_of_its_sources_is_taken_again(self):
        """A choice may give tensors of one shape each other's names."""
        first, second = "trunk.blocks.0.norm1.weight", "trunk.blocks.0.norm2.weight"
        choice = {"rename": {first: "held", second: first, "held": second}}
        average, _, files = self.average("learned_average_softmax")
        states = [safe_load(file)["model"] for file in files]
        average.load_sources([state | {first: state[second], second: state[first]} for state in states])
        noted = [{"path": str(file), "sha256": sha256(file), "choice": choice} for file in files]
        source, out = self.save(average, "renamed.pt", sources=noted), self.folder / "one.pt"
        self.run_command("export", source, out, "--to", "pt", "--merge")
        self.assert_equal_states(safe_load(out)["model"], average.merged())
        for damage in (3, [1], {"keep": 3}, {"nope": 1}, {"rename": [1]}):
            with self.subTest(damage), self.assertRaisesRegex(UserError, "note its sources.*choice"):
                damaged = [note | {"choice": damage} for note in noted]
                source = self.save(average, "damaged.pt", sources=damaged)
                self.run_command("export", source, self.folder / "two.pt", "--to", "pt", "--merge")

    def test_the_moving_average_of_an_average(self):
        _, source, _ = self.average("learned_average_softmax")
        ema = {"mixing_ratio": torch.tensor([30.0, -30.0])}
        torch.save(safe_load(source) | {"ema": ema}, self.folder / "ema.pt")
        out = self.folder / "one.pt"
        self.run_command("export", self.folder / "ema.pt", out, "--to", "pt", "--merge")
        wanted = autoencoder().trunk.blocks[1].mlp.fc1.weight
        self.assertLess((safe_load(out)["model"]["trunk.blocks.1.mlp.fc1.weight"] - wanted).abs().max(), 1e-6)

    def test_sources_that_moved_are_given_again(self):
        _, source, files = self.average("learned_average_softmax")
        moved = [file.rename(file.with_name(f"moved_{file.name}")) for file in files]
        out = self.folder / "one.pt"
        command = ("export", source, out, "--to", "pt", "--merge")
        with self.assertRaisesRegex(UserError, "a.pt.*--sources FILE FILE"):
            self.run_command(*command)
        with self.assertRaisesRegex(UserError, "SHA-256.*--sources FILE FILE"):
            self.run_command(*command, "--sources", *reversed(moved))
        with self.assertRaisesRegex(UserError, "--sources FILE FILE"):
            self.run_command(*command, "--sources", *moved, moved[0])
        right = moved[1].read_bytes()
        moved[1].write_bytes(self.save(classifier(5, seed=1), "c.pt").read_bytes())
        with self.assertRaisesRegex(UserError, "SHA-256"):
            self.run_command(*command, "--sources", *moved)
        moved[1].write_bytes(right)
        self.run_command(*command, "--sources", *moved)
        self.assertTrue(out.exists())

    def test_one_file_that_holds_all_sources(self):
        average, _, files = self.average("learned_average_softmax")
        both = self.folder / "both.pt"
        torch.save({"ensemble_weights": [safe_load(file)["model"] for file in files]}, both)
        noted = [{"path": str(both), "sha256": sha256(both)}] * 2
        source, out = self.save(average, "average.pt", sources=noted), self.folder / "one.pt"
        self.run_command("export", source, out, "--to", "pt", "--merge")
        self.assert_equal_states(safe_load(out)["model"], average.merged())

    def test_what_is_no_average_is_refused(self):
        average, source, _ = self.average("learned_average_softmax")
        command = ("export", source, self.folder / "one.pt", "--to", "pt")
        with self.assertRaisesRegex(UserError, "Add --merge"):
            self.run_command(*command)
        with self.assertRaisesRegex(UserError, "omnivision export CHECKPOINT OUT.pt --to pt --merge"):
            self.run_command("import", source, self.folder / "one.pt")
        good = copy.deepcopy(safe_load(source))  # it is mapped from the file that is written to below
        huge = good["architecture"] | {"num_models": 10**9, "trunk": good["architecture"]["trunk"] | {"depth": 10**9}}
        for changes, message in (
            ({"sources": []}, "sources"),
            ({"sources": None}, "note its sources"),
            ({"sources": [{"path": "x"}]}, "note its sources"),
            ({"model": {**good["model"], "mixing_ratio": torch.ones(3)}}, r"mixing_ratio .*\(3,\)"),
            ({"model": {n: t for n, t in good["model"].items() if n != "mixing_ratio"}}, "mixing_ratio .*none"),
            ({"model": {**good["model"], "mixing_ratio": torch.ones(4, 2)}}, "mixing_ratio"),
            ({"model": {**good["model"], "more": torch.ones(4)}}, "more"),
            ({"architecture": huge}, r"trunk\.depth.* 2"),
        ):
            torch.save(good | changes, source)
            with self.assertRaisesRegex(UserError, message):
                self.run_command(*command, "--merge")
        torch.save(good, source)
        merged = {n: tensor + 1e-3 * (n == "heads.1.0.bias") for n, tensor in average.merged().items()}
        with mock.patch.object(AveragedClassifier, "merged", lambda self: merged):
            with self.assertRaisesRegex(UserError, "merged model"):
                self.run_command(*command, "--merge")
            merged["heads.1.0.bias"] = merged["heads.1.0.bias"] * float("nan")
            with self.assertRaisesRegex(UserError, "difference of nan"):
                self.run_command(*command, "--merge")
        for value, saying in (
            (float("inf"), "not finite"),
            (3e38, "computes infinite values or NaN"),
        ):
            weight = torch.full_like(good["model"]["model.heads.1.0.weight"], value)
            torch.save(good | {"model": good["model"] | {"model.heads.1.0.weight": weight}}, source)
            with self.assertRaisesRegex(UserError, saying):
                self.run_command(*command, "--merge")
        self.assertFalse((self.folder / "one.pt").exists())


if __name__ == "__main__":
    unittest.main()
