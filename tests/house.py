"""Sizes of the code: `python -m tests.house [COMMIT]` prints them, beside those of a commit.

Hops are the calls from the command to the trainer's `train_step`, seen in a run of a tiny model.
"""

import ast
import io
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.runs import ROOT

# Words of earlier versions that nobody in this field uses; no definition may have one.
OLD_NAMES = frozenset(
    """
    Agreement BadVideo Begin BrokenCheckpoint CALLED Choice Cost Cut Died ELSEWHERE Ending Films GONE Given Guess Imported
    Intake Interval JobRecord LOOKED_FOR Listing LostContact MEANT MOST Mixing OVER Options Outcome PatientStream Peers Phases
    PickledObjects Pictures Place Posted Processes Recipe Row SAME SUPPLIED Shown Source Standing Starvation StepWatch Stop
    Target Terminated USUAL Verdict WITHOUT_EFFECT Workers _Patience _Posted _Share _as_stored _disagreements _located
    _not_too_long _read_honestly _trustworthy adopt_torchrun all_of allow alone also altering_settings apart ask asked attach
    bare be_patient began carry_out check_room check_way checked choose coming_back composed contradictions described done
    draws end_what_was_taken ended everywhere facts fault filled fitted_positions fruitless_starts full_speed gathered halves
    hand_over handing_on hear heard hindrances how_it_ended interruption known_jobs lap last_words leave leave_with
    leaves_parameters_out line_of listed listening looked_for lost_meanwhile machine measured moment near_group note_beginning
    note_step now occurrence open_plain own_checkpoints parallel parted patience permuted pieces post proof
    read_numbers_as_written ready_trainer refusal remove_leftovers require_one_shape require_same_place require_scale resumed
    rewind say seen settings_first settle settled setup_lines shard silent sound split_like spoiled store take_up tell_dry
    together told undisturbed unheard unless verdict wait_to_see waits whole written
    """.split()
)
COUNT_HOPS = """
import pathlib, sys, traceback
root = pathlib.Path.cwd()
sys.path.insert(0, str(root))
sys.argv = ["train_app_submitit.py", *sys.argv[1:]]

def look(frame, event, argument):
    if event == "call" and frame.f_code.co_name == "train_step" and "omnivision" in frame.f_code.co_filename:
        files = [each.filename for each in traceback.extract_stack(frame)]
        files = [each for each in files if each.startswith(f"{root}/omnivision") or each.endswith("train_app_submitit.py")]
        print("HOPS", len(files) - 1, len(set(files)), flush=True)
        import os
        os._exit(0)

sys.setprofile(look)
import runpy
runpy.run_path("train_app_submitit.py", run_name="__main__")
"""


def lines(files: list[Path]) -> int:
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


def definitions(tree: ast.AST) -> Iterator[str]:
    """Names of functions, classes and constants."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Assign):
            yield from (name.id for name in node.targets if isinstance(name, ast.Name) and name.id.isupper())


def attributes(node: ast.ClassDef) -> int:
    """Attributes that a class declares or assigns to itself."""
    names = {
        item.target.id for item in node.body if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    }
    for inner in ast.walk(node):
        if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store) and ast.unparse(inner.value) == "self":
            names.add(inner.attr)
    return len(names)


def hops(root: Path) -> str:
    """Calls from the command to `train_step`, and the files that they are in."""
    with tempfile.TemporaryDirectory() as folder:
        from tests import stage_runs

        arguments = stage_runs.command("ft", Path(folder) / "run", "pretrained_checkpoint_path=null", "epochs=1")
        videos = stage_runs.write_videos(Path(folder), 6)
        for split in ("train", "val"):
            arguments += stage_runs.write_split(Path(folder), "ucf101", split, videos)
        run = subprocess.run([sys.executable, "-c", COUNT_HOPS, *arguments], cwd=root, capture_output=True, text=True)
    hops = [line.split()[1:] for line in run.stdout.splitlines() if line.startswith("HOPS")]
    return f"{hops[0][0]} in {hops[0][1]} files" if hops else f"not measured: {run.stderr[-300:]}"


def measure(root: Path) -> dict[str, object]:
    """The table of a checkout."""
    package = [file for file in sorted((root / "omnivision").rglob("*.py")) if "demo" not in file.parts]
    trees = {file: ast.parse(file.read_text(encoding="utf-8")) for file in package}
    nodes = [(file, node) for file, tree in trees.items() for node in ast.walk(tree)]
    functions = [n for _, n in nodes if isinstance(n, ast.FunctionDef) and n.end_lineno - n.lineno >= 60]  # type: ignore[operator]
    classes = [n for f, n in nodes if isinstance(n, ast.ClassDef) and "ettings" not in n.name + f.stem]
    large = [node.name for node in classes if attributes(node) > 12]
    old = sorted({name for tree in trees.values() for name in definitions(tree)} & OLD_NAMES)

    def inside(*names: str) -> int:
        return lines([file for file in package if set(names) & set(file.relative_to(root).parts[1:-1])])

    command = [file for file in (root / "train_app_submitit.py", root / "omnivision/train.py") if file.exists()]
    return {
        "package, lines": lines(package),
        "package, modules": len([f for f in package if f.name != "__init__.py"]),
        "modules at the package's root": len([f for f in package if len(f.relative_to(root).parts) == 2]),
        "launch, lines": inside("launch"),
        "config and the command, lines": inside("config") + lines(command),
        "interop and checkpoint, lines": inside("interop", "checkpoint"),
        "tools, lines": inside("tools"),
        "hops to train_step": hops(root),
        "functions of 60 lines and more": len(functions),
        "classes with over 12 attributes": f"{len(large)} {' '.join(large)}",
        "tests, lines": lines(sorted((root / "tests").rglob("*.py"))),
        "old names": f"{len(old)} {' '.join(old)}",
        "README, lines": len((root / "README.md").read_text(encoding="utf-8").splitlines()),
    }


def main() -> None:
    columns = [("now", measure(ROOT))]
    with tempfile.TemporaryDirectory() as folder:
        for commit in sys.argv[1:]:
            archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=True).stdout
            tarfile.open(fileobj=io.BytesIO(archive)).extractall(folder, filter="data")
            columns.insert(0, (commit, measure(Path(folder))))
    for name in columns[0][1]:
        print(f"{name:32}", "  ->  ".join(str(values[name]) for _, values in columns))


if __name__ == "__main__":
    main()
