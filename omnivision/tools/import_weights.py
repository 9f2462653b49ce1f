"""`omnivision import SOURCE OUT`: convert weights of other projects to this project's names."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from omnivision.tools.arguments import Flag

Count = Annotated[int | None, Parameter(metavar="N", group="Values that a file may lack (used only if it does)")]


def import_weights(
    source: str,
    out: Annotated[Path, Parameter(name="OUT.pt")],
    /,
    *,
    format: Literal["auto", "omnivision", "ppma", "omnimae", "videomae", "hf"] = "auto",
    num_heads: Count = None,
    num_frames: Count = None,
    image_size: Count = None,
    decoder_heads: Count = None,
    force: Flag = False,
) -> int:
    """Convert weights of PPMA, OmniMAE, VideoMAE or Hugging Face to our names.

    Read weights (a file, a run directory, or a folder written by Hugging Face's save_pretrained), recognize their format by
    their names, and write one file that every stage accepts as pretrained_checkpoint_path. Print what happened to each entry.
    Only weights are read; pickled objects are rejected.

    Args:
        source: .pt, .pth, .bin, .torch, .safetensors, or a folder.
        out: The file to write.
        format: Format of the weights (default: by their names).
        num_heads: Attention heads of the trunk (usual: width 192: 3, 384: 6, 768: 12, 1024 and 1280: 16).
        num_frames: Frames per clip (usual: 16).
        image_size: Height and width of a clip in pixels (usual: 224, or by the positional embedding in the file).
        decoder_heads: Attention heads of the decoder (usual: 16).
        force: Replace OUT if it exists.
    """
    from omnivision.checkpoint.inference_config import InferenceConfig
    from omnivision.checkpoint.state_dict_file import read_weights
    from omnivision.interop.export import check_target, origin, write_file
    from omnivision.interop.formats import convert_file, hf_class_names
    from omnivision.interop.infer_architecture import ArchOverrides

    file = read_weights(source)
    check_target(out, file, force)
    converted, recognized = convert_file(file, format, ArchOverrides(num_heads, num_frames, image_size, decoder_heads))
    inference = file.inference
    names = hf_class_names(file.config) if recognized == "hf" else None
    if names and converted.architecture.get("classes") == [len(names)]:
        inference = InferenceConfig(class_names=[names])
    metadata: dict[str, Any] = {"origin": origin(file, recognized)} | file.progress
    if record := inference.model_dump(exclude_unset=True):
        metadata["inference"] = record
    write_file(out, "pt", converted, metadata)
    print(f"{file}: {len(file.state)} tensors of format {recognized}", *converted.lines(), sep="\n")
    print(f"Wrote {out}: {len(converted.state)} tensors, {converted.summary()}")
    return 0
