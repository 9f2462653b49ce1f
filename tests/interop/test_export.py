"""`omnivision export`: what is written computes what it was made from, comes back the same, and replaces nothing unasked."""

import copy
import hashlib
import json
import re
import unittest
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file
from transformers import VideoMAEForVideoClassification, VideoMAEImageProcessor, VideoMAEModel
from transformers.utils.logging import disable_progress_bar

from omnivision.checkpoint.state_dict_file import read_weights
from omnivision.interop import huggingface
from omnivision.models.architecture import architecture_of, from_architecture
from omnivision.models.average import AveragedClassifier
from omnivision.models.classifier import VideoClassifier
from omnivision.utils.errors import UserError
from omnivision.utils.io import safe_load
from tests import other_transformers, runs
from tests.tiny_models import WeightsCase, autoencoder, classifier, scrambled, trunk

disable_progress_bar()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Case(WeightsCase):
    def export(self, source: Path, out: Path | str, to: str, *options: object) -> str:
        code, output, _ = runs.call_command("export", source, self.folder / out, "--to", to, *options)
        self.assertEqual(code, 0)
        return output

    def run_import(self, source: Path, out: Path | str, *options: object) -> str:
        code, output, _ = runs.call_command("import", source, self.folder / out, *options)
        self.assertEqual(code, 0)
        return output

    def assert_refused(self, message: str, source: Path, out: Path | str, to: str, *options: object) -> None:
        with self.subTest(message), self.assertRaisesRegex(UserError, message):
            self.export(source, out, to, *options)

    def assert_read_rightly(self, version: str) -> None:
        """A version of transformers computes what we do from a classifier and from an autoencoder."""
        folders, wanted = [], []
        for name, model in (("classifier", classifier()), ("autoencoder", autoencoder())):
            folder, clip = self.folder / version / name, torch.randn(2, 3, 4, 32, 32)
            self.export(self.save_run(model), folder, "hf")
            torch.save(clip.transpose(1, 2), folder / "clip.pt")
            with torch.no_grad():
                wanted.append(model(clip) if name == "classifier" else model.trunk.norm(model.trunk(clip)))
            folders.append(folder)
        other_transformers.run_receiver(version, folders)
        for folder, ours in zip(folders, wanted, strict=True):
            # Rounding in single precision, and the other epsilon of the last norm.
            torch.testing.assert_close(torch.load(folder / "outputs.pt"), ours, rtol=0, atol=5e-5)

    def difference(self, output: str) -> float:
        return float(re.search(r"Verified: .* by (\S+) \(double", output)[1])


