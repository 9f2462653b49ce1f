"""`omnivision export CHECKPOINT OUT --to ...`: one model out of a checkpoint, for this project or for others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from omnivision.checkpoint.state_dict_file import CONFIG, StateDictFile, read
from omnivision.data.catalog import read_class_names
from omnivision.interop import export
from omnivision.interop.formats import (
    ConvertedCheckpoint,
    from_ours,
    group_by_reason,
    preprocessor_config,
    preview,
    to_hf,
)
from omnivision.interop.merge import merge, read_sources
from omnivision.tools.inference import InferenceConfig
from omnivision.tools.weights import ExportOptions
from omnivision.utils.errors import UserError

# Architecture that cannot be read off weights.
_NOT_IN_WEIGHTS = {"trunk": ("heads", "num_frames", "image_size"), "decoder": ("heads",)}


def run(checkpoint: str, out: Path, args: ExportOptions) -> int:
    """Write the model, verify it if possible, and print what was written and omitted."""
    _check_arguments(args)
    source = read(checkpoint)
    card_file = out / "README.md" if args.to == "hf" else export.card_of(out)
    export.check_target(out, source, args.force, folder=args.to == "hf", card=card_file)
    model = _model(source, args)
    print(f"{source}: {model.summary()}")
    is_validated = not source.average or args.weights != "model"  # the metrics of the run are those of these weights
    if args.to == "hf":
        _export_hf(out, args, source, model, is_validated)
    else:
        write = export.write_pt if args.to == "pt" else export.write_safetensors
        shown = InferenceConfig.of(model.architecture, source.inference)
        names = [shown.named(number) for number in range(len(shown.names))]
        text = export.model_card(source, model, out.name, is_validated, names)  # before anything is written
        write(
            out,
            model.state,
            model.architecture,
            {"origin": export.origin(source, "omnivision"), "inference": shown.to_json()}
            | (source.progress if is_validated else {}),
        )
        export.write_card(out, text)
        print(f"Wrote {out}: {len(model.state)} tensors; and {export.card_of(out)}, what people read of it")
    return 0


def _check_arguments(args: ExportOptions) -> None:
    if args.sources and not args.merge:
        raise UserError("--sources is for --merge. Add --merge, or leave --sources out.")
    for option, value in (("--class-names", args.class_names), ("--head", args.head)):
        if value and args.to != "hf":
            raise UserError(
                f"{option} is for --to hf: other files keep all heads, and the run's names. Leave {option} out."
            )


def _model(source: StateDictFile, args: ExportOptions) -> ConvertedCheckpoint:
    """Return the model to write, complete and checked."""
    source.refuse_own_class()
    if lacking := _lacking(source):
        raise UserError(
            f"{source.path} does not say its architecture ({', '.join(lacking)}), so it is not from a run of this project. "
            f"Bring it in first: omnivision import {source.path} OUT.pt"
        )
    state, kind = source.weights(args.weights), source.architecture.get("kind")
    if source.average and args.weights != "model":
        print(f"Taking the moving average (--weights ema) of {len(source.average)} tensors")
    if args.merge != (kind == "average"):
        raise UserError(
            f"{source.path} holds a learned average of checkpoints, which is no model without them. Add --merge."
            if kind == "average"
            else f"--merge is for a learned average of checkpoints, and {source.path} is of kind {kind!r}. Leave --merge out."
        )
    try:
        if not args.merge:
            return from_ours(state, source.architecture)
        found = read_sources(source.sources, args.sources)
        merged = merge(state, source.architecture, found)
    except UserError as error:
        raise UserError(f"{source.path}: {error}") from None
    for each in found:
        print(f"Averages {each}")
    print(
        f"Merged {len(found)} checkpoints; scores of a random clip differ by {merged.difference:.1g} from the average's"
    )
    return from_ours(merged.state, merged.architecture)


def _lacking(source: StateDictFile) -> list[str]:
    """Return the missing architecture settings that cannot be read off weights; an import asks for them."""
    architecture = source.architecture
    lacking = [] if "kind" in architecture else ["kind"]
    for part in ("trunk", "decoder") if architecture.get("kind") == "autoencoder" else ("trunk",):
        settings = architecture.get(part)
        known = settings if isinstance(settings, Mapping) else {}
        lacking += [f"{part} {key}" for key in _NOT_IN_WEIGHTS[part] if known.get(key) is None]
    return lacking


def _export_hf(
    out: Path, args: ExportOptions, source: StateDictFile, model: ConvertedCheckpoint, is_validated: bool
) -> None:
    own_names = InferenceConfig.of(model.architecture, source.inference).named(args.head)
    names = read_class_names(args.class_names, "--class-names") if args.class_names else own_names
    exported = to_hf(model.state, model.architecture, args.head, names)
    configs = {CONFIG: exported.config, "preprocessor_config.json": preprocessor_config(model.architecture)}
    card = export.model_card(source, model, out.name, is_validated, [names], hf=True)
    with export.hf_folder(out, exported.state, configs, card) as folder:
        difference = export.verify(folder, model.state, model.architecture, args.head)
    print(f"Wrote {out}: {exported.config['architectures'][0]}, {len(exported.state)} tensors")
    for why, names in group_by_reason(exported.dropped).items():
        print(f"  not carried {len(names):4}  {preview(names)} ({why})")
    print("\n".join(_verification(difference, classifier="classifier.weight" in exported.state)))


def _verification(difference: export.Difference | None, classifier: bool) -> list[str]:
    if difference is None:
        return ["Not verified: transformers is not installed. Run `pip install 'omnivision[hf]'` and export again."]
    if not classifier:
        return [f"Verified: transformers' tokens of a random clip differ by {difference.as_is:.1g} (double precision)"]
    lines = [
        f"Verified: transformers' scores of a random clip differ by {difference.same_epsilon:.1g} (double precision) with our "
        f"epsilon of fc_norm, and by {difference.as_is:.1g} with its own, 1e-5"
    ]
    if difference.as_is > export.TYPICAL_DIFFERENCE:
        lines.append(
            f"warning: that is more than the usual {export.TYPICAL_DIFFERENCE:g}, because features vary little over channels. "
            "Set model.fc_norm.eps = 1e-6 after loading."
        )
    return lines
