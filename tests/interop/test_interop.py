"""Weights of other projects in our names: recorded outputs, agreement with the real library, and invalid files."""

import argparse
import contextlib
import hashlib
import json
import re
import shutil
import unittest
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import VideoMAEConfig, VideoMAEForPreTraining, VideoMAEForVideoClassification, VideoMAEModel
from transformers.utils.logging import disable_progress_bar

from omnivision.checkpoint.pretrained import WeightFilter, load_filtered
from omnivision.checkpoint.state_dict_file import StateDictFile, read_weights, resolve_checkpoint
from omnivision.interop.formats import ConvertedCheckpoint, convert_file, convert_state_dict, recognize
from omnivision.interop.huggingface import preprocessor_config, to_hf
from omnivision.interop.infer_architecture import ArchOverrides
from omnivision.models.architecture import architecture_of, from_architecture
from omnivision.models.classifier import VideoClassifier
from omnivision.models.mae import split_tokens
from omnivision.models.vit import VisionTransformer
from omnivision.utils.errors import UserError
from omnivision.utils.io import safe_load
from tests.parity_formula import error, record, stated, token_mask, weights
from tests.runs import call_command
from tests.tiny_models import CLIP, WeightsCase, autoencoder, classifier, file_of, scrambled, trunk

disable_progress_bar()
RECORD = record("hf_videomae")
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
# A file may lack these: a table that is always the same, and biases that a model may not have.
OPTIONAL = re.compile(r"pos_embed|[qv]_bias|(query|value)\.bias")
HERE = ArchOverrides(heads=3, **CLIP, decoder_heads=4)


def from_hf(
    state: Mapping[str, Tensor], config: Mapping[str, Any] = CONFIG, given: ArchOverrides | None = None
) -> ConvertedCheckpoint:
    return convert_state_dict("hf", state, config, given)


def from_videomae(state: Mapping[str, Tensor], given: ArchOverrides = HERE) -> ConvertedCheckpoint:
    return convert_state_dict("videomae", state, {}, given)


def from_ours(
    state: Mapping[str, Tensor], given: ArchOverrides | None = HERE, **architecture: Any
) -> ConvertedCheckpoint:
    return convert_state_dict("omnivision", state, architecture, given)


def model_of(imported: ConvertedCheckpoint, dtype: torch.dtype = torch.float64) -> Any:
    model = from_architecture(imported.architecture, "here")
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
    )  # an export has the names of all versions
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


class Parity(unittest.TestCase):
    def test_formula_is_the_stated_one(self):
        for key in ("classification", "pretraining"):
            digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in recorded(key).values())).hexdigest()
            self.assertEqual(digest, RECORD[f"{key}_parameters_sha256"])

    def test_their_classifier_here(self):
        case = RECORD["import_of_the_classification_model_above"]
        state, video = recorded("classification"), stated(RECORD["input"]).double()
        for names in (state, in_file(state)):
            imported = from_hf(names)
            scores = model_of(imported)(video)
            self.assertLess(error(scores, case["logits_in_the_ancestor"]), 1e-9)
        self.assertLess(error(model_of(imported, torch.float32)(video.float()), case["logits_in_the_ancestor"]), 1e-5)
        theirs = RECORD["classification"][0]["logits"]["f64"]["values"]
        difference = (scores.flatten() - torch.tensor(theirs, dtype=torch.float64)).abs().max().item()
        self.assertAlmostEqual(difference, case["max_abs_difference_to_transformers"], delta=5e-8)
        self.assertEqual(imported.assumed, [])
        published = {key: value for key, value in CONFIG.items() if key != "layer_norm_eps"}
        self.assertIn("LayerNorm epsilon 1e-06 (theirs: 1e-12)", from_hf(state, published).assumed)

    def test_our_classifier_there(self):
        case, state = RECORD["export_of_03_classifier"], weights(record("classifier")["state_dict"])
        self.assertGreater(state["trunk.blocks.0.attn.qkv.bias"][48:96].abs().max(), 0.05, "a key bias to drop")
        imported = from_ours(state)
        pixels = stated(record("classifier")["video"]["input"]).double().transpose(1, 2)
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
        imported = from_ours(weights(record("mae")["state_dict"]))
        exported = to_hf(imported.state, imported.architecture)
        model = theirs_of(VideoMAEModel, exported.state, use_mean_pooling=False)
        mask = token_mask(case["mask"])
        found = model(stated(case["input"]).double().transpose(1, 2), bool_masked_pos=mask).last_hidden_state
        self.assertLess(error(found, case["expected"]["intermediate"]["encoder_norm_output"]), 1e-9)

    def test_their_pretraining_here(self):
        state, video = recorded("pretraining"), stated(RECORD["input"]).double()
        imported = from_hf(state)
        self.assertEqual(imported.architecture["decoder"], {"width": 24, "depth": 2, "heads": 4, "attention": "self"})
        self.assertEqual(imported.dropped, {})
        model, mask = model_of(imported), token_mask(RECORD["mask"])
        theirs = theirs_of(VideoMAEForPreTraining, state, use_mean_pooling=False)
        theirs.decoder.norm.eps = 1e-6
        found = model(video, mask).pixels
        # Positions are float32 there and here, and here they pass through the projection.
        self.assertLess((theirs(video.transpose(1, 2), bool_masked_pos=mask).logits - found).abs().max(), 1e-5)
        ours = model.trunk.norm(model.trunk(video, split_tokens(mask)[0]))
        hidden = theirs.videomae(video.transpose(1, 2), bool_masked_pos=mask).last_hidden_state
        self.assertLess((hidden - ours).abs().max(), 1e-9)