class OurNames(Case):
    def test_out_and_in_again_is_the_same(self):
        for model in (classifier(), classifier(4, 9), autoencoder()):
            source = self.save_run(model)
            for to in ("pt", "safetensors"):
                out, back = self.folder / f"out.{to}", self.folder / "back.pt"
                self.assertIn("of width 48, depth 2, 3 heads", self.export(source, out, to, "--force"))
                self.assertIn("format omnivision", self.run_import(out, back, "--force"))
                found = safe_load(back)
                self.assert_equal_states(found["model"], model.state_dict())
                self.assertEqual(found["architecture"], architecture_of(model))
                self.assertEqual(read_weights(out).metadata["origin"]["sha256"], sha256(source))
                self.assertLess(out.stat().st_size, 1.2 * source.stat().st_size)

    def test_the_ema(self):
        model, average = classifier(), dict(classifier(seed=9).named_parameters())
        ema = {name: tensor.detach() for name, tensor in average.items() if "heads" in name}
        source, out = self.save_run(model, ema=ema), self.folder / "out.pt"
        for options, averaged in (((), True), (("--weights", "ema"), True), (("--weights", "model"), False)):
            self.assertEqual("the EMA" in self.export(source, out, "pt", "--force", *options), averaged)
            self.assert_equal_states(safe_load(out)["model"], model.state_dict() | (ema if averaged else {}))
        self.assert_refused("EMA.*--weights model", self.save_run(model), out, "pt", "--force", "--weights", "ema")
        self.assert_refused("EMA.*'x'", self.save_run(model, ema={"x": torch.zeros(1)}), out, "pt", "--force")

    def test_nothing_is_replaced_unasked(self):
        source = self.save_run(classifier())
        for to in ("pt", "safetensors", "hf"):
            out = self.folder / f"taken.{to}"
            out.mkdir() if to == "hf" else out.touch()
            precious = out / "config.json" if to == "hf" else out
            precious.write_text("precious")
            self.assert_refused("exists.*--force", source, out, to)
            self.assertEqual(precious.read_text(), "precious")
            self.export(source, out, to, "--force")
            self.assertNotEqual(precious.read_bytes(), b"precious")
        (self.folder / "videos").mkdir()
        (self.folder / "videos/a.mp4").touch()
        for out, to, message in (
            (self.folder, "hf", "OUT"),
            (source, "pt", "OUT"),
            ("videos", "hf", "OUT.*config.json"),
            ("taken.pt", "hf", "OUT"),
            ("taken.hf", "pt", "OUT"),
            ("taken", "pt", r"end in \.pt"),
            ("taken", "safetensors", r"end in \.safetensors"),
        ):
            self.assert_refused(message, source, out, to, "--force")
        self.assertEqual([path.name for path in self.folder.glob(".*")], [], "no temporary files")

    def test_refused(self):
        source, architecture = self.save_run(classifier()), architecture_of(autoencoder())
        torch.save(classifier().state_dict(), self.folder / "bare.pt")
        self.assert_refused("omnivision import", self.folder / "bare.pt", "out.pt", "pt")
        for part in ("trunk", "decoder"):  # an export assumes nothing
            numbers = {key: value for key, value in architecture[part].items() if key != "heads"}
            file = self.save_run(autoencoder(), "silent.pt", architecture=architecture | {part: numbers})
            self.assert_refused("heads", file, "out.pt", "pt")
        for message, options in (
            ("Leave --merge out", ("--merge",)),
            ("--merge", ("--sources", "a")),
            ("--class-names.*--to hf", ("--class-names", "a")),
            ("--head.*--to hf", ("--head", "1")),
        ):
            self.assert_refused(message, source, "out.pt", "pt", *options)
        self.assert_refused("no tensors", self.save_run(classifier(), "b.pt", model={}), "out.pt", "pt")
        self.assertFalse((self.folder / "out.pt").exists())


