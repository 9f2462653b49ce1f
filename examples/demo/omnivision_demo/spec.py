"""A video before a pixel is drawn: its action, the ids of its body, place and camera, and the motion of its joints.

The six actions differ in which joint angle *moves*, and in nothing that a single frame shows. A body has one channel for
each action, with the value amplitude * sin(phase); every video draws all phases and amplitudes from the same distribution.
The phase of its action's channel advances, the others keep theirs, so a single frame of any action is a draw from one
distribution of poses. Splits and domains draw bodies, places and cameras from disjoint pools of ids: only motion carries over.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from omnivision_demo.draws import between, pick, stream

ACTIONS = (
    "raise_arms",  # both arms, sideways, together
    "march",  # knees up in turn
    "squat",  # both knees
    "bow",  # torso forwards
    "jump",  # up
    "sidestep",  # to the left and right
)
DOMAINS = ("synthetic", "nohuman", "target")
SPLITS = ("train", "val")
PLACE_TYPES = tuple("living_room gym street park beach mountains stage forest desert snow night kitchen".split())

_FRAME_RATES = (10, 12, 15, 20, 25)
_KEY_FRAME_DISTANCES = (1, 4, 8, 12, 24, 48)
_SECONDS = (1.7, 2.6)
# Turns per second. The slowest still shows 1.2 periods in any 1.6 seconds, the fastest 8 frames per period at 10 fps.
_TURNS = (0.8, 1.2)
_POOL = 1000  # ids from one pool's first to the next pool's first
_POOL_SIZES = {"train": (240, 120, 24), "val": (60, 40, 8)}  # bodies, cameras, places of each type


@dataclass(frozen=True)
class VideoSpec:
    """One video. `frames` and `gop` are counted in frames; ids are unique over all domains and splits."""

    seed: int
    domain: str
    split: str
    index: int
    label: int
    body: int
    place: int
    camera: int
    fps: int
    frames: int
    gop: int
    crf: int

    @property
    def action(self) -> str:
        return ACTIONS[self.label]

    @property
    def place_type(self) -> str:
        return PLACE_TYPES[self.place % len(PLACE_TYPES)]

    @property
    def path(self) -> str:
        """Path of the video below its domain's folder."""
        return f"{self.split}/{self.index:05d}.mp4"

    def stream(self, name: str) -> np.random.Generator:
        """Return a generator of this video, which does not depend on its label."""
        return stream(self.seed, name, self.domain, self.split, self.index)

    @property
    def turns(self) -> float:
        """Turns per second of the channel that moves, on average."""
        return round(float(_draw_motion(self.stream("motion"))[3][self.label]), 4)

    def channels(self) -> NDArray[np.float64]:
        """Return the motion: channel values, float64 (T, len(ACTIONS))."""
        return motion(self.label, self.frames, self.fps, self.stream("motion"))


def video_spec(seed: int, domain: str, split: str, index: int) -> VideoSpec:
    """Return video number `index` of a split; it does not depend on the split's size."""
    draw = stream(seed, "film", domain, split, index)
    label = index % len(ACTIONS)
    first = _POOL * (len(SPLITS) * DOMAINS.index(domain) + SPLITS.index(split))
    bodies, cameras, places = _POOL_SIZES[split]
    kind = pick(draw, len(PLACE_TYPES))
    # Without people only the place can be learnt: half of an action's videos have its favourite type of place.
    # In the other domains the place is independent of the action.
    at_favourite = between(draw, 0, 1) < 0.5
    if domain == "nohuman" and at_favourite:
        kind = label
    place = first + (kind - first) % len(PLACE_TYPES) + len(PLACE_TYPES) * pick(draw, places)
    fps = _FRAME_RATES[pick(draw, len(_FRAME_RATES))]
    # Mostly short, for speed, with a tail of long ones.
    seconds = _SECONDS[0] + (_SECONDS[1] - _SECONDS[0]) * between(draw, 0, 1) ** 2
    body, camera = first + pick(draw, bodies), first + pick(draw, cameras)
    gop = _KEY_FRAME_DISTANCES[pick(draw, len(_KEY_FRAME_DISTANCES))]
    crf = int(draw.integers(26, 33) if domain == "target" else draw.integers(20, 27))
    return VideoSpec(seed, domain, split, index, label, body, place, camera, fps, round(seconds * fps), gop, crf)


def motion(label: int, frames: int, fps: float, draw: np.random.Generator) -> NDArray[np.float64]:
    """Return channel values, float64 (frames, len(ACTIONS)), within about [-1, 1]; channel `label` moves."""
    seconds = np.arange(frames)[:, None] / fps  # (T, 1)
    (phase, wobble_phase, idle_phase), amplitude, idle_turns, turns = _draw_motion(draw)
    # The speed varies by up to 10 percent.
    run = 2 * np.pi * turns * seconds + 0.2 * np.sin(2 * np.pi * 0.4 * seconds + wobble_phase)  # (T, C)
    value = amplitude * np.sin(phase + np.where(np.arange(len(ACTIONS)) == label, run, 0.0))
    # All channels, the moving one too, sway a little.
    return value + 0.04 * np.sin(2 * np.pi * idle_turns * seconds + idle_phase)


def _draw_motion(draw: np.random.Generator) -> tuple[NDArray[np.float64], ...]:
    """Return three phases (3, C), and for each channel amplitude, turns per second while idle, and while it moves.

    Everything is drawn for every channel, so that no draw depends on the label.
    """
    channels = len(ACTIONS)
    phases = draw.uniform(0, 2 * np.pi, (3, channels))
    amplitude = draw.uniform(0.8, 1.0, channels)
    turns, idle_turns = draw.uniform(*_TURNS, channels), draw.uniform(0.2, 0.5, channels)
    return phases, amplitude, idle_turns, turns