class Formats(WeightsCase):
    def test_videomaes_own_names(self):
        for key in ("classification", "pretraining"):
            named, wanted = original_names(recorded(key)), from_hf(recorded(key))
            self.assertEqual(recognize(named), "videomae")
            imported = from_videomae(named)
            self.assert_equal_states(imported.state, wanted.state)
            self.assertEqual((imported.architecture, imported.dropped), (wanted.architecture, {}))
            self.assertEqual(len([n for n in imported.filled if n.endswith("[k]")]), 4 if key == "pretraining" else 2)
        # Two heads on the first token are none of ours; biases of queries and values may be absent.
        named = original_names(recorded("classification"))
        imported = from_videomae({name.replace("fc_norm", "norm"): tensor for name, tensor in named.items()})
        self.assertEqual(set(imported.dropped), {"head.weight", "head.bias"})
        self.assertTrue(torch.equal(imported.state["trunk.norm.weight"], named["fc_norm.weight"]))
        self.assertEqual(imported.architecture["classes"], [])
        imported = from_videomae({name: t for name, t in named.items() if "_bias" not in name})
        self.assertEqual(float(imported.state["trunk.blocks.1.attn.qkv.bias"].abs().max()), 0)
        hf = {name: t for name, t in in_file(recorded("classification")).items() if "_bias" not in name}
        self.assert_equal_states(from_hf(hf).state, imported.state)

    def test_a_decoder_that_ours_cannot_be_is_dropped_and_listed(self):
        state = recorded("pretraining")
        flat = torch.ones_like(state["encoder_to_decoder.weight"])
        wide = {
            name: torch.cat([tensor, tensor], tensor.ndim - 1 if "output" in name else 0)
            for name, tensor in state.items()
            if re.search(r"decoder_layers.*(intermediate|\d\.output\.dense\.weight)", name)
        }
        for change in ({"encoder_to_decoder.weight": flat}, {"decoder.head.weight": torch.zeros(5, 24)}, wide):
            for names, imported in (
                (state, from_hf(state | change)),
                (original_names(state), from_videomae(original_names(state | change))),
            ):
                self.assertEqual(imported.architecture["classes"], [])
                gone = {name for name in names if name.startswith(("decoder.", "encoder_to", "mask_token"))}
                self.assertEqual(set(imported.dropped), gone)
        with self.assertRaisesRegex(UserError, "not finite"):
            from_hf(state | {"encoder_to_decoder.weight": flat * float("nan")})
        del names["mask_token"]
        self.assertNotIn("decoder", from_videomae(names).architecture)

    def test_heads_of_a_decoder_are_those_of_published_ones_unless_given(self):
        sizes = {
            "hidden_size": 192,
            "intermediate_size": 96,
            "decoder_hidden_size": 192,
            "decoder_intermediate_size": 768,
        }
        theirs = VideoMAEForPreTraining(VideoMAEConfig(**CONFIG | sizes | {"use_mean_pooling": False}))
        named = original_names(scrambled(theirs).state_dict())
        imported = from_videomae(named, ArchOverrides(heads=3, **CLIP))
        self.assertEqual(imported.architecture["decoder"]["heads"], 3)
        self.assertIn("--decoder-heads 3", imported.assumed)
        self.assertEqual(from_videomae(named, ArchOverrides(3, 4, 32, 8)).architecture["decoder"]["heads"], 8)
        with self.assertRaisesRegex(UserError, "decoder.heads"):
            from_hf(theirs.state_dict(), CONFIG | sizes, ArchOverrides(decoder_heads=8))

    def test_omnimae(self):
        for model, head in ((autoencoder(), "heads.0.projector."), (classifier(), "heads.0.0.")):
            for drop in ("nothing", r"decoder_blocks.*qkv\.bias"):
                wanted = model.state_dict()
                theirs = {name.replace(head, "head."): tensor for name, tensor in wanted.items()}
                gone = [name for name in theirs if re.search(drop, name)]
                for name in gone:
                    wanted[name] = torch.zeros_like(theirs.pop(name))
                imported, format = convert_file(file_of(theirs), overrides=HERE)
                self.assertEqual((format, set(imported.filled)), ("omnimae", set(gone)))
                self.assert_equal_states(imported.state, wanted)
                self.assertEqual(imported.architecture, architecture_of(model))

    def test_ppma(self):
        """Our names without an architecture; from several processes, under `module.`, without position tables."""
        for model in (autoencoder(), classifier(7, 3), classifier(rgbd=True)):
            state = {f"module.{n}": t for n, t in model.state_dict().items() if "pos_embed" not in n}
            path = self.save({"model": state, "optimizer": {"state": {}}, "epoch": 3, "loss": 0.5, "steps": {}})
            imported, format = convert_file(read_weights(path), overrides=HERE)
            self.assertEqual(format, "ppma")
            self.assert_equal_states(imported.state, model.state_dict())
            self.assertEqual(imported.architecture, architecture_of(model))
            self.assertEqual(set(imported.filled), {n for n in model.state_dict() if "pos_embed" in n})

    def test_names_that_wrappers_have_changed(self):
        def changed(pattern: str, new: str) -> dict[str, Tensor]:
            return {re.sub(pattern, new, name): tensor for name, tensor in wanted.items()}

        wanted = classifier().state_dict()
        for pattern, new in (
            ("^", "module._orig_mod."),
            ("^", "_orig_mod.module."),
            ("^", "module.module."),
            (r"^trunk\.", "trunk._orig_mod."),
            (r"blocks\.(\d)\.", r"blocks.\1._checkpoint_wrapped_module._orig_mod."),
            (r"^(trunk\.blocks\.\d\.)?", r"_fsdp_wrapped_module.\1_fsdp_wrapped_module."),
        ):
            state = changed(pattern, new)
            save_file(state, self.folder / "x.safetensors")
            for path in (self.save({"state_dict": state}), self.folder / "x.safetensors"):
                with self.subTest(new=new, path=path.name):
                    self.assert_equal_states(read_weights(path).state, wanted)
        lightning = self.save({"state_dict": changed("^", "model._orig_mod.")})
        self.assert_equal_states(convert_file(read_weights(lightning), overrides=HERE)[0].state, wanted)
        with self.assertRaisesRegex(UserError, "_orig_mod"):
            read_weights(self.save(wanted | changed("^", "_orig_mod.")))

    def test_videomaes_command_line_beside_its_weights(self):
        arguments = argparse.Namespace(model="vit", epochs=3)
        for key in ("model", "module"):
            path = self.save({key: original_names(recorded("classification")), "args": arguments, "epoch": 4})
            self.assertEqual(convert_file(read_weights(path), overrides=HERE)[1], "videomae")

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
            imported, format = convert_file(read_weights(folder))
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
        one, bins = self.folder / "one", self.folder / "bins"
        theirs = scrambled(VideoMAEForVideoClassification(VideoMAEConfig(**CONFIG, num_labels=5)))
        theirs.save_pretrained(one)
        theirs.save_pretrained(self.folder / "many", max_shard_size="100KB")
        self.assertGreater(len(list((self.folder / "many").glob("*.safetensors"))), 2)
        for name in ("bin", "bins"):
            (self.folder / name).mkdir()
            shutil.copy(one / "config.json", self.folder / name)
        complete = load_file(one / "model.safetensors")
        torch.save(complete, self.folder / "bin" / "pytorch_model.bin")
        files = {name: f"pytorch_model-{number % 2}.bin" for number, name in enumerate(complete)}
        for file in set(files.values()):
            torch.save({name: tensor for name, tensor in complete.items() if files[name] == file}, bins / file)
        (bins / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
        torch.save({}, one / "pytorch_model.bin")  # safetensors are preferred
        wanted, *others = (convert_file(read_weights(self.folder / name))[0] for name in ("one", "many", "bin", "bins"))
        for other in others:
            self.assert_equal_states(wanted.state, other.state)
            self.assertEqual(wanted.architecture, other.architecture)

    def test_there_and_back(self):
        for model in (classifier(), classifier(4, 9), autoencoder()):
            state, architecture = model.state_dict(), architecture_of(model)
            exported = to_hf(state, architecture, head=len(architecture.get("classes", [0])) - 1)
            back = from_hf(exported.state, exported.config)
            again = to_hf(back.state, back.architecture)
            self.assert_equal_states(again.state, exported.state)
            self.assertEqual(again.config, exported.config)
            wanted = {name: tensor for name, tensor in state.items() if name in back.state}
            if "heads.1.0.weight" in state:
                wanted |= {f"heads.0.0.{leaf}": state[f"heads.1.0.{leaf}"] for leaf in ("weight", "bias")}
            self.assert_equal_states(back.state, wanted)

    def test_biases_under_two_names_are_one(self):
        model = classifier()
        exported = to_hf(model.state_dict(), architecture_of(model))
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

    def test_the_rest_is_reported_or_refused(self):
        model = classifier(7, 3, rgbd=True)
        exported = to_hf(model.state_dict(), architecture_of(model))
        gone = {name.rpartition(".")[0] for name in exported.dropped}
        self.assertEqual(gone, {"trunk.depth_patch_embed.proj.1", "heads.1.0"})
        with self.assertRaisesRegex(UserError, "--head .* got 2"):
            to_hf(model.state_dict(), architecture_of(model), head=2)
        model.trunk.pos_embed += 1e-3
        with self.assertRaisesRegex(UserError, "--to pt"):
            to_hf(model.state_dict(), architecture_of(model))
        exported = to_hf(autoencoder().state_dict(), architecture_of(autoencoder()))
        gone = {name for name in autoencoder().state_dict() if re.search("decoder|mask_token|heads", name)}
        self.assertEqual(set(exported.dropped), gone)
        pixels = preprocessor_config(architecture_of(classifier()))
        self.assertEqual(pixels["image_mean"], [0.485, 0.456, 0.406])
        self.assertEqual(pixels["crop_size"], {"height": 32, "width": 32})


class Stages(WeightsCase):
    """An imported file as `pretrained_checkpoint_path`."""

    def setUp(self):
        super().setUp()
        imported = from_hf(recorded("pretraining"))
        self.source = file_of(imported.state, architecture=imported.architecture)

    def test_it_is_loaded(self):
        report = load_filtered(classifier(5), self.source, WeightFilter())
        self.assertEqual(report.missing, ["heads.0.0.bias", "heads.0.0.weight"])
        self.assertEqual(set(report.dropped.values()), {"not in this model"})
        model = autoencoder()
        report = load_filtered(model, self.source, WeightFilter(strict=True))
        self.assertEqual((report.missing, report.dropped), ([], {}))
        self.assert_equal_states(model.state_dict(), self.source.state)
        with self.assertRaisesRegex(UserError, "omnivision import there.pt"):
            load_filtered(classifier(5), file_of(recorded("pretraining")), WeightFilter())

    def test_other_heads_depths_and_widths_are_refused(self):
        no_decoder = WeightFilter(drop=["trunk.decoder.*", "trunk.mask_token", "heads.*"])
        shallow = WeightFilter(drop=["trunk.blocks.1.*"])
        for model, setting, way_out in (
            (autoencoder(heads=6), "trainer.model.decoder.heads=4", no_decoder),
            (autoencoder(depth=1), "trainer.model.decoder.depth=2.*no_heads_no_decoder", no_decoder),
            (autoencoder(depth=3), "trainer.model.decoder.depth=2.*no_heads_no_decoder", no_decoder),
            (autoencoder(width=16), "no_heads_no_decoder", no_decoder),
            (VideoClassifier(trunk(heads=6), [7]), "trainer.model.trunk.heads=3", None),
            (VideoClassifier(trunk(depth=1), [7]), "trainer.model.trunk.depth=2", shallow),
        ):
            with self.subTest(setting), self.assertRaisesRegex(UserError, setting):
                load_filtered(model, self.source, WeightFilter())
            if way_out is not None:
                load_filtered(model, self.source, way_out)


class Geometry(WeightsCase):
    def test_numbers_are_read_given_or_refused(self):
        ours, theirs = classifier().state_dict(), original_names(recorded("classification"))
        for state, given, message in (
            (ours, {"heads": 3, "num_frames": 4, "image_size": 64}, "64 pixels.* 32 tokens.*--image-size"),
            (ours, {"heads": 5, "num_frames": 4}, "heads.* 48"),
            (ours, {"heads": 0}, "--num-heads .*'0'"),
            (ours, {"num_frames": 4}, "--num-heads N"),
            (ours, {"heads": 3, "num_frames": 2}, "--image-size"),
            (ours, {"heads": 3, "num_frames": 2, "image_size": 32}, "32 tokens.* 16. Set --num-frames"),
            (autoencoder().state_dict(), {"heads": 3, "num_frames": 4, "decoder_heads": 5}, "heads.* 24"),
            (theirs, {"heads": 3, "num_frames": 4, "image_size": 30}, "30 x 30 pixels.*--image-size"),
        ):
            with self.subTest(message), self.assertRaisesRegex(UserError, message):
                convert_file(file_of(state), overrides=ArchOverrides(**given))
        with self.assertRaisesRegex(UserError, "trunk.heads is .3. .* 4"):
            from_hf(recorded("classification"), CONFIG, ArchOverrides(heads=4))

    def test_usual_numbers_are_assumed_and_reported(self):
        with torch.device("meta"):
            state = VideoClassifier(VisionTransformer(192, 1), [2]).state_dict()
        imported = from_ours({name: torch.zeros(tensor.shape) for name, tensor in state.items()}, None)
        self.assertEqual(imported.assumed, ["--num-heads 3", "--num-frames 16"])
        self.assertEqual(imported.architecture["trunk"]["image_size"], 224)
        self.assertIn("  assumed     2  --num-heads 3, --num-frames 16", imported.lines())

    def test_a_width_that_a_ratio_truncates(self):
        model = scrambled(VideoClassifier(trunk(depth=1, mlp_ratio=2.6), [2]))
        self.assertEqual(from_ours(model.state_dict(), **architecture_of(model)).architecture, architecture_of(model))
        # Neither does a ratio that is got from the weights lose a row: 88 * (240 / 88) is below 240.
        model = scrambled(VideoClassifier(trunk(88, 1, 2, mlp_ratio=2.73), [2]))
        self.assertEqual(len(model.trunk.blocks[0].mlp.fc1.weight), 240)
        imported = from_ours(model.state_dict(), ArchOverrides(heads=2, num_frames=4))
        self.assert_equal_states(model_of(imported, torch.float32).state_dict(), model.state_dict())


class Command(WeightsCase):
    OPTIONS = ("--num-heads", 3, "--num-frames", 4)

    def run_import(self, *arguments: object) -> str:
        code, out, _ = call_command("import", *arguments)
        self.assertEqual(code, 0)
        return out

    def test_it_writes_one_file_and_reports(self):
        source, out = self.save(original_names(recorded("pretraining")), "theirs.pth"), self.folder / "new" / "out.pt"
        report = self.run_import(source, out, *self.OPTIONS, "--image-size", 32, "--decoder-heads", 4)
        for row in (
            r"theirs\.pth: \d+ tensors of format videomae\n",
            r"renamed +57  encoder\.patch_embed\.proj\.weight -> .*, and 54 more\n",
            r"filled +5  .*trunk\.blocks\.0\.attn\.qkv\.bias\[k\], .*\(zeros; not in the file\)\n",
            r"filled +1  trunk\.pos_embed \(the fixed table\)\n",
            r"filled +1  trunk\.mask_token \(mask_token, before the projection\)\n",
            r"Wrote .*autoencoder of width 48, depth 2, 3 heads, 4 frames of 32 x 32\n",
        ):
            self.assertRegex(report, row)
        self.assertNotIn("dropped", report)
        found = safe_load(out)
        self.assertEqual(set(found), {"format", "model", "architecture", "origin"})
        digest = hashlib.sha256(source.read_bytes()).hexdigest()
        self.assertEqual(found["origin"], {"name": "theirs.pth", "sha256": digest, "format": "videomae"})
        again = self.folder / "again.pt"
        self.assertIn("format omnivision", self.run_import(out, again))
        self.assert_equal_states(safe_load(again)["model"], found["model"])
        self.assertEqual(safe_load(again)["architecture"], found["architecture"])

    def test_nothing_is_overwritten_unasked(self):
        source, out = self.save(classifier().state_dict()), self.folder / "out.pt"
        out.write_text("precious")
        full = mock.patch("omnivision.interop.export.torch.save", side_effect=OSError(28, "No space left on device"))
        for target, options, message in (
            (out, (), "exists.*--force"),
            (source, ("--force",), "OUT"),
            (out / "x.pt", ("--force",), "cannot be"),
            (out, ("--force", full), "No space left"),
        ):
            with self.subTest(message), options[1] if options[1:] else contextlib.nullcontext():
                with self.assertRaisesRegex(UserError, message):
                    self.run_import(source, target, *self.OPTIONS, *options[:1])
            self.assertEqual(out.read_text(), "precious")
        self.assertEqual({path.name for path in self.folder.iterdir()}, {"weights.pt", "out.pt"}, "no temporary files")
        self.run_import(source, out, *self.OPTIONS, "--force")
        self.assert_equal_states(safe_load(out)["model"], classifier().state_dict())

    def test_parts_of_larger_tensors_are_written_alone(self):
        state = {
            name: torch.cat([tensor.flatten(), tensor.new_zeros(100_000)])[: tensor.numel()].view(tensor.shape)
            for name, tensor in classifier().state_dict().items()
        }
        source, out = self.save(state), self.folder / "out.pt"
        self.assertGreater(source.stat().st_size, 10e6)
        self.run_import(source, out, *self.OPTIONS)
        self.assertLess(out.stat().st_size, 1e6)


class BadFiles(WeightsCase):
    def refused(self, source: Path | dict, message: str, given: ArchOverrides = HERE, format: str = "auto") -> None:
        with self.subTest(message), self.assertRaisesRegex(UserError, message) as caught:
            convert_file(read_weights(source) if isinstance(source, Path) else file_of(source), format, given)
        self.assertNotIn("\n", str(caught.exception))

    def test_names_that_nobody_has(self):
        state = classifier().state_dict()
        self.refused(state | {"cls_token": torch.zeros(1)}, "1 of .* omnivision.*: cls_token")
        self.refused({"conv1.weight": torch.zeros(1)}, "1 of 1 .*conv1.weight")
        self.refused(state, "format hf.*--format omnivision", format="hf")
        omnimae = {n.replace("heads.0.0.", "head."): t for n, t in state.items()}
        self.refused(omnimae, r"2 of .* omnivision.*head\.weight.*--format omnimae", format="ppma")
        self.refused({"mixing_ratio": torch.ones(2)}, "--merge")
        layer_scale = original_names(recorded("classification")) | {"blocks.0.gamma_1": torch.ones(48)}
        self.refused(layer_scale, r"1 of .* videomae.*: blocks\.0\.gamma_1")

    def test_tensors_that_make_no_model(self):
        theirs = recorded("classification")
        for state in (classifier().state_dict(), theirs, original_names(theirs)):
            for name in [name for name in state if ".0." not in name or name.startswith("heads")]:
                if not OPTIONAL.search(name):
                    self.refused({n: t for n, t in state.items() if n != name}, "complete model")
                longer = torch.zeros(*state[name].shape[:-1], state[name].shape[-1] + 1)
                for tensor in (longer, torch.zeros(()), torch.zeros(0)):
                    self.refused(state | {name: tensor}, "complete model|tubelet")
        depth = {"trunk.patch_embed.proj.1.weight": torch.zeros(48, 1, 2, 8, 8)}
        self.refused(classifier().state_dict() | depth, r"patch_embed.*\[48, 3, 2, 8, 8\]")
        blocks = {name.replace("blocks.1.", "blocks.7."): t for name, t in classifier().state_dict().items()}
        self.refused(blocks, r"Missing .*trunk\.blocks\.1\.")

    def test_an_architecture_that_is_not_that_of_the_weights(self):
        model = classifier()
        architecture = architecture_of(model)
        for part, key, value, message in (
            ("trunk", "depth", 10**9, r"trunk\.depth is .1000000000.* 2"),
            ("trunk", "num_frames", 2**40, "--num-frames .* 65536"),
            ("trunk", "num_frames", 40000, "--image-size"),
            ("trunk", "heads", "3", "--num-heads .*'3'"),
            ("trunk", "mlp_ratio", float("nan"), r"trunk\.mlp_ratio is .nan"),
            ("trunk", "new", 1, r"trunk\.new"),
            ("kind", None, "autoencoder", "kind .*'autoencoder'"),
            ("classes", None, [10**9], "classes"),
            ("trunk", None, [3], "'list'"),
        ):
            changed = architecture | {part: architecture[part] | {key: value} if key else value}
            self.refused(self.save({"model": model.state_dict(), "architecture": changed}), message, ArchOverrides())

    def test_a_configuration_of_nonsense(self):
        folder = self.folder / "hf"
        folder.mkdir()
        save_file(in_file(recorded("classification")), folder / "model.safetensors")
        for content, message in (
            ("{", "must hold a JSON object"),
            ("[" * 100_000, "must hold a JSON object"),
            ("[1]", "must hold a JSON object, got a list"),
            ("\udcff", "must hold a JSON object"),
            ({"model_type": "bert"}, "model_type .*'bert'"),
            ({"hidden_act": "relu"}, "hidden_act .*'relu'"),
            ({"num_channels": 1}, "num_channels .*'1'"),
            ({"num_attention_heads": {"a": 1}}, "--num-heads"),
            ({"num_frames": 1e300}, "--num-frames"),
            ({"num_frames": 65536, "image_size": 65536}, "1048576 tokens"),
            ({"image_size": [32, 64]}, "--image-size"),
            ({"num_hidden_layers": 10**9}, r"trunk\.depth .* 2"),
            ({"patch_size": None}, r"trunk\.tubelet"),
        ):
            text = content if isinstance(content, str) else json.dumps(CONFIG | content)
            (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
            self.refused(folder, message, ArchOverrides())
        (folder / "config.json").write_text(json.dumps(CONFIG | {"image_size": [32, 32], "patch_size": [8, 8]}))
        self.assertEqual(
            convert_file(read_weights(folder))[0].architecture, from_hf(recorded("classification")).architecture
        )

    def test_an_index_that_leads_elsewhere(self):
        folder, state = self.folder / "hf", in_file(recorded("classification"))
        folder.mkdir()
        for path in (folder / "a.safetensors", self.folder / "outside.safetensors"):
            save_file(state, path)
        (folder / "config.json").write_text(json.dumps(CONFIG))
        index = folder / "model.safetensors.index.json"
        elsewhere = ("../outside.safetensors", str(self.folder / "outside.safetensors"), "..", "", "a.txt")
        for weight_map, message in (
            *((dict.fromkeys(state, name), "weight_map") for name in elsewhere),
            ([1], "weight_map"),
            ({}, "weight_map"),
            ({"a": 3}, "weight_map"),
            (dict.fromkeys(state, "b.safetensors"), "b.safetensors"),
        ):
            index.write_text(json.dumps({"weight_map": weight_map}))
            self.refused(folder, message)
        index.write_text(json.dumps({"weight_map": dict.fromkeys(state, "a.safetensors")}))
        self.assertIsInstance(read_weights(folder), StateDictFile)


if __name__ == "__main__":
    unittest.main()
