"""Weights of other projects in our names: recorded figures, agreement with the real library, and files that are not good."""

import argparse
import hashlib
import json
import pickle
import re
import tempfile
import unittest
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import VideoMAEConfig, VideoMAEForPreTraining, VideoMAEForVideoClassification, VideoMAEModel
from transformers.utils.logging import disable_progress_bar

from omnivision.checkpoint.pretrained import WeightFilter, load
from omnivision.checkpoint.state_dict_file import StateDictFile, read, resolve_checkpoint
from omnivision.interop.architecture import ArchOverrides
from omnivision.interop.formats import ConvertedCheckpoint, convert, recognise
from omnivision.interop.huggingface import from_hf, preprocessor_config, to_hf
from omnivision.interop.published import from_ours, from_videomae
from omnivision.models.architecture import build, describe
from omnivision.models.classifier import VideoClassifier
from omnivision.models.mae import Decoder, MaskedAutoencoder, split_tokens
from omnivision.models.vit import VisionTransformer
from omnivision.utils.errors import UserError
from omnivision.utils.io import safe_load
from tests.parity_formula import error, record, stated, token_mask, weights
from tests.runs import call_command
from tests.test_checkpoint import Canary

disable_progress_bar()
RECORD = record("hf_videomae")
CLIP = {"num_frames": 4, "image_size": 32}
CONFIG = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 192,
    "num_frames": 4,
    "image_size": 32,
    "patch_size": 8,
    "tubelet_size": 2,
    "layer_norm_eps": 1e-6,
    "decoder_hidden_size": 24,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 4,
    "decoder_intermediate_size": 96,
}
# Left out of a file without a word from us: a table that is always the same, biases that a model may not have, a whole head.
OPTIONAL = re.compile(r"pos_embed|[qv]_bias|(query|value)\.bias")
HERE = ArchOverrides(heads=3, **CLIP, decoder_heads=4)


def trunk(**changes: Any) -> VisionTransformer:
    return VisionTransformer(48, 2, 3, **CLIP, tubelet=(2, 8, 8), **changes)


def scrambled(model: nn.Module) -> nn.Module:
    """With random numbers everywhere, in biases and norms too."""
    torch.manual_seed(3)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def classifier(*classes: int, **changes: Any) -> VideoClassifier:
    return scrambled(VideoClassifier(trunk(**changes), classes or [7]))


def autoencoder() -> MaskedAutoencoder:
    return scrambled(MaskedAutoencoder(trunk(), {"width": 24, "depth": 2, "heads": 4}))


def model_of(imported: ConvertedCheckpoint, dtype: torch.dtype = torch.float64) -> Any:
    model = build(imported.architecture, "here")
    model.load_state_dict(imported.state)
    return model.to(dtype).eval()


def recorded(key: str) -> dict[str, Tensor]:
    return weights(RECORD[f"{key}_state_dict_in_memory"])


def theirs_of(kind: type, state: Mapping[str, Tensor], **changes: Any) -> Any:
    """A float64 model of the real library with a state dict; before version 5 its names in memory were those in files."""
    model = kind(VideoMAEConfig(**CONFIG | changes))
    old = any(name.endswith("q_bias") for name in model.state_dict())
    wanted = in_file(state) if old else in_memory(state)
    model.load_state_dict(
        {name: wanted[name] for name in model.state_dict()}
    )  # exports have more names than one version
    return model.double().eval()


def in_memory(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("q_bias", "query.bias").replace("v_bias", "value.bias"): t for name, t in state.items()}


def in_file(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("query.bias", "q_bias").replace("value.bias", "v_bias"): t for name, t in state.items()}


