"""Videos of captured motions, rendered by pybullet: other actions, bodies, renderer and cameras than the demo's (docs/demo.md).

    pip install pybullet
    python -m benchmarks.mocap_videos FOLDER      1,200 videos, 10 minutes on two cores beside other work

The motions are the fifteen recordings of persons in `pybullet_data/data/motions` (zlib license); training and validation share
them, with other bodies, places, cameras, speeds and starts. FOLDER looks like the data of `omnivision demo-data`, with the
domain `target` alone. No setting of the demo was chosen with these videos.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pybullet
import pybullet_data
from numpy.typing import NDArray
from PIL import Image
from pybullet_utils.bullet_client import BulletClient

from omnivision.data.encode import write_video
from omnivision.tools.workers import WorkerCrashedError, run_in_processes
from omnivision.utils.io import write_atomically
from omnivision_demo.draws import between, hsv, pick, stream

MOTIONS = Path(pybullet_data.getDataPath()) / "data" / "motions"
ACTIONS = tuple(sorted(path.stem.removeprefix("humanoid3d_") for path in MOTIONS.glob("humanoid3d_*.txt")))
SECONDS, FRAME_RATES = 2.0, (10, 12, 15)
WIDTH, HEIGHT, OVERSAMPLING = 88, 72, 2
# Joints in the order of a recorded frame, after its duration (1), the root's position (3) and its orientation (4); with the
# number of values: an angle, or a quaternion with the real part first.
JOINTS = {"chest": 4, "neck": 4} | {
    f"{side}_{joint}": 1 if joint in ("knee", "elbow") else 4
    for side in ("right", "left")
    for joint in ("hip", "knee", "ankle", "shoulder", "elbow")
}
_UPRIGHT = (0.5**0.5, 0.0, 0.0, 0.5**0.5)  # turns the recordings' y axis up, x y z w
_SCALE = 0.25  # of the body's file to meters


class Motion(NamedTuple):
    """A recorded motion: start of each frame in seconds, (T,), and its values, (T, 43)."""

    seconds: NDArray[np.float64]
    values: NDArray[np.float64]
    duration: float
    repeats: bool

    def values_at(self, time: float) -> NDArray[np.float64]:
        """Return the values of the nearest frame, (43,). A loop continues where it ended; others hold their last frame."""
        turns, rest = divmod(time, self.duration) if self.repeats else (0, min(time, self.duration))
        values = self.values[np.abs(self.seconds - rest).argmin()].copy()
        values[[0, 2]] += turns * (self.values[-1, [0, 2]] - self.values[0, [0, 2]])
        return values


def read_motion(action: str) -> Motion:
    """Read a recording of pybullet_data."""
    recording = json.loads((MOTIONS / f"humanoid3d_{action}.txt").read_text())
    frames = np.array(recording["Frames"])
    ends = np.cumsum(frames[:, 0])
    return Motion(ends - frames[:, 0], frames[:, 1:], float(ends[-1]), recording["Loop"] == "wrap")


def render(action: str, draw: np.random.Generator, fps: int) -> NDArray[np.uint8]:
    """Render one video, uint8 (T, HEIGHT, WIDTH, 3), all random values from `draw`."""
    motion = read_motion(action)
    client: Any = BulletClient(pybullet.DIRECT)
    try:
        person = _load_person(client, draw)
        _load_scene(client, draw)
        speed, start = between(draw, 0.85, 1.15), between(draw, 0, motion.duration if motion.repeats else 0.5)
        azimuth, pitch, distance = between(draw, 0, 360), between(draw, -22, -4), between(draw, 1.8, 2.5)
        lag, shake, phase = between(draw, 0.8, 1.0), between(draw, 0, 0.02), draw.uniform(0, 7, 2)
        light = [between(draw, -1, 1), between(draw, -1, 1), between(draw, 0.6, 1.4)]
        ambient, diffuse = between(draw, 0.6, 0.85), between(draw, 0.3, 0.5)
        projection = client.computeProjectionMatrixFOV(50, WIDTH / HEIGHT, 0.1, 30)
        first, frames = motion.values_at(start)[[0, 2]], []
        for time in np.arange(round(SECONDS * fps)) / fps:
            values = motion.values_at(start + speed * time)
            values[[0, 2]] -= first
            _pose(client, person, values)
            # The camera lags behind the person and shakes.
            x, y = lag * np.array([values[0], -values[2]]) + shake * np.sin(4 * time + phase)
            view = client.computeViewMatrixFromYawPitchRoll((x, y, 0.75), distance, azimuth, pitch, 0, 2)
            size = (OVERSAMPLING * WIDTH, OVERSAMPLING * HEIGHT)
            image = client.getCameraImage(
                *size, view, projection, light, (1, 1, 1), 10, 1, ambient, diffuse, 0.1,
                renderer=pybullet.ER_TINY_RENDERER, flags=pybullet.ER_NO_SEGMENTATION_MASK,
            )[2]  # fmt: skip
            pixels = np.asarray(image, np.uint8).reshape(size[1], size[0], 4)[..., :3]
            frames.append(np.asarray(Image.fromarray(pixels).reduce(OVERSAMPLING)))
    finally:
        client.disconnect()
    noise = draw.normal(0, between(draw, 1, 4), (len(frames), HEIGHT, WIDTH, 1))
    return np.clip(np.stack(frames) + noise, 0, 255).astype(np.uint8)


def _load_person(client: Any, draw: np.random.Generator) -> int:
    """Load pybullet's humanoid with random limb widths and colors; return its body id."""
    text = (Path(pybullet_data.getDataPath()) / "humanoid" / "humanoid.urdf").read_text("latin1")
    build = between(draw, 0.8, 1.35)
    text = re.sub(r'(radius\s*=\s*")([\d.]+)"', lambda hit: f'{hit[1]}{build * float(hit[2]):.4f}"', text)
    text = text.replace('type="spherical" >', 'type="spherical" ><axis xyz="1 0 0"/>')  # or pybullet prints a warning
    with tempfile.NamedTemporaryFile("w", suffix=".urdf", encoding="latin1") as file:
        file.write(text)
        file.flush()
        person = int(client.loadURDF(file.name, useFixedBase=True, globalScaling=_SCALE * between(draw, 0.95, 1.05)))
    skin, shirt, trousers = (_color(draw, value) for value in (0.8, 0.7, 0.5))
    for number in range(-1, client.getNumJoints(person)):
        name = "root" if number < 0 else client.getJointInfo(person, number)[12].decode()
        color = trousers if any(part in name for part in ("hip", "knee", "ankle")) else shirt
        client.changeVisualShape(person, number, rgbaColor=skin if any(p in name for p in ("neck", "wrist")) else color)
    return person


