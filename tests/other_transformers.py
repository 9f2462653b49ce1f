"""Other versions of transformers than the installed one, each in a folder under build/transformers.

python -m tests.other_transformers 5.10.4          # install it
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Each reads biases under other names than the version before it, and needs older packages than the newest ones.
VERSIONS = {
    "4.57.6": ["huggingface_hub<1", "tokenizers<0.23"],
    "5.4.0": ["huggingface_hub<2", "tokenizers<0.23"],
    "5.10.4": ["huggingface_hub<2", "tokenizers<0.23"],
    "5.17.0": ["huggingface_hub<2"],
    "5.18.0": [],
}
IN_SUITE = "5.10.4"  # beside the installed one
# What a receiver does: load a folder in single precision, and look at a clip.
RECEIVER = """
import sys, torch, transformers
assert transformers.__version__ == sys.argv[1], transformers.__version__
for folder in sys.argv[2:]:
    kind = transformers.AutoConfig.from_pretrained(folder).architectures[0]
    model = getattr(transformers, kind).from_pretrained(folder, local_files_only=True).eval()
    with torch.no_grad():
        found = model(torch.load(folder + "/clip.pt"))
    torch.save(found[0], folder + "/outputs.pt")
"""


def folder_of(version: str) -> Path:
    return ROOT / "build" / "transformers" / version


def install(version: str) -> None:
    packages = [f"transformers=={version}", *VERSIONS[version]]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
    subprocess.run([*pip, "--target", str(folder_of(version)), *packages], check=True)


def run_receiver(version: str, folders: list[Path]) -> None:
    """Load exports with a version, in a process of its own; each folder's `clip.pt` becomes `outputs.pt`."""
    environment = os.environ | {"PYTHONPATH": str(folder_of(version)), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", RECEIVER, version, *map(str, folders)]
    subprocess.run(command, check=True, env=environment, capture_output=True, cwd=ROOT)


if __name__ == "__main__":
    for version in sys.argv[1:]:
        install(version)
