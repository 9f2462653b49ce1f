"""Weights handed from stage to stage: reading, filtering, loading, resizing, refusing."""

import json
import os
import unittest
from typing import Any

import torch
from safetensors.torch import save_file

from omnivision.checkpoint import checkpointer as checkpoint
from omnivision.checkpoint.pretrained import LoadReport, WeightFilter, filter_state_dict, load_filtered
from omnivision.checkpoint.state_dict_file import StateDictFile, read_several, read_weights, resolve_checkpoint
from omnivision.models.architecture import architecture_of, from_architecture
from omnivision.models.average import AveragedClassifier
from omnivision.models.classifier import VideoClassifier
from omnivision.models.patches import resized_positions
from omnivision.utils.errors import UserError
from tests.checkpoint.test_checkpoint import Canary
from tests.checkpoint.test_checkpoint import state as run_state
from tests.tiny_models import WeightsCase, autoencoder, classifier, described, file_of, trunk

TRUNK_ALONE = WeightFilter(drop_if_present=["heads.*", "trunk.decoder.*", "trunk.mask_token"])
NO_PLACE = "not in this model"


class Case(WeightsCase):
    def assert_refused(
        self, message: str, model: Any, weights: Any, choice: Any = TRUNK_ALONE, names: Any = ()
    ) -> None:
        """Loading is refused, and the model is as before."""
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with self.assertRaisesRegex(UserError, message):
            load_filtered(model, weights, choice, names)
        for name, tensor in model.state_dict().items():
            self.assertTrue(torch.equal(tensor, before[name]), name)


class HandOver(Case):
    def test_trunk_is_loaded_from_stage_to_stage(self):
        """Autoencoder -> alignment -> another set of classes: the trunk arrives whole, its final norm too."""
        first, second, third = autoencoder(), classifier(), classifier(5)
        torch.nn.init.normal_(first.trunk.norm.weight)
        report = load_filtered(second, described(first), TRUNK_ALONE)
        self.assertEqual(report.missing, ["heads.0.0.bias", "heads.0.0.weight"])
        self.assertIn("heads.0.projector.weight", report.dropped)
        self.assertEqual(report.dropped["trunk.mask_token"], "trunk.mask_token")
        again = load_filtered(third, described(second), TRUNK_ALONE)
        self.assertEqual(set(again.dropped), {"heads.0.0.weight", "heads.0.0.bias"})
        for name, tensor in third.trunk.state_dict().items():
            self.assertTrue(torch.equal(tensor, first.trunk.state_dict()[name]), name)
        self.assertRegex("\n".join(again.lines()), r"loaded +\d+ .*\n  dropped +2 .*heads")

    def test_unexpected_entries_are_reported_or_refused_if_strict(self):
        report = load_filtered(autoencoder(), described(classifier()), WeightFilter())
        self.assertEqual(report.dropped, dict.fromkeys(("heads.0.0.weight", "heads.0.0.bias"), NO_PLACE))
        self.assertIn("trunk.decoder.norm.weight", report.missing)
        self.assertEqual(load_filtered(classifier(), described(classifier()), WeightFilter(strict=True)).missing, [])
        self.assert_refused("heads.0.0.bias", classifier(), described(autoencoder()), WeightFilter(strict=True))
        prefixed = WeightFilter(prefix="foo.", trunk_coverage=0)
        self.assert_refused("there.pt.*omnivision import.*trainer/checkpoint", classifier(), file_of(trunk()), prefixed)

    def test_positional_embeddings_are_interpolated(self):
        old = classifier()
        torch.nn.init.normal_(old.trunk.pos_embed)
        for changes, grid in (({"num_frames": 8}, (4, 4, 4)), ({"image_size": 48}, (2, 6, 6))):
            for weights in (described(old), file_of(old)):
                new = classifier(**changes)
                report = load_filtered(new, weights, TRUNK_ALONE)
                expected = resized_positions(old.trunk.pos_embed, (2, 4, 4), grid)
                self.assertTrue(torch.equal(new.trunk.pos_embed, expected))
                self.assertEqual(report.resized, {"trunk.pos_embed": f"2x4x4 -> {'x'.join(map(str, grid))}"})
        # The same number of tokens in another layout.
        other = classifier(num_frames=8, image_size=32, tubelet=(1, 8, 16))
        self.assert_refused("trunk.patch_embed.*trainer/model", other, described(old))
        for count in (33, 0):
            weights = file_of(old.state_dict() | {"trunk.pos_embed": torch.zeros(1, count, 48)})
            self.assert_refused(f"got {count}. Set num_frames", classifier(), weights)
        numbers = architecture_of(old)["trunk"]
        changes = {"tubelet": "x"}, {"tubelet": [2, 8]}, {"image_size": 10**9}, {"num_frames": None}
        for entry in (*(numbers | change for change in changes), "trunk", 7):
            with self.subTest(entry):
                weights = file_of(old, architecture={"trunk": entry})
                self.assert_refused("architecture, got 32", classifier(), weights)

    def test_invalid_tensor_values_are_refused(self):
        for value, reason in (
            (torch.zeros(48, dtype=torch.int64), "torch.int64"),
            (torch.zeros(48, dtype=torch.complex64), "torch.complex64"),
            (torch.full((48,), float("nan")), "not finite"),
            (torch.full((48,), float("-inf")), "not finite"),
        ):
            weights = file_of(classifier().state_dict() | {"trunk.norm.weight": value})
            with self.subTest(reason):
                self.assert_refused(f"trunk.norm.weight .*{reason}", classifier(), weights)

    def test_another_trunk_is_refused(self):
        shallow = classifier(depth=1, seed=5)
        self.assert_refused(r"there\.pt .*\(48,\), got \(96,\)", classifier(), described(classifier(width=96)))
        self.assert_refused(r"16 of the 28 .*trunk_coverage.*trunk\.blocks\.1", classifier(), described(shallow))
        self.assert_refused("trainer/checkpoint=no_heads ", classifier(), described(classifier(5)), WeightFilter())
        new = classifier()
        load_filtered(new, described(shallow), WeightFilter(drop_if_present=["heads.*"], trunk_coverage=0.5))
        self.assertTrue(torch.equal(new.trunk.blocks[0].norm1.weight, shallow.trunk.blocks[0].norm1.weight))