def _load_scene(client: Any, draw: np.random.Generator) -> None:
    """Load a ground, walls and some boxes."""

    def box(half: tuple[float, float, float], position: tuple[float, float, float], value: float) -> None:
        shape = client.createVisualShape(pybullet.GEOM_BOX, halfExtents=half, rgbaColor=_color(draw, value))
        client.createMultiBody(0, -1, shape, position)

    box((9, 9, 0.05), (0, 0, -0.05), 0.6)
    for x, y in ((8, 0), (-8, 0), (0, 8), (0, -8)):
        box((0.1 if x else 8, 0.1 if y else 8, 5), (x, y, 5), 0.8)
    for _ in range(pick(draw, 12)):
        angle, far = between(draw, 0, 6.3), between(draw, 2.2, 7)
        half = (between(draw, 0.1, 0.7), between(draw, 0.1, 0.7), between(draw, 0.1, 1.2))
        box(half, (far * np.cos(angle), far * np.sin(angle), half[2]), 0.6)


def _color(draw: np.random.Generator, value: float) -> list[float]:
    shade = hsv(between(draw, 0, 1), between(draw, 0.1, 0.7), min(1.0, value * between(draw, 0.6, 1.3)))
    return [channel / 255 for channel in shade] + [1.0]


def _pose(client: Any, person: int, values: NDArray[np.float64]) -> None:
    """Set the person's joints to recorded values, (43,)."""

    def quaternion(part: NDArray[np.float64]) -> list[float]:
        return [*part[1:].tolist(), float(part[0])]

    x, y, z = values[:3]
    _, turn = client.multiplyTransforms((0, 0, 0), _UPRIGHT, (0, 0, 0), quaternion(values[3:7]))
    client.resetBasePositionAndOrientation(person, (x, -z, y), turn)
    numbers = {client.getJointInfo(person, n)[1].decode(): n for n in range(client.getNumJoints(person))}
    at = 7
    for joint, count in JOINTS.items():
        part = values[at : at + count]
        client.resetJointStateMultiDof(person, numbers[joint], part.tolist() if count == 1 else quaternion(part))
        at += count


def _write(job: tuple[str, str, int]) -> None:
    """Render and write video `index` of a split."""
    folder, split, index = job
    draw = stream(0, "mocap", split, index)
    fps = FRAME_RATES[pick(draw, len(FRAME_RATES))]
    path = Path(folder) / "target" / split / f"{index:05d}.mp4"
    write_video(path, render(ACTIONS[index % len(ACTIONS)], draw, fps), fps=fps, gop=(1, 12, 48)[pick(draw, 3)], crf=24)


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.mocap_videos", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--per-action", type=int, default=40, help="videos of each action in each split; %(default)s by default"
    )
    options = parser.parse_args()
    folder = options.folder.absolute()
    jobs = []
    for split in ("train", "val"):
        numbers = range(len(ACTIONS) * options.per_action)
        (folder / "target" / split).mkdir(parents=True, exist_ok=True)
        np.save(folder / "target" / f"{split}_paths.npy", np.array([f"{split}/{number:05d}.mp4" for number in numbers]))
        np.save(folder / "target" / f"{split}_labels.npy", np.array([number % len(ACTIONS) for number in numbers]))
        jobs += [(str(folder), split, number) for number in numbers]
    write_atomically(folder / "class_names.txt", "".join(f"{action}\n" for action in ACTIONS))
    for result in run_in_processes(_write, jobs, None):
        if isinstance(result, WorkerCrashedError):
            raise RuntimeError(f"A video was not rendered: {result}. Run the command again.")
    print(f"{len(jobs)} videos of {len(ACTIONS)} actions in {folder}")


if __name__ == "__main__":
    main()