class HuggingFace(Case):
    def names(self, text: str) -> Path:
        (self.folder / "names.txt").write_text(text, encoding="utf-8")
        return self.folder / "names.txt"

    def test_classifier(self):
        model, out = classifier(), self.folder / "out"
        output = self.export(self.save_run(model), out, "hf", "--class-names", self.names("\n".join("äbcdefg") + "\n"))
        self.assertLess(self.difference(output), 1e-9)
        self.assertNotIn("not carried", output)
        theirs = VideoMAEForVideoClassification.from_pretrained(out, local_files_only=True)
        self.assertEqual((theirs.config.id2label[0], theirs.config.label2id["g"]), ("ä", 6))
        clip = torch.randn(2, 3, 4, 32, 32)
        with torch.no_grad():
            self.assertLess((theirs(clip.transpose(1, 2)).logits - model(clip)).abs().max(), 5e-5)
        files = {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}
        self.assertEqual({path.name for path in out.iterdir()}, files)
        pixels = VideoMAEImageProcessor.from_pretrained(out, local_files_only=True)
        frame = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
        prepared = torch.as_tensor(pixels([[frame.permute(1, 2, 0).numpy()]], return_tensors="pt")["pixel_values"])[
            0, 0
        ]
        mean, std = torch.tensor(pixels.image_mean)[:, None, None], torch.tensor(pixels.image_std)[:, None, None]
        self.assertLess((prepared - (frame / 255 - mean) / std).abs().max(), 1e-5)

    def test_encoder_and_back(self):
        model, out, back = autoencoder(), self.folder / "out", self.folder / "back.pt"
        output = self.export(self.save_run(model), out, "hf")
        self.assertLess(self.difference(output), 1e-9)
        self.assertRegex(output, r"trunk\.mask_token.*its decoder")
        theirs = VideoMAEModel.from_pretrained(out, local_files_only=True).double()
        clip = torch.randn(2, 3, 4, 32, 32).double()
        model.double()
        ours = model.trunk.norm(model.trunk(clip))
        self.assertLess((theirs(clip.transpose(1, 2)).last_hidden_state - ours).abs().max(), 1e-9)
        self.run_import(out, back)
        found, wanted = safe_load(back)["model"], model.float().trunk.state_dict()
        self.assert_equal_states(found, {f"trunk.{n}": t for n, t in wanted.items() if f"trunk.{n}" in found})

    def test_every_bias_has_the_names_of_all_versions(self):
        for model, base in ((classifier(), "videomae."), (autoencoder(), "")):
            self.export(self.save_run(model), "out", "hf", "--force")
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
        output = self.export(self.save_run(model), out, "hf", "--head", "1")
        self.assertRegex(output, r"not carried +2  heads\.0\.0\.weight, heads\.0\.0\.bias \(another head")
        self.assertEqual(json.loads((out / "config.json").read_text())["id2label"]["8"], "LABEL_8")
        stored = load_file(out / "model.safetensors")["classifier.weight"]
        self.assertTrue(torch.equal(stored, model.heads[1][0].weight))

    def test_16_bits(self):
        for dtype in (torch.float16, torch.bfloat16):
            model, out = classifier().to(dtype), self.folder / "out"
            output = self.export(self.save_run(model), out, "hf", "--force")
            self.assertRegex(output, r"not carried +1  trunk\.pos_embed \(rounded to 16 bits")
            self.assertLess(self.difference(output), 1e-9)
            stored = load_file(out / "model.safetensors")["classifier.weight"]
            self.assertTrue(torch.equal(stored, model.heads[0][0].weight))

    def test_class_names(self):
        source, out, back = self.save_run(classifier()), self.folder / "out", self.folder / "back.pt"
        wanted = [f"class {label}" for label in range(7)]
        self.export(source, out, "hf", "--class-names", self.names("\n".join(wanted)))
        self.run_import(out, back)
        self.assertEqual(read_weights(back).inference.class_names, [wanted])
        config = json.loads((out / "config.json").read_text())
        numbers = range(len(wanted))
        for labels in (
            {str(n): f"LABEL_{n}" for n in numbers},
            {"0": "a"},
            {"a": "b"},
            [1],
            {str(n): n for n in numbers},
        ):
            (out / "config.json").write_text(json.dumps(config | {"id2label": labels}))
            self.run_import(out, back, "--force")
            self.assertEqual(read_weights(back).inference.class_names, [], labels)
        encoder = self.save_run(autoencoder(), "mae.pt")
        for text, model in (("", source), ("a\n\nb\nc\nd\ne\nf\n", source), ("a\nb\n", source), ("a\n", encoder)):
            self.assert_refused("--class-names", model, "new", "hf", "--class-names", self.names(text))
        (self.folder / "names.txt").write_bytes(b"\xff")
        for file in (self.folder / "names.txt", "/dev/zero"):
            self.assert_refused("--class-names.*cannot be read", source, "new", "hf", "--class-names", file)

    def test_other_tubelets_and_ratios(self):
        model = scrambled(VideoClassifier(trunk(depth=1, mlp_ratio=2.5, tubelet=(4, 8, 16)), [3]))
        self.assertIn("Verified", self.export(self.save_run(model), "out", "hf"))
        self.run_import(self.folder / "out", "back.pt")
        self.assertEqual(safe_load(self.folder / "back.pt")["architecture"], architecture_of(model) | {"classes": [3]})

    def test_a_warning_for_features_that_vary_little(self):
        model = classifier()
        with torch.no_grad():
            for block in model.trunk.blocks:
                for layer in (block.attn.proj, block.mlp.fc2):
                    layer.weight.zero_()
                    layer.bias.zero_()
            model.trunk.patch_embed.proj[1].weight.mul_(1e-3)
            model.trunk.patch_embed.proj[1].bias.copy_(-model.trunk.pos_embed.mean((0, 1)))
        self.assertIn("fc_norm.eps", self.export(self.save_run(model), "out", "hf"))

    def test_a_wrong_tensor_or_model_is_found_and_nothing_is_written(self):
        source, right = self.save_run(classifier()), huggingface.to_hf

        def wrong(*arguments: Any) -> Any:
            exported = right(*arguments)
            attention = "videomae.encoder.layer.1.attention.attention."
            for name in ("q_bias", "query.bias"):  # whichever this version reads
                exported.state[f"{attention}{name}"] = exported.state[f"{attention}v_bias"].clone()
            return exported

        with mock.patch.object(huggingface, "to_hf", wrong):
            self.assert_refused("--to pt", source, "out", "hf")
        for model in (classifier(), autoencoder()):
            model.trunk.norm.weight.data[0] = float("nan")
            self.assert_refused("not finite", self.save_run(model), "out", "hf")
        self.assertEqual([path.name for path in self.folder.iterdir()], ["checkpoint.pt"])

    def test_without_the_library_nothing_is_verified(self):
        with mock.patch.dict("sys.modules", {"transformers": None}):
            output = self.export(self.save_run(classifier()), "out", "hf")
        self.assertIn("omnivision[hf]", output)
        VideoMAEForVideoClassification.from_pretrained(self.folder / "out", local_files_only=True)


