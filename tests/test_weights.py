"""Weights handed from stage to stage: what is read, chosen, loaded, resized and refused."""

import os
import tempfile
import unittest
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from omnivision.checkpoint import checkpointer as checkpoint
from omnivision.checkpoint.pretrained import LoadReport, WeightFilter, filter_state_dict, load, read, read_several
from omnivision.checkpoint.state_dict_file import StateDictFile, resolve_checkpoint
from omnivision.checkpoint.state_dict_file import read as read_for_import
from omnivision.models.architecture import build, describe
from omnivision.models.average import AveragedClassifier
from omnivision.models.classifier import VideoClassifier
from omnivision.models.mae import MaskedAutoencoder
from omnivision.models.patches import resized_positions
from omnivision.models.vit import VisionTransformer
from omnivision.utils.errors import UserError
from tests.test_checkpoint import Canary
from tests.test_checkpoint import state as run_state

TAKE_ALL = WeightFilter()
TRUNK_ALONE = WeightFilter(drop_if_present=["heads.*", "trunk.decoder.*", "trunk.mask_token"])


def trunk(**changes: Any) -> VisionTransformer:
    return VisionTransformer(24, 2, 2, **({"num_frames": 4, "image_size": 32, "tubelet": (2, 8, 8)} | changes))


def autoencoder() -> MaskedAutoencoder:
    torch.manual_seed(1)
    return MaskedAutoencoder(trunk(), {"width": 16, "depth": 1, "heads": 2})


def classifier(classes: int = 7, **changes: Any) -> VideoClassifier:
    torch.manual_seed(2)
    return VideoClassifier(trunk(**changes), [classes])


def weights_of(model: torch.nn.Module, told: bool = True) -> StateDictFile:
    return StateDictFile(
        Path("there.pt"), "0" * 64, model.state_dict(), {"architecture": describe(model)} if told else {}
    )