class ClassNames(Case):
    """Heads are matched by the names of their classes."""

    AB, XY, LETTERS = ["jump", "run"], ["x", "y"], ["a", "b", "c"]
    STRICT = WeightFilter(strict=True)

    def source(self, *heads: Any) -> StateDictFile:
        torch.manual_seed(3)
        model = VideoClassifier(trunk(), [len(names) for names in heads])
        for head in model.heads:
            torch.nn.init.normal_(head[0].bias)
        return file_of(model, inference={"class_names": list(heads)})

    def rows(self, state: dict[str, torch.Tensor], head: int, names: list[str]) -> dict[str, tuple]:
        weight, bias = state[f"heads.{head}.0.weight"], state[f"heads.{head}.0.bias"]
        return {name: (*weight[row].tolist(), float(bias[row])) for row, name in enumerate(names)}

    def assert_taken(self, given: list, ours: list, heads: dict[int, int], choice: Any = None) -> LoadReport:
        """Each head of the model has the rows of that head of the file (model's: file's), by name."""
        source, model = self.source(*given), VideoClassifier(trunk(), [len(names) for names in ours])
        report = load_filtered(model, source, choice or WeightFilter(), ours)
        for head, theirs in heads.items():
            wanted = self.rows(source.state, theirs, given[theirs])
            self.assertEqual(self.rows(model.state_dict(), head, ours[head]), wanted, (given, ours))
        return report

    def test_rows_of_one_head_are_matched_by_class_name(self):
        for ours in (["b", "a", "c"], ["c", "a", "b"]):
            report = self.assert_taken([self.LETTERS], [ours], {0: 0})
            self.assertEqual(len(report.classes), 1)
            self.assertIn(report.classes[0], "\n".join(report.lines()))
        self.assertEqual(self.assert_taken([self.LETTERS], [self.LETTERS], {0: 0}, self.STRICT).classes, [])

    def test_several_heads_are_matched_by_class_name(self):
        self.assert_taken([self.AB, self.LETTERS], [["c", "b", "a"], ["run", "jump"]], {0: 1, 1: 0}, self.STRICT)
        report = self.assert_taken([self.AB, self.XY], [["y", "x"]], {0: 1})
        self.assertEqual(report.dropped["heads.0.0.weight"], NO_PLACE)
        report = self.assert_taken([self.AB, self.XY], [["run", "jump"]], {0: 0})
        self.assertEqual(report.dropped["heads.1.0.weight"], NO_PLACE)
        with self.assertRaisesRegex(UserError, "strict.*heads.1"):
            self.assert_taken([self.AB, self.XY], [["run", "jump"]], {0: 0}, self.STRICT)
        self.assert_taken([self.AB, self.AB], [self.AB, ["run", "jump"]], {0: 0, 1: 1})
        renamed = WeightFilter(drop=["heads.0.*"], rename={"heads.1.*": "heads.0.*"})
        self.assert_taken([["q", "r", "s"], self.LETTERS], [["c", "a", "b"]], {0: 1}, renamed)

    def test_other_class_names_are_refused(self):
        for given, ours in (
            ([self.LETTERS], [["a", "b", "d"]]),
            ([["A", "b", "c"]], [self.LETTERS]),
            ([self.AB, self.LETTERS], [self.AB, ["c", "b", "z"]]),
        ):
            model = VideoClassifier(trunk(), [len(names) for names in ours])
            advice = r"class_names.*trainer/checkpoint=no_heads"
            self.assert_refused(advice, model, self.source(*given), WeightFilter(), ours)
            load_filtered(model, self.source(*given), TRUNK_ALONE, ours)
        few = VideoClassifier(trunk(), [2])
        self.assert_refused("no_heads", few, self.source(self.LETTERS), WeightFilter(), [self.AB])

    def test_heads_without_class_names_are_matched_by_count(self):
        numbers = ["0", "1", "2"]
        for given, ours in ((self.LETTERS, numbers), (numbers, self.LETTERS), (["a", "a", "b"], self.LETTERS)):
            source, model = self.source(given), VideoClassifier(trunk(), [3])
            report = load_filtered(model, source, WeightFilter(), [ours])
            self.assertTrue(torch.equal(model.heads[0][0].weight, source.state["heads.0.0.weight"]))
            self.assertEqual(len(report.classes), 1)
        for names in (5, [5], [[1, 2, 3]], [["a", "b"]], [[["a"], "b", "c"]], {"0": "a"}):
            source, model = self.source(self.LETTERS), VideoClassifier(trunk(), [3])
            load_filtered(
                model, file_of(source.state, inference={"class_names": names}), WeightFilter(), [["c", "b", "a"]]
            )
            self.assertTrue(torch.equal(model.heads[0][0].weight, source.state["heads.0.0.weight"]))
        self.assertEqual(
            load_filtered(classifier(), described(autoencoder()), WeightFilter(), [list("abcdefg")]).classes, []
        )


