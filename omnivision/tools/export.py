"""`omnivision export CHECKPOINT OUT --to ...`: export one model from a checkpoint, for this project or for others."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from omnivision.data.catalog import read_class_names
from omnivision.tools.arguments import Flag, at_least
from omnivision.utils.errors import UserError

if TYPE_CHECKING:
    from omnivision.checkpoint.state_dict_file import StateDictFile
    from omnivision.interop.formats import ConvertedCheckpoint


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What `export` writes.

    Attributes:
        to: What to write.
        weights: Weights as trained, or their EMA (default: the EMA if the run kept one, as in validation).
        merge: Merge a learned average of checkpoints into an ordinary classifier.
        sources: With --merge: the averaged checkpoints, in order (default: at their original paths).
        head: With --to hf: the number of the head, if there are several.
        class_names: With --to hf: a file with one name per line, in the order of the labels (default: the run's names).
        force: Replace OUT if it exists.
    """

    to: Literal["pt", "safetensors", "hf"]
    weights: Literal["model", "ema"] | None = None
    merge: Flag = False
    sources: Annotated[list[str] | None, Parameter(consume_multiple=True, metavar="FILE")] = None
    head: Annotated[int, at_least(0)] = 0
    class_names: Annotated[str | None, Parameter(metavar="FILE")] = None
    force: Flag = False


def export(checkpoint: str, out: Path, /, *, options: ExportOptions) -> int:
    """Write a model as one weights file, or as a folder for Hugging Face's transformers.

    Write the model of a run directory, a checkpoint, or a file written by `omnivision import`. pt and safetensors keep our
    names and include the architecture; hf is a VideoMAE folder as save_pretrained writes it.

    Args:
        checkpoint: A run directory (its best checkpoint) or a file.
        out: The file to write; with --to hf a folder.
    """
    from omnivision.checkpoint.state_dict_file import read_weights
    from omnivision.interop.export import card_of, check_target, model_card, origin, write_file

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
    card_file = out / "README.md" if is_hf else card_of(out)
    check_target(out, source, options.force, card_file)
    model = _load(source, options)
    if is_hf and model.architecture["kind"] == "attentive":
        raise UserError(f"{source.path} is an attentive probe, which transformers does not have. Set --to safetensors.")
    if is_hf and source.inference.label_type == "regression":
        raise UserError(
            f"{source.path} is a regression model; transformers does not undo the standardization of its targets. Set --to "
            "safetensors."
        )
    config = source.inference.numbered(model.architecture.get("classes", []))
    is_validated = not source.ema or options.weights != "model"  # the run's metrics belong to these weights
    if is_hf:
        _export_hf(out, options, source, model, config.names(options.head), is_validated)
        return 0
    names = [config.names(head) for head in range(len(config.class_names))]
    card = model_card(source, model, out.name, is_validated, names)  # before anything is written
    metadata = {"origin": origin(source, "omnivision"), "inference": config.model_dump(exclude_unset=True)}
    write_file(out, options.to, model, metadata | (source.progress if is_validated else {}), card)
    print(f"Wrote {out}: {len(model.state)} tensors; and {card_file}, its model card")
    return 0


def _load(source: StateDictFile, options: ExportOptions) -> ConvertedCheckpoint:
    """Return the model to write, complete and checked."""
    from omnivision.interop.complete import complete_model

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
    """Write a folder for transformers, verified against it, and print what was written and omitted."""
    from omnivision.checkpoint.state_dict_file import CONFIG
    from omnivision.interop.export import model_card, verify, write_folder
    from omnivision.interop.formats import list_by_reason
    from omnivision.interop.huggingface import preprocessor_config, to_hf

    if options.class_names:
        names = read_class_names(options.class_names, "--class-names")
    exported = to_hf(model.state, model.architecture, options.head, names)
    if source.inference.label_type == "multi_label":
        exported.config["problem_type"] = "multi_label_classification"
    configs = {CONFIG: exported.config, "preprocessor_config.json": preprocessor_config(model.architecture)}
    [their_class] = exported.config["architectures"]
    card = model_card(source, model, out.name, is_validated, [names], their_class)
    compare = partial(verify, state=model.state, architecture=model.architecture, head=options.head)
    verified = write_folder(out, exported.state, configs, card, compare)
    print(f"Wrote {out}: {their_class}, {len(exported.state)} tensors")
    print(*list_by_reason("not carried", exported.dropped), verified, sep="\n")