class HandOver(unittest.TestCase):
    def test_from_stage_to_stage(self):
        """Autoencoder -> alignment -> another set of classes: the trunk arrives whole, its final norm too."""
        first, second, third = autoencoder(), classifier(), classifier(5)
        torch.nn.init.normal_(first.trunk.norm.weight)
        report = load(second, weights_of(first), TRUNK_ALONE)
        self.assertEqual(report.missing, ["heads.0.0.bias", "heads.0.0.weight"])
        self.assertIn("heads.0.projector.weight", report.dropped)
        self.assertEqual(report.dropped["trunk.mask_token"], "trunk.mask_token")
        again = load(third, weights_of(second), TRUNK_ALONE)
        self.assertEqual(set(again.dropped), {"heads.0.0.weight", "heads.0.0.bias"})
        for name, tensor in third.trunk.state_dict().items():
            self.assertTrue(torch.equal(tensor, first.trunk.state_dict()[name]), name)
        self.assertRegex("\n".join(again.lines()), r"loaded +\d+ .*\n  dropped +2 .*heads")

    def test_what_has_no_place_is_left_out_and_told(self):
        report = load(autoencoder(), weights_of(classifier()), WeightFilter())
        self.assertEqual(
            report.dropped, dict.fromkeys(("heads.0.0.weight", "heads.0.0.bias"), "no place in this model")
        )
        self.assertIn("trunk.decoder.norm.weight", report.missing)

    def test_strict(self):
        whole = classifier()
        self.assertEqual(load(classifier(), weights_of(whole), WeightFilter(strict=True)).missing, [])
        with self.assertRaisesRegex(UserError, "strict.*heads.0.0.bias"):
            load(whole, weights_of(autoencoder()), WeightFilter(strict=True))

    def test_positions_of_other_frames_and_sizes_are_interpolated(self):
        old = classifier()
        torch.nn.init.normal_(old.trunk.pos_embed)
        for changes, grid in (({"num_frames": 8}, (4, 4, 4)), ({"image_size": 48}, (2, 6, 6))):
            for told in (True, False):
                new = classifier(**changes)
                report = load(new, weights_of(old, told), TRUNK_ALONE)
                expected = resized_positions(old.trunk.pos_embed, (2, 4, 4), grid)
                self.assertTrue(torch.equal(new.trunk.pos_embed, expected))
                self.assertEqual(report.resized, {"trunk.pos_embed": f"2x4x4 -> {'x'.join(map(str, grid))}"})
        # The same number of tokens, laid out otherwise: only the file can tell.
        new = classifier(num_frames=8, image_size=32, tubelet=(1, 8, 16))
        with self.assertRaisesRegex(UserError, "trunk.patch_embed.*trainer/model"):
            load(new, weights_of(old), TRUNK_ALONE)
        with self.assertRaisesRegex(UserError, "got 33 positions. Set num_frames"):
            state = old.state_dict() | {"trunk.pos_embed": torch.zeros(1, 33, 24)}
            load(classifier(), StateDictFile(Path("x.pt"), "", state), TRUNK_ALONE)

    def test_values_that_are_no_weights_are_refused(self):
        for value, saying in (
            (torch.zeros(24, dtype=torch.int64), "torch.int64"),
            (torch.zeros(24, dtype=torch.complex64), "torch.complex64"),
            (torch.full((24,), float("nan")), "not finite"),
            (torch.full((24,), float("-inf")), "not finite"),
        ):
            state = classifier().state_dict() | {"trunk.norm.weight": value}
            with self.subTest(saying), self.assertRaisesRegex(UserError, f"trunk.norm.weight .*{saying}"):
                load(classifier(), StateDictFile(Path("x.pt"), "", state), TRUNK_ALONE)

    def test_a_file_that_tells_nonsense_of_its_trunk(self):
        told = describe(classifier())["trunk"]
        for changes in (
            {"tubelet": "x"},
            {"tubelet": [0, 0, 0]},
            {"tubelet": [2, 8]},
            {"image_size": 10**9},
            {"image_size": -32},
            {"num_frames": None},
        ):
            weights = StateDictFile(
                Path("x.pt"), "", classifier().state_dict(), {"architecture": {"trunk": told | changes}}
            )
            with self.subTest(changes), self.assertRaisesRegex(UserError, "num_frames, image_size and tubelet .* 32"):
                load(classifier(), weights, TRUNK_ALONE)
        for said in ("trunk", [1], 7):
            with self.subTest(said), self.assertRaisesRegex(UserError, "num_frames, image_size and tubelet"):
                load(
                    classifier(),
                    StateDictFile(Path("x.pt"), "", classifier().state_dict(), {"architecture": {"trunk": said}}),
                    TRUNK_ALONE,
                )
        state = classifier().state_dict() | {"trunk.pos_embed": torch.zeros(1, 0, 24)}
        with self.assertRaisesRegex(UserError, "got 0 positions. Set num_frames"):
            load(classifier(), StateDictFile(Path("x.pt"), "", state), TRUNK_ALONE)

    def test_another_trunk_is_refused_and_nothing_is_changed(self):
        new = classifier()
        before = {name: tensor.clone() for name, tensor in new.state_dict().items()}
        wide = VideoClassifier(VisionTransformer(48, 2, 2, num_frames=4, image_size=32, tubelet=(2, 8, 8)), [7])
        deep = VideoClassifier(VisionTransformer(24, 1, 2, num_frames=4, image_size=32, tubelet=(2, 8, 8)), [7])
        with self.assertRaisesRegex(UserError, r"there\.pt .*\(24,\), got \(48,\)"):
            load(new, weights_of(wide), TRUNK_ALONE)
        with self.assertRaisesRegex(UserError, r"16 of the 28 .*trunk_coverage is 1\b.*trunk\.blocks\.1"):
            load(new, weights_of(deep), TRUNK_ALONE)
        with self.assertRaisesRegex(UserError, "trainer/checkpoint=no_heads "):
            load(new, weights_of(classifier(5)), WeightFilter())
        for name, tensor in new.state_dict().items():
            self.assertTrue(torch.equal(tensor, before[name]), name)
        load(new, weights_of(deep), WeightFilter(drop_if_present=["heads.*"], trunk_coverage=0.5))
        self.assertTrue(torch.equal(new.trunk.blocks[0].norm1.weight, deep.trunk.blocks[0].norm1.weight))