class Filtering(unittest.TestCase):
    def taken(self, **choice: Any) -> list[str]:
        state = {name: torch.zeros(1) for name in ("trunk.a", "trunk.b", "heads.0.w", "x")}
        return sorted(filter_state_dict(state, WeightFilter(**choice), LoadReport("there.pt", "")))

    def test_filter_keeps_drops_renames_and_prefixes(self):
        for choice, names in (
            ({"keep": ["trunk.*", "x"]}, "trunk.a trunk.b x"),
            ({"drop": ["trunk.*"]}, "heads.0.w x"),
            ({"keep": ["trunk.*"], "drop": ["*.b"], "drop_if_present": ["none*"]}, "trunk.a"),
            ({"keep": ["x"], "rename": {"x": ["y", "z"]}}, "y z"),
            ({"keep": ["trunk.*"], "rename": {"trunk.*": ["one.*", "two.*"]}}, "one.a one.b two.a two.b"),
            ({"keep": ["x"], "prefix": "model."}, "model.x"),
        ):
            self.assertEqual(self.taken(**choice), names.split())

    def test_patterns_without_a_match_are_refused(self):
        for choice, message in (
            ({"keep": ["tronk.*"]}, r"trainer\.checkpoint\.keep: 'tronk\.\*'"),
            ({"drop": ["tronk.*"]}, r"trainer\.checkpoint\.drop: 'tronk\.\*'"),
            ({"rename": {"q": "r"}}, r"trainer\.checkpoint\.rename: 'q'"),
            ({"drop": ["*"]}, "trainer/checkpoint"),
        ):
            with self.assertRaisesRegex(UserError, message):
                self.taken(**choice)