def original_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of the library, under the names of VideoMAE's own repository."""
    pretraining = "encoder_to_decoder.weight" in state
    out: dict[str, Tensor] = {}
    for name, tensor in in_file(state).items():
        part = "decoder." if name.startswith("decoder.") else "encoder." if pretraining else ""
        for old, new in {
            r"videomae\.encoder\.layer\.": f"{part}blocks.",
            r"decoder\.decoder_layers\.": "decoder.blocks.",
            r"videomae\.embeddings\.patch_embeddings\.projection": f"{part}patch_embed.proj",
            r"videomae\.layernorm": f"{part}norm",
            r"attention\.attention\.": "attn.",
            r"attention\.output\.dense": "attn.proj",
            r"layernorm_before": "norm1",
            r"layernorm_after": "norm2",
            r"intermediate\.dense": "mlp.fc1",
            r"\.output\.dense": ".mlp.fc2",
            r"^classifier": "head",
        }.items():
            name = re.sub(old, new, name)
        out[name] = tensor
    for name in [name for name in out if name.endswith("attn.query.weight")]:
        parts = [out.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        out[name.replace("query", "qkv")] = torch.cat(parts)
    return out


class Case(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.folder = Path(temporary.name)

    def assert_equal_states(self, one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
        self.assertEqual(set(one), set(other))
        for name, tensor in one.items():
            self.assertTrue(torch.equal(tensor, other[name]), name)

    def save(self, state: Any, name: str = "weights.pt") -> Path:
        torch.save(state, self.folder / name)
        return self.folder / name


class PublishedFigures(Case):
    def test_formula_is_the_stated_one(self):
        for key in ("classification", "pretraining"):
            digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in recorded(key).values())).hexdigest()
            self.assertEqual(digest, RECORD[f"{key}_parameters_sha256"])

    def test_their_classifier_here(self):
        case = RECORD["import_of_the_classification_model_above"]
        state, video = recorded("classification"), stated(RECORD["input"]).double()
        for names in (state, in_file(state)):
            imported = from_hf(names, CONFIG)
            scores = model_of(imported)(video)
            self.assertLess(error(scores, case["logits_in_the_ancestor"]), 1e-9)
        self.assertLess(error(model_of(imported, torch.float32)(video.float()), case["logits_in_the_ancestor"]), 1e-5)
        theirs = RECORD["classification"][0]["logits"]["f64"]["values"]
        difference = (scores.flatten() - torch.tensor(theirs, dtype=torch.float64)).abs().max().item()
        self.assertAlmostEqual(difference, case["max_abs_difference_to_transformers"], delta=5e-8)
        self.assertEqual(imported.assumed, ["epsilon 1e-06 of the last norm (theirs: 1e-05)"])
        published = {key: value for key, value in CONFIG.items() if key != "layer_norm_eps"}
        self.assertIn("LayerNorm epsilon 1e-06 (theirs: 1e-12)", from_hf(state, published).assumed)

    def test_our_classifier_there(self):
        case, state = RECORD["export_of_03_classifier"], weights(record("classifier")["state_dict"])
        imported = from_ours(state, overrides=HERE)
        pixels = stated(record("classifier")["video"]["input"]).double().transpose(1, 2)
        self.assertGreater(
            state["trunk.blocks.0.attn.qkv.bias"][48:96].abs().max(), 0.05, "there is a key bias to drop"
        )
        exported = to_hf(imported.state, imported.architecture)
        model = theirs_of(VideoMAEForVideoClassification, exported.state, num_labels=7)
        scores = model(pixels).logits.flatten()
        wanted = torch.tensor(case["exported_logits_f64 (fc_norm eps 1e-5)"], dtype=torch.float64)
        self.assertLess((scores - wanted).abs().max(), 1e-9)
        ours = torch.tensor(case["ancestor_logits_f64"], dtype=torch.float64)
        self.assertAlmostEqual((scores - ours).abs().max().item(), case["max_abs_difference"], delta=5e-8)
        model.fc_norm.eps = 1e-6
        self.assertLess((model(pixels).logits.flatten() - ours).abs().max(), 1e-9)

    def test_our_encoder_there(self):
        case = record("mae")["video"]
        imported = from_ours(weights(record("mae")["state_dict"]), overrides=HERE)
        exported = to_hf(imported.state, imported.architecture)
        model = theirs_of(VideoMAEModel, exported.state, use_mean_pooling=False)
        mask = token_mask(case["mask"])
        found = model(stated(case["input"]).double().transpose(1, 2), bool_masked_pos=mask).last_hidden_state
        self.assertLess(error(found, case["expected"]["intermediate"]["encoder_norm_output"]), 1e-9)

    def test_their_pretraining_here(self):
        state, video = recorded("pretraining"), stated(RECORD["input"]).double()
        imported = from_hf(state, CONFIG)
        self.assertEqual(imported.architecture["kind"], "autoencoder")
        self.assertEqual(imported.architecture["decoder"], {"width": 24, "depth": 2, "heads": 4, "attention": "self"})
        self.assertEqual(imported.dropped, {})
        self.assertIn("epsilon 1e-06 of the last norm (theirs: 1e-05)", imported.assumed)
        model, mask = model_of(imported), token_mask(RECORD["mask"])
        theirs = theirs_of(VideoMAEForPreTraining, state, use_mean_pooling=False)
        theirs.decoder.norm.eps = 1e-6
        found = model(video, mask).pixels
        # Positions are float32 there and here, and here they pass through the projection.
        self.assertLess((theirs(video.transpose(1, 2), bool_masked_pos=mask).logits - found).abs().max(), 1e-5)
        ours = model.trunk.norm(model.trunk(video, split_tokens(mask)[0]))
        hidden = theirs.videomae(video.transpose(1, 2), bool_masked_pos=mask).last_hidden_state
        self.assertLess((hidden - ours).abs().max(), 1e-9)


class Formats(Case):
    def test_videomaes_own_names(self):
        for key in ("classification", "pretraining"):
            state = recorded(key)
            named = original_names(state)
            self.assertEqual(recognise(named), "videomae")
            imported, wanted = from_videomae(named, HERE), from_hf(state, CONFIG)
            self.assert_equal_states(imported.state, wanted.state)
            self.assertEqual(imported.architecture, wanted.architecture)
            self.assertEqual(len([n for n in imported.filled if n.endswith("[k]")]), 4 if key == "pretraining" else 2)
            self.assertEqual(imported.dropped, {})

    def test_a_decoder_that_ours_cannot_be_is_dropped_and_listed(self):
        state = recorded("pretraining")
        flat = torch.ones_like(state["encoder_to_decoder.weight"])
        wide = {
            name: torch.cat([tensor, tensor], tensor.ndim - 1 if "output" in name else 0)
            for name, tensor in state.items()
            if re.search(r"decoder_layers.*(intermediate|\d\.output\.dense\.weight)", name)
        }
        for change in ({"encoder_to_decoder.weight": flat}, {"decoder.head.weight": torch.zeros(5, 24)}, wide):
            for names, convert_one in (
                (state | change, lambda s: from_hf(s, CONFIG)),
                (original_names(state | change), lambda s: from_videomae(s, HERE)),
            ):
                imported = convert_one(names)
                self.assertEqual(imported.architecture["classes"], [])
                gone = {name for name in names if name.startswith(("decoder.", "encoder_to", "mask_token"))}
                self.assertEqual(set(imported.dropped), gone)
        with self.assertRaisesRegex(UserError, "not finite"):
            from_hf(state | {"encoder_to_decoder.weight": flat * float("nan")}, CONFIG)
        del names["mask_token"]
        self.assertNotIn("decoder", from_videomae(names, HERE).architecture)

    def test_heads_of_a_decoder_are_those_of_published_ones_unless_given(self):
        theirs = VideoMAEForPreTraining(VideoMAEConfig(**CONFIG | {
            "hidden_size": 192, "intermediate_size": 96, "decoder_hidden_size": 192, "decoder_intermediate_size": 768,
            "use_mean_pooling": False
        }))  # fmt: skip
        named = original_names(scrambled(theirs).state_dict())
        imported = from_videomae(named, ArchOverrides(heads=3, **CLIP))
        self.assertEqual(imported.architecture["decoder"]["heads"], 3)
        self.assertIn("--decoder-heads 3", imported.assumed)
        self.assertEqual(from_videomae(named, ArchOverrides(3, 4, 32, 8)).architecture["decoder"]["heads"], 8)
        with self.assertRaisesRegex(UserError, "--decoder-heads"):
            from_hf(
                theirs.state_dict(),
                CONFIG | {"hidden_size": 192, "decoder_hidden_size": 192, "decoder_num_attention_heads": 4},
                ArchOverrides(decoder_heads=8),
            )

    def test_videomaes_head_on_the_first_token_is_dropped(self):
        named = original_names(recorded("classification"))
        named = {name.replace("fc_norm", "norm"): tensor for name, tensor in named.items()}
        imported = from_videomae(named, HERE)
        self.assertEqual(set(imported.dropped), {"head.weight", "head.bias"})
        self.assertTrue(torch.equal(imported.state["trunk.norm.weight"], named["norm.weight"]))
        self.assertEqual(imported.architecture["classes"], [])

    def test_without_biases_of_q_and_v(self):
        named = {name: t for name, t in original_names(recorded("classification")).items() if "_bias" not in name}
        imported = from_videomae(named, HERE)
        self.assertEqual(float(imported.state["trunk.blocks.1.attn.qkv.bias"].abs().max()), 0)
        hf = {name: t for name, t in in_file(recorded("classification")).items() if "_bias" not in name}
        self.assert_equal_states(from_hf(hf, CONFIG).state, imported.state)

    def test_omnimae(self):
        for model, head in ((autoencoder(), "heads.0.projector."), (classifier(), "heads.0.0.")):
            wanted = model.state_dict()
            theirs = {name.replace(head, "head."): tensor for name, tensor in wanted.items()}
            for name in [n for n in theirs if re.search(r"decoder_blocks.*qkv\.bias", n)]:
                del theirs[name]
                wanted[name] = torch.zeros_like(wanted[name])
            imported, format = convert(StateDictFile(Path("x"), "", theirs), overrides=HERE)
            self.assertEqual(format, "omnimae")
            self.assert_equal_states(imported.state, wanted)
            self.assertEqual(imported.architecture, describe(model))
            self.assertEqual(len(imported.filled), 2 if head == "heads.0.projector." else 0)

    def test_ppma(self):
        """Our names without a word on the architecture; from several processes, under `module.`, without position tables."""
        for model in (autoencoder(), classifier(7, 3), classifier(rgbd=True)):
            state = {f"module.{n}": t for n, t in model.state_dict().items() if "pos_embed" not in n}
            path = self.save({"model": state, "optimizer": {"state": {}}, "epoch": 3, "loss": 0.5, "steps": {}})
            imported, format = convert(read(path), overrides=HERE)
            self.assertEqual(format, "ppma")
            self.assert_equal_states(imported.state, model.state_dict())
            self.assertEqual(imported.architecture, describe(model))
            self.assertEqual(set(imported.filled), {n for n in model.state_dict() if "pos_embed" in n})

    def test_names_that_wrappers_have_changed(self):
        def changed(pattern: str, new: str) -> dict[str, Tensor]:
            return {re.sub(pattern, new, name): tensor for name, tensor in classifier().state_dict().items()}

        wanted = classifier().state_dict()
        for pattern, new in (
            ("^", "_orig_mod."),
            ("^", "module._orig_mod."),
            ("^", "_orig_mod.module."),
            ("^", "module.module."),
            (r"^trunk\.", "trunk._orig_mod."),
            (r"blocks\.(\d)\.", r"blocks.\1._checkpoint_wrapped_module._orig_mod."),
            (r"^(trunk\.blocks\.\d\.)?", r"_fsdp_wrapped_module.\1_fsdp_wrapped_module."),
        ):
            state = changed(pattern, new)
            save_file(state, self.folder / "x.safetensors")
            for path in (self.save({"model": state}), self.save({"state_dict": state}), self.folder / "x.safetensors"):
                with self.subTest(new=new, path=path.name):
                    self.assert_equal_states(read(path).state, wanted)
                    self.assertEqual(load(classifier(), read(path), WeightFilter(strict=True)).missing, [])
        lightning = self.save({"state_dict": changed("^", "model._orig_mod.")})
        self.assert_equal_states(convert(read(lightning), overrides=HERE)[0].state, wanted)

    def test_an_entry_that_is_there_twice_is_refused(self):
        state = classifier().state_dict()
        with self.assertRaisesRegex(UserError, "_orig_mod"):
            read(self.save(state | {f"_orig_mod.{name}": tensor for name, tensor in state.items()}))

    def test_omnimaes_decoder_may_have_biases(self):
        wanted = autoencoder().state_dict()
        theirs = {name.replace("heads.0.projector.", "head."): tensor for name, tensor in wanted.items()}
        self.assert_equal_states(convert(StateDictFile(Path("x"), "", theirs), overrides=HERE)[0].state, wanted)

    def test_files_that_old_versions_of_torch_wrote(self):
        """No zip archives: they cannot be mapped into memory, and have only plain tensors all the same."""
        state = classifier().state_dict()
        torch.save({"model": state}, self.folder / "old.pth", _use_new_zipfile_serialization=False)
        self.assert_equal_states(convert(read(self.folder / "old.pth"), overrides=HERE)[0].state, state)

    def test_a_checkpoint_of_videomae_with_its_command_line(self):
        arguments = argparse.Namespace(model="vit", epochs=3)
        for key in ("model", "module"):
            path = self.save({key: original_names(recorded("classification")), "args": arguments, "epoch": 4})
            self.assertEqual(convert(read(path), overrides=HERE)[1], "videomae")

    def test_real_folders(self):
        video = stated(RECORD["input"]).double()
        pixels = video.transpose(1, 2)
        for kind, changes in (
            (VideoMAEForVideoClassification, {"num_labels": 5}),
            (VideoMAEModel, {"use_mean_pooling": False}),
            (VideoMAEModel, {"use_mean_pooling": True}),
            (VideoMAEForPreTraining, {"use_mean_pooling": False}),
        ):
            theirs = scrambled(kind(VideoMAEConfig(**CONFIG | changes)))
            folder = self.folder / f"{kind.__name__}{changes}"
            theirs.save_pretrained(folder)
            imported, format = convert(read(folder))
            self.assertEqual((format, resolve_checkpoint(folder).name), ("hf", "model.safetensors"))
            model, theirs = model_of(imported), theirs.double()
            if kind is VideoMAEForVideoClassification:
                self.assertLess((theirs(pixels).logits - model(video)).abs().max(), 5e-5)
                continue
            found = getattr(theirs, "videomae", theirs)(pixels).last_hidden_state
            ours = model.trunk(video) if changes["use_mean_pooling"] else model.trunk.norm(model.trunk(video))
            self.assertLess((found - ours).abs().max(), 1e-9)
            self.assertEqual("trunk.norm.weight" in imported.filled, changes["use_mean_pooling"])

    def test_shards_and_bin_files_hold_the_same(self):
        theirs = scrambled(VideoMAEForVideoClassification(VideoMAEConfig(**CONFIG, num_labels=5)))
        theirs.save_pretrained(self.folder / "one")
        theirs.save_pretrained(self.folder / "many", max_shard_size="100KB")
        self.assertGreater(len(list((self.folder / "many").glob("*.safetensors"))), 2)
        (self.folder / "bin").mkdir()
        torch.save(load_file(self.folder / "one" / "model.safetensors"), self.folder / "bin" / "pytorch_model.bin")
        (self.folder / "bin" / "config.json").write_bytes((self.folder / "one" / "config.json").read_bytes())
        (self.folder / "bins").mkdir()
        (self.folder / "bins" / "config.json").write_bytes((self.folder / "one" / "config.json").read_bytes())
        whole, where = load_file(self.folder / "one" / "model.safetensors"), {}
        for number, name in enumerate(whole):
            part = self.folder / "bins" / f"pytorch_model-{number % 2}.bin"
            torch.save({n: t for i, (n, t) in enumerate(whole.items()) if i % 2 == number % 2}, part)
            where[name] = part.name
        (self.folder / "bins" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
        one, many, plain, bins = (convert(read(self.folder / name))[0] for name in ("one", "many", "bin", "bins"))
        torch.save({}, self.folder / "one" / "pytorch_model.bin")
        self.assertEqual(
            resolve_checkpoint(self.folder / "one").name, "model.safetensors", "the first choice of several"
        )
        for other in (many, plain, bins):
            self.assert_equal_states(one.state, other.state)
            self.assertEqual(one.architecture, other.architecture)

    def test_there_and_back(self):
        for model in (classifier(), classifier(4, 9), autoencoder()):
            state, architecture = model.state_dict(), describe(model)
            exported = to_hf(state, architecture, head=len(architecture.get("classes", [0])) - 1)
            back = from_hf(exported.state, exported.config)
            again = to_hf(back.state, back.architecture)
            self.assert_equal_states(again.state, exported.state)
            self.assertEqual(again.config, exported.config)
            wanted = {name: t.clone() for name, t in state.items() if name in back.state or name == "heads.1.0.weight"}
            if "heads.1.0.weight" in wanted:
                wanted |= {f"heads.0.0.{leaf}": state[f"heads.1.0.{leaf}"] for leaf in ("weight", "bias")}
                del wanted["heads.1.0.weight"]
            self.assert_equal_states(back.state, wanted)

    def test_biases_under_two_names_are_one(self):
        model = classifier()
        exported = to_hf(model.state_dict(), describe(model))
        name = "videomae.encoder.layer.1.attention.attention.q_bias"
        for gone in (r"[qv]_bias", r"(query|key|value)\.bias", r"key\.bias"):
            left = {name: tensor for name, tensor in exported.state.items() if not re.search(gone, name)}
            found = from_hf(left, exported.config).state["trunk.blocks.1.attn.qkv.bias"]
            wanted = model.trunk.blocks[1].attn.qkv.bias.detach().clone()
            if "key" in gone:
                wanted[48:96] = 0
            self.assertTrue(torch.equal(found, wanted), gone)
        with self.assertRaisesRegex(UserError, re.escape(name)):
            from_hf(exported.state | {name: torch.zeros(48)}, exported.config)

    def test_what_was_imported_is_taken_by_a_stage(self):
        imported = from_hf(recorded("pretraining"), CONFIG)
        source = StateDictFile(Path("x.pt"), "0", imported.state, {"architecture": imported.architecture})
        report = load(classifier(5), source, WeightFilter(trunk_coverage=1))
        self.assertEqual(report.missing, ["heads.0.0.bias", "heads.0.0.weight"])
        self.assertEqual(set(report.dropped.values()), {"no place in this model"})
        model = autoencoder()
        report = load(model, source, WeightFilter(strict=True))
        self.assertEqual((report.missing, report.dropped), ([], {}))
        self.assert_equal_states(model.state_dict(), imported.state)

    def test_another_number_of_heads_is_refused_by_a_stage(self):
        imported = from_hf(recorded("pretraining"), CONFIG)
        source = StateDictFile(Path("x.pt"), "0", imported.state, {"architecture": imported.architecture})
        other_decoder = MaskedAutoencoder(trunk(), {"width": 24, "depth": 2, "heads": 6})
        other_trunk = VideoClassifier(VisionTransformer(48, 2, 6, **CLIP, tubelet=(2, 8, 8)), [7])
        for model, setting in (
            (other_decoder, "trainer.model.decoder.heads=4"),
            (other_trunk, "trainer.model.trunk.heads=3"),
        ):
            with self.assertRaisesRegex(UserError, setting):
                load(model, source, WeightFilter())
        load(other_decoder, source, WeightFilter(drop=["trunk.decoder.*", "trunk.mask_token", "heads.*"]))
        other_decoder.trunk.decoder = Decoder(48, 32, width=16, depth=2, heads=4)
        with self.assertRaisesRegex(UserError, "no_heads_no_decoder"):
            load(other_decoder, source, WeightFilter())

    def test_another_depth_is_refused_by_a_stage(self):
        imported = from_hf(recorded("pretraining"), CONFIG)
        source = StateDictFile(Path("x.pt"), "0", imported.state, {"architecture": imported.architecture})
        for depth in (1, 3):
            model = MaskedAutoencoder(trunk(), {"width": 24, "depth": depth, "heads": 4})
            with self.assertRaisesRegex(UserError, "trainer.model.decoder.depth=2.*no_heads_no_decoder"):
                load(model, source, WeightFilter())
            load(model, source, WeightFilter(drop=["trunk.decoder.*", "trunk.mask_token", "heads.*"]))
        shallow = VideoClassifier(VisionTransformer(48, 1, 3, **CLIP, tubelet=(2, 8, 8)), [7])
        with self.assertRaisesRegex(UserError, "trainer.model.trunk.depth=2"):
            load(shallow, source, WeightFilter())
        load(shallow, source, WeightFilter(drop=["trunk.blocks.1.*"]))

    def test_names_of_other_projects_are_to_be_imported(self):
        with self.assertRaisesRegex(UserError, "omnivision import x.pt"):
            load(classifier(5), StateDictFile(Path("x.pt"), "0", recorded("pretraining"), {}), WeightFilter())

    def test_what_cannot_be_carried_is_refused_or_told(self):
        model = classifier(7, 3, rgbd=True)
        exported = to_hf(model.state_dict(), describe(model))
        self.assertEqual({name.rpartition(".")[0] for name in exported.dropped}, {
            "trunk.depth_patch_embed.proj.1", "heads.1.0"
        })  # fmt: skip
        with self.assertRaisesRegex(UserError, "--head .* got 2"):
            to_hf(model.state_dict(), describe(model), head=2)
        exported = to_hf(autoencoder().state_dict(), describe(autoencoder()))
        gone = {name for name in autoencoder().state_dict() if re.search("decoder|mask_token|heads", name)}
        self.assertEqual(set(exported.dropped), gone)
        model.trunk.pos_embed += 1e-3
        with self.assertRaisesRegex(UserError, "--to pt"):
            to_hf(model.state_dict(), describe(model))

    def test_pixels_as_our_models_expect_them(self):
        found = preprocessor_config(describe(classifier()))
        self.assertEqual(
            (found["image_mean"], found["crop_size"]), ([0.485, 0.456, 0.406], {"height": 32, "width": 32})
        )


class Geometry(Case):
    def test_what_the_file_tells_is_not_asked(self):
        state = classifier().state_dict()
        for given, message in (
            (ArchOverrides(heads=3, num_frames=4, image_size=64), "--image-size is 64, .* 32"),
            (ArchOverrides(heads=5, num_frames=4), "--num-heads .* 48"),
            (ArchOverrides(heads=0), "--num-heads .*'0'"),
            (ArchOverrides(num_frames=4), "--num-heads N"),
            (ArchOverrides(heads=3, num_frames=2), "--image-size N"),
            (ArchOverrides(heads=3, num_frames=2, image_size=32), "16 tokens, .* 32. Set --num-frames"),
        ):
            with self.assertRaisesRegex(UserError, message):
                from_ours(state, overrides=given)
        with self.assertRaisesRegex(UserError, "--decoder-heads .* 24"):
            from_ours(autoencoder().state_dict(), overrides=ArchOverrides(heads=3, num_frames=4, decoder_heads=5))
        with self.assertRaisesRegex(UserError, "--num-heads is 4, .* 3"):
            from_hf(recorded("classification"), CONFIG, ArchOverrides(heads=4))
        with self.assertRaisesRegex(UserError, "30 x 30 pixels.*--image-size"):
            from_videomae(
                original_names(recorded("classification")), ArchOverrides(heads=3, num_frames=4, image_size=30)
            )

    def test_usual_numbers_are_assumed_and_told(self):
        with torch.device("meta"):
            state = VideoClassifier(VisionTransformer(192, 1), [2]).state_dict()
        imported = from_ours({name: torch.zeros(tensor.shape) for name, tensor in state.items()})
        self.assertEqual(imported.assumed, ["--num-heads 3", "--num-frames 16"])
        self.assertEqual(imported.architecture["trunk"]["image_size"], 224)
        self.assertIn("  assumed     2  --num-heads 3, --num-frames 16", imported.lines())

    def test_a_width_that_a_ratio_truncates(self):
        model = scrambled(VideoClassifier(VisionTransformer(48, 1, 3, 2.6, **CLIP, tubelet=(2, 8, 8)), [2]))
        self.assertEqual(from_ours(model.state_dict(), describe(model)).architecture, describe(model))
        # Neither does a ratio that is got from the weights lose a row: 88 * (240 / 88) is below 240.
        model = scrambled(VideoClassifier(VisionTransformer(88, 1, 2, 2.73, **CLIP, tubelet=(2, 8, 8)), [2]))
        self.assertEqual(len(model.trunk.blocks[0].mlp.fc1.weight), 240)
        imported = from_ours(model.state_dict(), overrides=ArchOverrides(heads=2, num_frames=4))
        self.assert_equal_states(model_of(imported, torch.float32).state_dict(), model.state_dict())


class Command(Case):
    def run_import(self, *arguments: object) -> str:
        code, out, _ = call_command("import", *arguments)
        self.assertEqual(code, 0)
        return out

    def test_it_writes_one_file_and_tells(self):
        source, out = self.save(original_names(recorded("pretraining")), "theirs.pth"), self.folder / "new" / "out.pt"
        told = self.run_import(
            source, out, "--num-heads", 3, "--num-frames", 4, "--image-size", 32, "--decoder-heads", 4
        )
        self.assertRegex(told, r"theirs\.pth: \d+ tensors of format videomae\n")
        self.assertRegex(told, r"renamed +57  encoder\.patch_embed\.proj\.weight -> .*, \.\.\.\n")
        self.assertRegex(told, r"filled +5  .*trunk\.blocks\.0\.attn\.qkv\.bias\[k\], .*\(zeros; not in the file\)\n")
        self.assertRegex(told, r"filled +1  trunk\.pos_embed \(the fixed table\)\n")
        self.assertRegex(told, r"filled +1  trunk\.mask_token \(mask_token, before the projection\)\n")
        self.assertNotIn("dropped", told)
        self.assertRegex(told, r"Wrote .*autoencoder of width 48, depth 2, 3 heads, 4 frames of 32 x 32\n")
        found = safe_load(out)
        self.assertEqual(set(found), {"format", "model", "architecture", "origin"})
        self.assertEqual(found["origin"]["name"], "theirs.pth")
        self.assertEqual(found["origin"]["sha256"], hashlib.sha256(source.read_bytes()).hexdigest())
        again = self.folder / "again.pt"
        self.assertIn("format omnivision", self.run_import(out, again))
        self.assert_equal_states(safe_load(again)["model"], found["model"])
        self.assertEqual(safe_load(again)["architecture"], found["architecture"])
        self.assertEqual([path.name for path in self.folder.rglob(".*")], [], "no temporary files")

    def test_nothing_is_overwritten_unasked(self):
        source, out = self.save(classifier().state_dict()), self.folder / "out.pt"
        out.write_text("precious")
        options = ("--num-heads", 3, "--num-frames", 4)
        with self.assertRaisesRegex(UserError, "exists.*--force"):
            self.run_import(source, out, *options)
        self.assertEqual(out.read_text(), "precious")
        self.run_import(source, out, *options, "--force")
        self.assert_equal_states(safe_load(out)["model"], classifier().state_dict())
        for target, message in (
            (source, "OUT"),
            (self.folder, "OUT"),
            (out / "x.pt", "cannot be"),
        ):
            with self.assertRaisesRegex(UserError, message):
                self.run_import(source, target, *options, "--force")
        with self.assertRaisesRegex(UserError, r"OUT must end in \.pt"):
            self.run_import(source, self.folder / "out.safetensors", *options)

    def test_parts_of_larger_tensors_are_written_alone(self):
        state = {name: torch.cat([t.flatten(), t.new_zeros(100_000)])[: t.numel()].view(t.shape)
                 for name, t in classifier().state_dict().items()}  # fmt: skip
        source, out = self.save(state), self.folder / "out.pt"
        self.assertGreater(source.stat().st_size, 10e6)
        self.run_import(source, out, "--num-heads", 3, "--num-frames", 4)
        self.assertLess(out.stat().st_size, 1e6)

    def test_a_failed_write_leaves_what_was_there(self):
        source, out = self.save(classifier().state_dict()), self.folder / "out.pt"
        out.write_text("precious")
        full = mock.patch("omnivision.interop.export.torch.save", side_effect=OSError(28, "No space left on device"))
        with full, self.assertRaisesRegex(UserError, "cannot be written: No space left"):
            self.run_import(source, out, "--num-heads", 3, "--num-frames", 4, "--force")
        self.assertEqual(out.read_text(), "precious")
        self.assertEqual({path.name for path in self.folder.iterdir()}, {"weights.pt", "out.pt"})


class BadFiles(Case):
    def refused(self, source: Path | dict, message: str, given: ArchOverrides = HERE, format: str = "auto") -> None:
        with self.assertRaisesRegex(UserError, message) as caught:
            convert(read(source) if isinstance(source, Path) else StateDictFile(Path("x"), "", source), format, given)
        self.assertNotIn("\n", str(caught.exception))

    def test_pickled_objects_are_refused_with_the_way_out(self):
        canary = self.folder / "canary"
        for name in ("old.pt", "old.bin"):
            self.save({"model": classifier().state_dict(), "more": Canary(str(canary))}, name)
            self.refused(self.folder / name, "Save its state dict alone")
        (self.folder / "bare.pth").write_bytes(pickle.dumps(Canary(str(canary))))
        with warnings.catch_warnings(action="ignore"):  # torch's, of the pickle's version
            self.refused(self.folder / "bare.pth", r"bare\.pth.*Save its state dict alone")
        (self.folder / "hf").mkdir()
        (self.folder / "hf" / "config.json").write_text(json.dumps(CONFIG))
        (self.folder / "old.bin").rename(self.folder / "hf" / "pytorch_model.bin")
        self.refused(self.folder / "hf", "Save its state dict alone")
        self.assertFalse(canary.exists())

    def test_what_is_no_state_dict(self):
        for content, message in (
            ([torch.zeros(2)], "got a list"),
            ({"model": {}}, "no tensors"),
            ({"model": {"a": 3}}, "got 'a', a int"),
            ({3: torch.zeros(2)}, "got 3, a Tensor"),
            ({"ensemble_weights": []}, "ensemble_weights"),
            ({"a": torch.zeros(2, device="meta")}, "a in .*dense"),
            ({"a": torch.eye(2).to_sparse()}, "a in .*dense"),
            ({"a": torch.zeros(1).expand(2**40)}, "^.*a in .*dense"),
        ):
            with warnings.catch_warnings(action="ignore"):  # torch's, of the scan of sparse tensors
                self.refused(self.save(content), message)
        (self.folder / "junk.safetensors").write_bytes(b"\xff" * 40)
        self.refused(self.folder / "junk.safetensors", "junk.safetensors")
        self.refused(self.folder / "none.pt", "none.pt")
        self.refused(self.folder, "checkpoints/best.pt or ")

    def test_names_that_nobody_has(self):
        state = classifier().state_dict()
        self.refused(state | {"cls_token": torch.zeros(1)}, "1 of .* omnivision.*: cls_token")
        self.refused({"conv1.weight": torch.zeros(1)}, "1 of 1 .*conv1.weight")
        self.refused(state, "format hf.*--format omnivision", format="hf")
        omnimae = {n.replace("heads.0.0.", "head."): t for n, t in state.items()}
        self.refused(omnimae, r"2 of .* ppma.*head\.weight.*--format omnimae", format="ppma")
        self.refused({"mixing_ratio": torch.ones(2)}, "--merge")
        layer_scale = original_names(recorded("classification")) | {"blocks.0.gamma_1": torch.ones(48)}
        self.refused(layer_scale, r"1 of .* videomae.*: blocks\.0\.gamma_1")

    def test_tensors_that_make_no_model(self):
        for state in (
            classifier().state_dict(),
            recorded("classification"),
            original_names(recorded("classification")),
        ):
            for name in [name for name in state if ".0." not in name or name.startswith("heads")]:
                with self.subTest(name):
                    if not OPTIONAL.search(name):
                        without = {other: tensor for other, tensor in state.items() if other != name}
                        self.refused(without, "missing|left over")
                    longer = torch.zeros(*state[name].shape[:-1], state[name].shape[-1] + 1)
                    self.refused(state | {name: longer}, "shape|positions|tubelet")
                    self.refused(state | {name: torch.zeros(())}, "shape")
        depth = {"trunk.patch_embed.proj.1.weight": torch.zeros(48, 1, 2, 8, 8)}
        self.refused(classifier().state_dict() | depth, "3 channels.* 1")
        blocks = {name.replace("blocks.1.", "blocks.7."): t for name, t in classifier().state_dict().items()}
        self.refused(blocks, r"12 missing: trunk\.blocks\.1\..*; 12 left over: trunk\.blocks\.7")

    def test_parts_of_one_tensor_that_have_no_rows(self):
        state = recorded("classification")
        for name in [name for name in state if "layer.0.attention.attention" in name and name.endswith("weight")]:
            state[name] = torch.zeros(())
        self.refused(state, r"query\.weight.* shape")

    def test_what_a_file_says_must_be_what_its_weights_are(self):
        model = classifier()
        said = describe(model)
        for part, key, value, message in (
            ("trunk", "depth", 10**9, "trunk depth .*1000000000.* 2"),
            ("trunk", "num_frames", 2**40, "--num-frames .* 65536"),
            ("trunk", "num_frames", 40000, "--image-size"),
            ("trunk", "heads", "3", "--num-heads .*'3'"),
            ("trunk", "heads", True, "--num-heads .*'True'"),
            ("trunk", "mlp_ratio", float("nan"), "trunk mlp_ratio .*'nan'"),
            ("trunk", "new", 1, "trunk new"),
            ("kind", None, "autoencoder", "kind .*'autoencoder'"),
            ("classes", None, [10**9], "classes"),
            ("trunk", None, [3], "trunk .*numbers by name"),
        ):
            changed = said | {part: said[part] | {key: value} if key else value}
            self.refused(self.save({"model": model.state_dict(), "architecture": changed}), message, ArchOverrides())

    def test_a_configuration_of_nonsense(self):
        folder = self.folder / "hf"
        folder.mkdir()
        save_file(in_file(recorded("classification")), folder / "model.safetensors")
        for text, message in (
            ("{", "must hold a JSON object"),
            ("[" * 100_000, "must hold a JSON object"),
            ("[1]", "must hold a JSON object, got a list"),
            ("\udcff", "cannot be read"),
            (json.dumps(CONFIG | {"model_type": "bert"}), "model_type .*'bert'"),
            (json.dumps(CONFIG | {"hidden_act": "relu"}), "hidden_act .*'relu'"),
            (json.dumps(CONFIG | {"num_channels": 1}), "num_channels .*'1'"),
            (json.dumps(CONFIG | {"num_attention_heads": 0}), "--num-heads .*'0'"),
            (json.dumps(CONFIG | {"num_attention_heads": {"a": 1}}), "--num-heads"),
            (json.dumps(CONFIG | {"num_frames": 1e300}), "--num-frames"),
            (json.dumps(CONFIG | {"num_frames": 65536, "image_size": 65536}), "more than 1048576 tokens"),
            (json.dumps(CONFIG | {"image_size": [32, 64]}), "--image-size"),
            (json.dumps(CONFIG | {"num_hidden_layers": 10**9}), "trunk depth .* 2"),
            (json.dumps(CONFIG | {"patch_size": None}), "trunk tubelet"),
        ):
            with self.subTest(text[:60]):
                (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
                self.refused(folder, message, ArchOverrides())
        (folder / "config.json").write_text(json.dumps(CONFIG | {"image_size": [32, 32], "patch_size": [8, 8]}))
        self.assertEqual(
            convert(read(folder))[0].architecture, from_hf(recorded("classification"), CONFIG).architecture
        )

    def test_an_index_that_leads_elsewhere(self):
        folder = self.folder / "hf"
        folder.mkdir()
        state = in_file(recorded("classification"))
        save_file(state, folder / "a.safetensors")
        save_file(state, self.folder / "outside.safetensors")
        (folder / "config.json").write_text(json.dumps(CONFIG))
        index = folder / "model.safetensors.index.json"
        for name in ("../outside.safetensors", str(self.folder / "outside.safetensors"), "..", "", "a.txt"):
            index.write_text(json.dumps({"weight_map": dict.fromkeys(state, name)}))
            self.refused(folder, "weight_map")
        for content, message in (
            ({"weight_map": [1]}, "weight_map"),
            ({"weight_map": {}}, "weight_map"),
            ({"weight_map": {"a": 3}}, "weight_map"),
            ({"weight_map": dict.fromkeys(state, "b.safetensors")}, "b.safetensors"),
        ):
            index.write_text(json.dumps(content))
            self.refused(folder, message)
        index.write_text(json.dumps({"weight_map": dict.fromkeys(state, "a.safetensors")}))
        self.assertIsInstance(read(folder), StateDictFile)


if __name__ == "__main__":
    unittest.main()