class ClassNames(unittest.TestCase):
    """Heads are matched by the names of their classes."""

    AB, LETTERS = ["jump", "run"], ["a", "b", "c"]

    def source(self, *heads: Any) -> StateDictFile:
        torch.manual_seed(3)
        model = VideoClassifier(trunk(), [len(names) for names in heads])
        for head in model.heads:
            torch.nn.init.normal_(head[0].bias)
        return StateDictFile(
            Path("there.pt"), "0" * 64, model.state_dict(), {"inference": {"class_names": list(heads)}}
        )

    def rows(self, state: dict[str, torch.Tensor], head: int, names: list[str]) -> dict[str, tuple]:
        weight, bias = state[f"heads.{head}.0.weight"], state[f"heads.{head}.0.bias"]
        return {name: (*weight[row].tolist(), float(bias[row])) for row, name in enumerate(names)}

    def assert_taken(
        self, given: list[Any], ours: list[list[str]], heads: dict[int, int], choice: WeightFilter = TAKE_ALL
    ):
        """Each head of the model has the rows of that head of the file (model's: file's), by name."""
        source, model = self.source(*given), VideoClassifier(trunk(), [len(names) for names in ours])
        report = load(model, source, choice, ours)
        for head, theirs in heads.items():
            wanted = self.rows(source.state, theirs, given[theirs])
            self.assertEqual(self.rows(model.state_dict(), head, ours[head]), wanted, (given, ours))
        return report

    def test_the_same_names_in_another_order(self):
        for ours in (["b", "a", "c"], ["c", "a", "b"]):
            report = self.assert_taken([self.LETTERS], [ours], {0: 0})
            self.assertEqual(len(report.classes), 1)
            self.assertIn(report.classes[0], "\n".join(report.lines()))
        self.assertEqual(
            self.assert_taken([self.LETTERS], [self.LETTERS], {0: 0}, WeightFilter(strict=True)).classes, []
        )

    def test_several_heads(self):
        self.assert_taken(
            [self.AB, self.LETTERS], [["c", "b", "a"], ["run", "jump"]], {0: 1, 1: 0}, WeightFilter(strict=True)
        )
        report = self.assert_taken([self.AB, ["x", "y"]], [["y", "x"]], {0: 1})
        self.assertEqual(report.dropped["heads.0.0.weight"], "no place in this model")
        report = self.assert_taken([self.AB, ["x", "y"]], [["run", "jump"]], {0: 0})
        self.assertEqual(report.dropped["heads.1.0.weight"], "no place in this model")
        with self.assertRaisesRegex(UserError, "strict.*heads.1"):
            self.assert_taken([self.AB, ["x", "y"]], [["run", "jump"]], {0: 0}, WeightFilter(strict=True))
        self.assert_taken([self.AB, self.AB], [self.AB, ["run", "jump"]], {0: 0, 1: 1})
        renamed = WeightFilter(drop=["heads.0.*"], rename={"heads.1.*": "heads.0.*"})
        self.assert_taken([["q", "r", "s"], self.LETTERS], [["c", "a", "b"]], {0: 1}, renamed)

    def test_other_names_are_refused(self):
        for given, ours in (
            ([self.LETTERS], [["a", "b", "d"]]),
            ([["A", "b", "c"]], [self.LETTERS]),
            ([self.AB, self.LETTERS], [self.AB, ["c", "b", "z"]]),
        ):
            model = VideoClassifier(trunk(), [len(names) for names in ours])
            before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            with self.assertRaisesRegex(UserError, r"class_names.*trainer/checkpoint=no_heads"):
                load(model, self.source(*given), WeightFilter(), ours)
            for name, tensor in model.state_dict().items():
                self.assertTrue(torch.equal(tensor, before[name]))
            load(model, self.source(*given), TRUNK_ALONE, ours)

    def test_where_a_side_has_no_names_only_counts_are_compared(self):
        numbers = ["0", "1", "2"]
        for given, ours in ((self.LETTERS, numbers), (numbers, self.LETTERS), (["a", "a", "b"], self.LETTERS)):
            source, model = self.source(given), VideoClassifier(trunk(), [3])
            report = load(model, source, WeightFilter(), [ours])
            self.assertTrue(torch.equal(model.heads[0][0].weight, source.state["heads.0.0.weight"]))
            self.assertEqual(len(report.classes), 1)
        with self.assertRaisesRegex(UserError, "no_heads"):
            load(VideoClassifier(trunk(), [2]), self.source(self.LETTERS), WeightFilter(), [self.AB])
        self.assertEqual(load(classifier(), weights_of(autoencoder()), WeightFilter(), [list("abcdefg")]).classes, [])

    def test_names_of_nonsense(self):
        for names in (5, [5], [[1, 2, 3]], [["a", "b"]], [[["a"], "b", "c"]], {"0": "a"}):
            source = self.source(self.LETTERS)
            source = StateDictFile(source.path, source.sha256, source.state, {"inference": {"class_names": names}})
            model = VideoClassifier(trunk(), [3])
            load(model, source, WeightFilter(), [["c", "b", "a"]])
            self.assertTrue(torch.equal(model.heads[0][0].weight, source.state["heads.0.0.weight"]))


