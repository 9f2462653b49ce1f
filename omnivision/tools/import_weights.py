"""`omnivision import SOURCE OUT.pt`: brings weights of other projects into our names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omnivision.checkpoint.state_dict_file import read
from omnivision.interop.architecture import ArchOverrides
from omnivision.interop.export import check_target, origin, write_pt
from omnivision.interop.formats import class_names, convert


def run(path: str, out: Path, choice: str, geometry: Mapping[str, int | None], force: bool) -> int:
    """Convert, write, and say what became of each entry; 0."""
    source = read(path)
    check_target(out, source, force)
    converted, format = convert(source, choice, ArchOverrides(**geometry))
    metadata: dict[str, Any] = {"origin": origin(source, format)} | source.progress
    inference = dict(source.inference)
    if (
        format == "hf"
        and (names := class_names(source.config))
        and converted.architecture.get("classes") == [len(names)]
    ):
        inference = {"class_names": [names]} | inference
    metadata |= {"inference": inference} if inference else {}
    write_pt(out, converted.state, converted.architecture, metadata)
    print(f"{source}: {len(source.state)} tensors of format {format}")
    for line in converted.lines():
        print(line)
    print(f"Wrote {out}: {len(converted.state)} tensors, {converted.summary()}")
    return 0
