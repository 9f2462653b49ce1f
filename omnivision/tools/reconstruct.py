"""`omnivision reconstruct CHECKPOINT VIDEO OUT`: what a masked autoencoder makes of a clip of a film, as a moving picture."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from omnivision.tools.arguments import add_device, add_fps, add_trust_targets, at_least, frame_rate, number
from omnivision.utils.errors import UserError

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_parser(subparsers: Subparsers) -> None:
    """Add `reconstruct` to the command's parser; its namespace carries `run`, the function to call."""
    parser = subparsers.add_parser(
        "reconstruct",
        help="show what a masked autoencoder makes of a film",
        description="A clip of a film beside what the encoder saw of it and what the model made of that: once with the true "
        "statistics of each hidden patch, as papers show it, and once without.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a run folder of stage 1, or a file")
    parser.add_argument("film", metavar="VIDEO", help="a film, or a folder of its frames")
    parser.add_argument("out", metavar="OUT", type=Path, help="a .gif, which moves, or a .png of some frames")
    parser.add_argument(
        "--start", type=number, metavar="SECONDS", help="where the clip begins (default: in the middle)"
    )
    parser.add_argument("--mask-ratio", type=number, default=0.9, metavar="SHARE", help="what is hidden (default 0.9)")
    parser.add_argument("--seed", type=at_least(0), default=0, metavar="N", help="of the mask (default 0)")
    parser.add_argument("--force", action="store_true", help="replace OUT if it is there")
    add_device(parser)
    add_trust_targets(parser)
    add_fps(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the picture; 0."""
    if args.out.suffix not in (".gif", ".png"):
        raise UserError(f"OUT is {args.out}; expected a name that ends in .gif or .png.")
    if args.out.exists() and args.out.resolve() == Path(args.film).resolve():
        raise UserError(f"OUT is {args.out}, the film that is read. Give another OUT.")
    if args.out.exists() and not args.force:
        raise UserError(f"OUT is {args.out}, which is there already. Give another OUT, or --force to replace it.")
    if not 0 < args.mask_ratio < 1:
        raise UserError(f"--mask-ratio is {args.mask_ratio:g}; expected a share above 0 and below 1.")
    from omnivision.reporting.images import gif_bytes, moving, still
    from omnivision.tools.inference import load
    from omnivision.utils.io import replace_atomically

    pictures = load(args.checkpoint, args.device, args.trust_targets).reconstruct(
        args.film, args.start, args.mask_ratio, args.seed, frame_rate(args, [args.film]), args.frame_pattern
    )
    try:
        with replace_atomically(args.out) as file:
            if args.out.suffix == ".gif":
                file.write(gif_bytes(moving(pictures)))
            else:
                still(pictures).save(file, "PNG")
    except OSError as error:
        raise UserError(f"{args.out} cannot be written: {error.strerror}. Give another OUT.") from error
    print(f"Wrote {args.out}")
    return 0