class Choosing(unittest.TestCase):
    def chosen(self, choice: WeightFilter) -> list[str]:
        state = {name: torch.zeros(1) for name in ("trunk.a", "trunk.b", "heads.0.w", "x")}
        return sorted(filter_state_dict(state, choice, LoadReport("there.pt", "")))

    def test_keeping_dropping_renaming_and_prefixing(self):
        self.assertEqual(self.chosen(WeightFilter(keep=["trunk.*", "x"])), ["trunk.a", "trunk.b", "x"])
        self.assertEqual(self.chosen(WeightFilter(drop=["trunk.*"])), ["heads.0.w", "x"])
        self.assertEqual(
            self.chosen(WeightFilter(keep=["trunk.*"], drop=["*.b"], drop_if_present=["none*"])), ["trunk.a"]
        )
        self.assertEqual(self.chosen(WeightFilter(keep=["x"], rename={"x": ["y", "z"]})), ["y", "z"])
        renamed = WeightFilter(keep=["trunk.*"], rename={"trunk.*": ["one.*", "two.*"]})
        self.assertEqual(self.chosen(renamed), ["one.a", "one.b", "two.a", "two.b"])
        self.assertEqual(self.chosen(WeightFilter(keep=["x"], prefix="model.")), ["model.x"])

    def test_patterns_without_a_match_and_nothing_kept(self):
        for what in ("keep", "drop"):
            saying = rf"trainer\.checkpoint\.{what}: 'tronk\.\*'"
            with self.assertRaisesRegex(UserError, saying):
                self.chosen(WeightFilter(**{what: ["tronk.*"]}))
        with self.assertRaisesRegex(UserError, "there.pt.*omnivision import.*trainer/checkpoint"):
            weights = StateDictFile(Path("there.pt"), "", trunk().state_dict())
            load(classifier(), weights, WeightFilter(prefix="foo.", trunk_coverage=0))
        with self.assertRaisesRegex(UserError, r"trainer\.checkpoint\.rename: 'q'"):
            self.chosen(WeightFilter(rename={"q": "r"}))
        with self.assertRaisesRegex(UserError, "trainer/checkpoint"):
            self.chosen(WeightFilter(drop=["*"]))