class Reading(Case):
    def setUp(self):
        super().setUp()
        self.state = classifier().state_dict()

    def test_all_file_formats_are_read(self):
        save_file(self.state, self.folder / "weights.safetensors")
        old = self.folder / "old.pt"  # from before torch 1.6
        torch.save({"model": self.state}, old, _use_new_zipfile_serialization=False)
        run = self.save({"model": self.state, "architecture": architecture_of(classifier()), "epoch": 3}, "run.pt")
        for source in (self.save(self.state), run, self.folder / "weights.safetensors", old):
            found = read_weights(source)
            torch.testing.assert_close(found.state, self.state, rtol=0, atol=0)
            self.assertEqual((bool(found.architecture), len(found.sha256)), (source == run, 64))

    def test_run_directory_resolves_to_best_else_newest_checkpoint(self):
        with self.assertRaisesRegex(UserError, "checkpoints/best.pt .*checkpoints/checkpoint.pt"):
            resolve_checkpoint(self.folder)
        for name in ("checkpoint.pt", "best.pt"):
            path = self.save({"model": self.state}, f"checkpoints/{name}")
            self.assertEqual(resolve_checkpoint(self.folder), path)

    def test_ema_replaces_the_weights(self):
        ema = {"trunk.norm.weight": torch.full((48,), 7.0)}
        path = self.save({"model": self.state, "ema": ema})
        for found in (read_weights(path).with_weights(), *read_several([str(path)] * 2)):
            torch.testing.assert_close(found.state, self.state | ema, rtol=0, atol=0)
        torch.testing.assert_close(read_weights(path).state, self.state, rtol=0, atol=0)

    def test_a_checkpoint_has_its_epoch_and_metrics(self):
        last = {"loss": 0.3, "val_loss": 0.41, "val_top1": 85.714, "val_epoch": 12}
        for metadata, text in (
            ({"epoch": 12, "step": 0, "last": last}, "epoch 12, top-1 85.7 %, validation loss 0.41"),
            (
                {"epoch": 14, "step": 3, "steps_per_epoch": 9, "last": last},
                "epoch 15, step 3 of 9, top-1 85.7 %, validation loss 0.41 (validated after epoch 12)",
            ),
            ({"epoch": 2, "step": 0, "last": {"loss": 0.3, "lr": 1}}, "epoch 2, training loss 0.3"),
            ({"epoch": 2, "step": 0, "last": {"val_top1": "85"}}, "epoch 2"),
            ({"epoch": True, "step": 0, "last": {}}, ""),
            ({}, ""),
        ):
            source = file_of(self.state, **metadata)
            self.assertEqual((source.checkpoint, str(source)), (text, f"there.pt ({text})" if text else "there.pt"))

    def test_several_models_are_read(self):
        paths = [str(self.save({"model": self.state}, name)) for name in ("a.pt", "b.pt")]
        both = self.save({"ensemble_weights": [self.state, self.state]}, "both.pt")
        self.assertEqual([weights.path.name for weights in read_several(paths)], ["a.pt", "b.pt"])
        self.assertEqual(len(read_several(str(both))), 2)
        with self.assertRaisesRegex(UserError, "ensemble_weights"):
            read_several(paths[0])
        with self.assertRaisesRegex(UserError, "ensemble_weights"):
            read_weights(both)

    def test_damaged_files_are_refused(self):
        for manifest in (True, False):
            folder = self.folder / f"run{manifest}" / "checkpoints"
            checkpoint.save(run_state(1, model=self.state), folder, [])
            path = folder / "checkpoint.pt"
            data = path.read_bytes()
            place = data.index(self.state["trunk.blocks.0.mlp.fc1.weight"].numpy().tobytes()) + 100
            path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
            if not manifest:
                path.with_name("checkpoint.pt.json").unlink()
            with self.assertRaisesRegex(UserError, "its manifest" if manifest else "checksum"):
                read_weights(folder.parent)
        torch.save(self.state, self.folder / "old.pt", _use_new_zipfile_serialization=False)
        os.truncate(self.folder / "old.pt", (self.folder / "old.pt").stat().st_size - 100)
        (self.folder / "junk.safetensors").write_bytes(b"\xff" * 40)
        torch.save(self.state, self.folder / "zip.pt")
        complete = (self.folder / "zip.pt").read_bytes()
        for name, content in (
            ("half.pt", complete[: len(complete) // 2]),
            ("most.pt", complete[:-10]),
            ("empty.pt", b""),
            ("video.pt", b"\x00\x00\x00 ftypisom"),
        ):
            (self.folder / name).write_bytes(content)
        for name in ("old.pt", "half.pt", "most.pt", "junk.safetensors"):
            with self.subTest(name), self.assertRaisesRegex(UserError, f"{name}.* truncated or corrupt; copy it again"):
                read_weights(self.folder / name)
        for name in ("empty.pt", "video.pt"):
            with (
                self.subTest(name),
                self.assertRaisesRegex(UserError, f"{name}.* not a weights file; give .*torch.save"),
            ):
                read_weights(self.folder / name)

    def test_invalid_files_are_refused(self):
        os.mkfifo(self.folder / "pipe")
        for source in (self.folder / "pipe", "", self.folder / "none"):
            with self.subTest(source), self.assertRaisesRegex(UserError, "There is no file"):
                read_weights(source)
        canary = self.folder / "canary"
        for content, message in (
            ({"model": Canary(str(canary))}, "pickled object"),
            ([1, 2], "a list"),
            (torch.zeros(2), "a Tensor"),
            ({"model": {}}, "no tensors"),
            ({"model": {"a": 3}}, "'a': int"),
            ({3: torch.zeros(1)}, "got 3"),
            ({"a": torch.zeros(2).to_sparse()}, "must hold dense"),
            ({"a": torch.zeros(2, device="meta")}, "must hold dense"),
            ({"a": torch.zeros(1).expand(10**9)}, "must hold dense"),
            ({"model": self.state, "ema": {"other": torch.zeros(1)}}, "its model only, got 'other'"),
        ):
            with self.subTest(message), self.assertRaisesRegex(UserError, f"(?s)odd.pt.*{message}"):
                read_several([self.save(content, "odd.pt")])
        self.assertFalse(canary.exists())


class Architectures(unittest.TestCase):
    def test_model_is_built_from_its_architecture(self):
        average = AveragedClassifier(trunk(), [7, 5], 3, "learned_average_layer_softmax")
        for model in (autoencoder(), classifier(), average):
            architecture = architecture_of(model)
            again = from_architecture(architecture, "here")
            self.assertIs(type(again), type(model))
            self.assertEqual(architecture_of(again), architecture)
            shapes = {name: t.shape for name, t in model.state_dict().items()}
            self.assertEqual({name: t.shape for name, t in again.state_dict().items()}, shapes)
            json.dumps(architecture)

    def test_invalid_architectures_are_refused(self):
        good = architecture_of(classifier())
        for bad in (
            {},
            good | {"kind": "os.system"},
            good | {"trunk": {}},
            good | {"trunk": good["trunk"] | {"heads": 5}},
            good | {"classes": "many"},
        ):
            with self.assertRaisesRegex(UserError, "here"):
                from_architecture(bad, "here")


if __name__ == "__main__":
    unittest.main()
