"""`omnivision import SOURCE OUT.pt`: brings weights of other projects into our names."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omnivision.checkpoint.weight_files import read
from omnivision.interop.convert import convert
from omnivision.interop.geometry import Given
from omnivision.interop.huggingface import class_names
from omnivision.interop.recognise import CHOICES
from omnivision.interop.store import check_target, origin, write_pt

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_GEOMETRY = {
    "heads": ("--num-heads", "attention heads of the trunk (usual: width 192: 3, 384: 6, 768: 12, 1024 and 1280: 16)"),
    "num_frames": ("--num-frames", "frames of a clip (usual: 16)"),
    "image_size": ("--image-size", "pixels of a clip's side (usual: 224, or what the positions in the file tell)"),
    "decoder_heads": ("--decoder-heads", "attention heads of the decoder (usual: 16)"),
}


def add_parser(subparsers: Subparsers) -> None:
    """Add `import` to the command's parser; its namespace carries `run`, the function to call."""
    parser = subparsers.add_parser(
        "import",
        help="bring weights of PPMA, OmniMAE, VideoMAE or Hugging Face into our names",
        description="Read weights (a file, a run folder, or a folder of Hugging Face's save_pretrained), find out whose they "
        "are by their names, and write one file that every stage takes as pretrained_checkpoint_path. Tells what became of "
        "each entry. Weights only: pickled objects are refused.",
    )
    parser.add_argument("source", metavar="SOURCE", help=".pt, .pth, .bin, .torch, .safetensors, or a folder")
    parser.add_argument("out", metavar="OUT.pt", type=Path, help="the file to write")
    parser.add_argument(
        "--format", choices=CHOICES, default="auto", help="whose weights they are (default: by their names)"
    )
    geometry = parser.add_argument_group("what a file may not tell", "used only where it does not")
    for name, (option, text) in _GEOMETRY.items():
        geometry.add_argument(option, dest=name, type=int, metavar="N", help=text)
    parser.add_argument("--force", action="store_true", help="replace OUT if it is there")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Convert, write, and say what became of each entry; 0."""
    source = read(args.source)
    check_target(args.out, source, args.force)
    imported, format = convert(source, args.format, Given(**{name: getattr(args, name) for name in _GEOMETRY}))
    said: dict[str, Any] = {"origin": origin(source, format)} | source.progress
    inference = dict(source.inference)
    if (
        format == "hf"
        and (names := class_names(source.config))
        and imported.architecture.get("classes") == [len(names)]
    ):
        inference = {"class_names": [names]} | inference
    said |= {"inference": inference} if inference else {}
    write_pt(args.out, imported.state, imported.architecture, said)
    print(f"{source}: {len(source.state)} tensors of format {format}")
    for line in imported.lines():
        print(line)
    print(f"Wrote {args.out}: {len(imported.state)} tensors, {imported.summary()}")
    return 0
