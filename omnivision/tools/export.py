"""`omnivision export CHECKPOINT OUT --to ...`: export one model from a checkpoint, for this project or for others."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from omnivision.checkpoint.state_dict_file import CONFIG, StateDictFile, read_weights
from omnivision.data.catalog import read_class_names
from omnivision.interop import export
from omnivision.interop.formats import ConvertedCheckpoint, list_by_reason
from omnivision.interop.huggingface import preprocessor_config, to_hf
from omnivision.tools.video_model import complete_model
from omnivision.tools.weights import ExportOptions
from omnivision.utils.errors import UserError


def run(checkpoint: str, out: Path, options: ExportOptions) -> int:
    """Write the model, verify it if possible, and print what was written and omitted."""
    is_hf = options.to == "hf"
    for option, value, needed, is_given in (
        ("--sources", options.sources, "--merge", options.merge),
        ("--class-names", options.class_names, "--to hf", is_hf),
        ("--head", options.head, "--to hf", is_hf),
    ):
        if value and not is_given:
            raise UserError(f"{option} needs {needed}. Add {needed}, or leave {option} out.")
    source = read_weights(checkpoint)
    source.refuse_own_class()
    card_file = out / "README.md" if is_hf else export.card_of(out)
    export.check_target(out, source, options.force, card_file)
    model = _load(source, options)
    config = source.inference.numbered(model.architecture.get("classes", []))
    is_validated = not source.ema or options.weights != "model"  # the run's metrics belong to these weights
    if is_hf:
        _export_hf(out, options, source, model, config.names(options.head), is_validated)
        return 0
    names = [config.names(head) for head in range(len(config.class_names))]
    card = export.model_card(source, model, out.name, is_validated, names)  # before anything is written
    metadata = {"origin": export.origin(source, "omnivision"), "inference": config.model_dump(exclude_unset=True)}
    export.write_file(out, options.to, model, metadata | (source.progress if is_validated else {}), card)
    print(f"Wrote {out}: {len(model.state)} tensors; and {card_file}, its model card")
    return 0


def _load(source: StateDictFile, options: ExportOptions) -> ConvertedCheckpoint:
    """Return the model to write, complete and checked."""
    kind = source.architecture.get("kind", "none")
    if options.merge != (kind == "average"):
        raise UserError(
            f"--merge is only for a learned average of checkpoints; {source.path} is of kind {kind}. "
            f"{'Leave --merge out' if options.merge else 'Add --merge'}."
        )
    model, lines = complete_model(source, options.weights, options.sources)
    if model.assumed:
        raise UserError(
            f"{source.path} lacks a part of its architecture (usual: {', '.join(model.assumed)}). Convert it first: "
            f"omnivision import {source.path} OUT.pt"
        )
    if source.ema and options.weights != "model":
        lines.append(f"Using the EMA (--weights ema) of {len(source.ema)} tensors")
    print(*lines, f"{source}: {model.summary()}", sep="\n")
    return model


def _export_hf(
    out: Path,
    options: ExportOptions,
    source: StateDictFile,
    model: ConvertedCheckpoint,
    names: list[str] | None,
    is_validated: bool,
) -> None:
    if options.class_names:
        names = read_class_names(options.class_names, "--class-names")
    exported = to_hf(model.state, model.architecture, options.head, names)
    configs = {CONFIG: exported.config, "preprocessor_config.json": preprocessor_config(model.architecture)}
    [their_class] = exported.config["architectures"]
    card = export.model_card(source, model, out.name, is_validated, [names], their_class)
    verify = partial(export.verify, state=model.state, architecture=model.architecture, head=options.head)
    verified = export.write_folder(out, exported.state, configs, card, verify)
    print(f"Wrote {out}: {their_class}, {len(exported.state)} tensors")
    print(*list_by_reason("not carried", exported.dropped), verified, sep="\n")