class Reading(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.folder = Path(temporary.name)
        self.state = classifier().state_dict()

    def assert_read(self, source: Path, architecture: bool = False) -> None:
        found = read(source)
        self.assertEqual(set(found.state), set(self.state))
        for name, tensor in found.state.items():
            self.assertTrue(torch.equal(tensor, self.state[name]), name)
        self.assertEqual(bool(found.architecture), architecture)
        self.assertEqual(len(found.sha256), 64)

    def test_every_container(self):
        torch.save(self.state, self.folder / "bare.pt")
        torch.save({"model": self.state, "architecture": describe(classifier()), "epoch": 3}, self.folder / "run.pt")
        save_file(self.state, self.folder / "weights.safetensors")
        self.assert_read(self.folder / "bare.pt")
        self.assert_read(self.folder / "run.pt", architecture=True)
        self.assert_read(self.folder / "weights.safetensors")

    def test_damaged_files_are_refused(self):
        for manifest in (True, False):
            with self.subTest(manifest=manifest):
                folder = self.folder / f"run{manifest}" / "checkpoints"
                checkpoint.save(run_state(1, model=self.state), folder, [])
                path = folder / "checkpoint.pt"
                data = path.read_bytes()
                place = data.index(self.state["trunk.blocks.0.mlp.fc1.weight"].numpy().tobytes()) + 100
                path.unlink()
                path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
                if not manifest:
                    path.with_name("checkpoint.pt.json").unlink()
                for reader in (read, read_for_import):
                    with self.assertRaisesRegex(UserError, "its manifest" if manifest else "checksum"):
                        reader(folder.parent)

    def test_what_is_neither_file_nor_folder(self):
        os.mkfifo(self.folder / "pipe")
        for source in (self.folder / "pipe", "", self.folder / "none"):
            with self.subTest(source), self.assertRaisesRegex(UserError, "no such file or folder"):
                read(source)

    def test_files_from_before_torch_1_6(self):
        path = self.folder / "old.pt"
        torch.save({"model": classifier().state_dict()}, path, _use_new_zipfile_serialization=False)
        self.assertEqual(load(classifier(), read(path), WeightFilter(strict=True)).missing, [])
        path.write_bytes(path.read_bytes()[:-100])
        with self.assertRaisesRegex(UserError, "old.pt"):
            read(path)

    def test_a_moving_average_takes_the_place_of_the_weights(self):
        ema = {"trunk.norm.weight": torch.full((24,), 7.0)}
        torch.save({"model": self.state, "ema": ema}, self.folder / "run.pt")
        averaged, own = read(self.folder / "run.pt").state, read(self.folder / "run.pt", averaged=False).state
        self.assertTrue(torch.equal(averaged["trunk.norm.weight"], ema["trunk.norm.weight"]))
        self.assertTrue(torch.equal(own["trunk.norm.weight"], self.state["trunk.norm.weight"]))
        self.assertEqual(set(averaged), set(self.state))
        for each in read_several([str(self.folder / "run.pt")] * 2):
            self.assertTrue(torch.equal(each.state["trunk.norm.weight"], ema["trunk.norm.weight"]))

    def test_a_run_folder_gives_its_best_else_its_newest(self):
        (self.folder / "checkpoints").mkdir()
        with self.assertRaisesRegex(UserError, "checkpoints/best.pt, checkpoints/check"):
            resolve_checkpoint(self.folder)
        torch.save({"model": self.state}, self.folder / "checkpoints" / "checkpoint.pt")
        self.assertEqual(resolve_checkpoint(self.folder).name, "checkpoint.pt")
        torch.save({"model": self.state}, self.folder / "checkpoints" / "best.pt")
        self.assertEqual(resolve_checkpoint(self.folder).name, "best.pt")
        self.assert_read(self.folder)

    def test_a_checkpoint_says_its_epoch_and_metrics(self):
        last = {"loss": 0.3, "val_loss": 0.41, "val_top1": 85.714, "val_epoch": 12}
        for said, text in (
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
            torch.save({"model": self.state, **said}, self.folder / "said.pt")
            source = read(self.folder / "said.pt")
            self.assertEqual(source.checkpoint, text)
            self.assertEqual(str(source), f"{self.folder}/said.pt" + (f" ({text})" if text else ""))

    def test_several(self):
        for name in ("a.pt", "b.pt"):
            torch.save({"model": self.state}, self.folder / name)
        torch.save({"ensemble_weights": [self.state, self.state]}, self.folder / "both.pt")
        two = read_several([str(self.folder / "a.pt"), str(self.folder / "b.pt")])
        self.assertEqual([weights.path.name for weights in two], ["a.pt", "b.pt"])
        self.assertEqual(len(read_several(str(self.folder / "both.pt"))), 2)
        with self.assertRaisesRegex(UserError, "ensemble_weights"):
            read_several(str(self.folder / "a.pt"))
        with self.assertRaisesRegex(UserError, "default_ensemble"):
            read(self.folder / "both.pt")

    def test_what_is_refused(self):
        canary = self.folder / "canary"
        torch.save({"model": Canary(str(canary))}, self.folder / "evil.pt")
        with self.assertRaisesRegex(
            UserError, r"(?s)evil\.pt does not load: it holds a pickled object.*state dict alone"
        ) as told:
            read(self.folder / "evil.pt")
        self.assertNotIn("weights_only", str(told.exception))
        self.assertFalse(canary.exists())
        for content in ([1, 2], {"model": {}}, {"model": {"a": 3}}, {3: torch.zeros(1)}, torch.zeros(2)):
            torch.save(content, self.folder / "odd.pt")
            with self.assertRaisesRegex(UserError, "^pretrained_checkpoint_path: .*odd.pt"):
                read(self.folder / "odd.pt")
        claims = torch.zeros(1).expand(10**9)
        for tensor in (torch.zeros(2).to_sparse(), torch.zeros(2, device="meta"), claims):
            torch.save({"a": tensor}, self.folder / "odd.pt")
            with self.assertRaisesRegex(UserError, "odd.pt must be dense"):
                read(self.folder / "odd.pt")
        torch.save({"model": self.state, "ema": {"other": torch.zeros(1)}}, self.folder / "odd.pt")
        with self.assertRaisesRegex(UserError, "EMA .*'other'"):
            read(self.folder / "odd.pt")
        (self.folder / "junk.safetensors").write_bytes(b"\xff" * 40)
        with self.assertRaisesRegex(UserError, r"junk\.safetensors"):
            read(self.folder / "junk.safetensors")
        with self.assertRaisesRegex(UserError, "no such file or folder.*null to train from nothing"):
            read(self.folder / "nowhere")


class Architectures(unittest.TestCase):
    def test_what_is_described_is_built(self):
        average = AveragedClassifier(trunk(), [7, 5], 3, "learned_average_layer_softmax")
        for model in (autoencoder(), classifier(), average):
            told = describe(model)
            again = build(told, "here")
            self.assertIs(type(again), type(model))
            self.assertEqual(describe(again), told)
            shapes = {name: t.shape for name, t in model.state_dict().items()}
            self.assertEqual({name: t.shape for name, t in again.state_dict().items()}, shapes)
        torch.save(told, Path(self.enterContext(tempfile.TemporaryDirectory())) / "plain.pt")  # loads with weights only

    def test_nonsense(self):
        good = describe(classifier())
        for bad in (
            {},
            good | {"kind": "os.system"},
            good | {"trunk": {}},
            good | {"trunk": good["trunk"] | {"heads": 5}},
            good | {"classes": "many"},
        ):
            with self.assertRaisesRegex(UserError, "here"):
                build(bad, "here")


if __name__ == "__main__":
    unittest.main()