class Merging(Case):
    MODES = "learned_average_softmax", "learned_average_layer_softmax"

    def average(self, mode: str = MODES[0], **more: Any) -> tuple[AveragedClassifier, Path, list[Path]]:
        """An average of an autoencoder and a classifier, with mixing weights that are not equal, and its checkpoint."""
        files = [self.save_run(autoencoder(), "a.pt"), self.save_run(classifier(5, seed=8), "b.pt")]
        model = AveragedClassifier(trunk(), [7, 3], 2, mode)
        scrambled(model, 11)
        model.load_sources([safe_load(file)["model"] for file in files])
        return model, self.save_run(model, "average.pt", **{"sources": self.notes(files)} | more), files

    def notes(self, files: list[Path], **more: Any) -> list[dict]:
        return [{"path": str(file), "sha256": sha256(file)} | more for file in files]

    def merge(self, source: Path, *options: object) -> dict:
        self.export(source, "one.pt", "pt", "--merge", "--force", *options)
        return safe_load(self.folder / "one.pt")

    def test_one_model_computes_what_the_average_does(self):
        clip = torch.randn(2, 3, 4, 32, 32)
        for mode in self.MODES:
            average, source, _ = self.average(mode)
            output = self.export(source, "one.pt", "pt", "--merge", "--force")
            self.assertLessEqual(float(re.search(r"differ by (\S+) from", output)[1]), 1e-6)
            found = safe_load(self.folder / "one.pt")
            self.assertEqual(found["architecture"], architecture_of(classifier(7, 3)))
            one = from_architecture(found["architecture"], "here").eval()
            one.load_state_dict(found["model"])
            with torch.no_grad():
                for head in (0, 1):
                    self.assertLessEqual((one(clip, head) - average(clip, head)).abs().max(), 1e-6)
                    self.assertGreater((one(clip, head) - classifier(7, 3)(clip, head)).abs().max(), 0.1)
        self.assertIn("Verified", self.export(source, "hf", "hf", "--merge"))

    def test_sources_may_have_more_than_the_average_takes(self):
        """Positions of another clip size, and an embedding of depth: training leaves both in the sources, too."""
        for clip, depth in ((8, False), (4, True)):
            source_trunks = [trunk(rgbd=depth) for _ in range(2)]
            models = [scrambled(VideoClassifier(each, [5]), seed) for seed, each in enumerate(source_trunks)]
            files = [self.save_run(model, f"source_{number}.pt") for number, model in enumerate(models)]
            average = AveragedClassifier(trunk(num_frames=clip), [7])
            average.load_sources([model.state_dict() for model in models])
            found = self.merge(self.save_run(average, "average.pt", sources=self.notes(files)))
            self.assert_equal_states(found["model"], average.merged())
            self.assertEqual(found["architecture"]["trunk"]["num_frames"], clip)

    def test_the_filter_of_the_average_is_applied_again(self):
        """A filter may give tensors of one shape each other's names."""
        first, second = "trunk.blocks.0.norm1.weight", "trunk.blocks.0.norm2.weight"
        choice = {"rename": {first: "held", second: first, "held": second}}
        average, _, files = self.average()
        states = [safe_load(file)["model"] for file in files]
        average.load_sources([state | {first: state[second], second: state[first]} for state in states])
        source = self.save_run(average, "renamed.pt", sources=self.notes(files, choice=choice))
        self.assert_equal_states(self.merge(source)["model"], average.merged())
        for damage in (3, [1], {"keep": 3}, {"nope": 1}, {"rename": [1]}):
            source = self.save_run(average, "damaged.pt", sources=self.notes(files, choice=damage))
            self.assert_refused("note its sources.*choice", source, "two.pt", "pt", "--merge")

    def test_the_ema_of_an_average(self):
        _, source, _ = self.average(ema={"mixing_ratio": torch.tensor([30.0, -30.0])})
        wanted = autoencoder().trunk.blocks[1].mlp.fc1.weight
        self.assertLess((self.merge(source)["model"]["trunk.blocks.1.mlp.fc1.weight"] - wanted).abs().max(), 1e-6)

    def test_sources_that_moved_are_given_again(self):
        average, source, files = self.average()
        moved = [file.rename(file.with_name(f"moved_{file.name}")) for file in files]
        other = self.save_run(classifier(5, seed=1), "c.pt")
        for message, given in (
            ("a.pt.*--sources FILE FILE", None),
            ("SHA-256.*--sources FILE FILE", reversed(moved)),
            ("SHA-256", [*moved, moved[0]]),
            ("SHA-256", [moved[0], other]),
        ):
            options = () if given is None else ("--sources", *given)
            self.assert_refused(message, source, "one.pt", "pt", "--merge", *options)
        self.assert_equal_states(self.merge(source, "--sources", *moved)["model"], average.merged())

    def test_one_file_that_holds_all_sources(self):
        average, _, files = self.average()
        both = self.folder / "both.pt"
        torch.save({"ensemble_weights": [safe_load(file)["model"] for file in files]}, both)
        source = self.save_run(average, "average.pt", sources=self.notes([both, both]))
        self.assert_equal_states(self.merge(source)["model"], average.merged())

    def test_refused(self):
        average, source, _ = self.average()
        self.assert_refused("average.*Add --merge", source, "one.pt", "pt")
        with self.assertRaisesRegex(UserError, "omnivision export CHECKPOINT OUT.pt --to pt --merge"):
            self.run_import(source, "one.pt")
        good = copy.deepcopy(safe_load(source))  # it is mapped from the file that is written to below
        weights, architecture = good["model"], good["architecture"]
        huge = architecture | {"num_models": 10**9, "trunk": architecture["trunk"] | {"depth": 10**9}}
        for changes, message in (
            ({"sources": None}, "note its sources"),
            ({"sources": []}, "sources"),
            ({"sources": [{"path": "x"}]}, "note its sources"),
            ({"model": weights | {"mixing_ratio": torch.ones(3)}}, "mixing_ratio.*3"),
            ({"model": {n: t for n, t in weights.items() if n != "mixing_ratio"}}, "mixing_ratio"),
            ({"model": weights | {"mixing_ratio": torch.ones(4, 2)}}, "mixing_ratio"),
            ({"model": weights | {"more": torch.ones(4)}}, "more"),
            ({"architecture": huge}, r"trunk\.depth.* 2"),
            ({"model": weights | {"model.heads.1.0.weight": torch.full((3, 48), float("inf"))}}, "not finite"),
            ({"model": weights | {"model.heads.1.0.weight": torch.full((3, 48), 3e38)}}, "infinite values or NaN"),
        ):
            torch.save(good | changes, source)
            self.assert_refused(message, source, "one.pt", "pt", "--merge")
        torch.save(good, source)
        for change in (1e-3, float("nan")):
            merged = {n: tensor + change * (n == "heads.1.0.bias") for n, tensor in average.merged().items()}
            with mock.patch.object(AveragedClassifier, "merged", lambda self, merged=merged: merged):
                self.assert_refused("merged model", source, "one.pt", "pt", "--merge")
        self.assertFalse((self.folder / "one.pt").exists())


if __name__ == "__main__":
    unittest.main()
