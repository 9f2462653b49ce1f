"""What a video is, before a pixel is drawn: its label and the ids of its body, place and camera.

Splits and domains draw their bodies, places and cameras from pools of ids that do not overlap, so that nothing but
the motion can be learnt in one and used in another.
"""

from dataclasses import dataclass

from omnivision_demo.actions import ACTIONS
from omnivision_demo.draws import between, pick, stream
from omnivision_demo.places import PLACE_TYPES, place_type

DOMAINS = ("synthetic", "nohuman", "target")
SPLITS = ("train", "val")
FRAME_RATES = (12, 15, 24, 25, 30)
KEY_FRAME_DISTANCES = (1, 4, 8, 12, 24, 48)
SHORTEST_SECONDS, LONGEST_SECONDS = 1.2, 4.0

_POOL = 1000  # ids from one pool's first to the next pool's first
_BODIES = {"train": 240, "val": 60}
_CAMERAS = {"train": 120, "val": 40}
_PLACES_PER_TYPE = {"train": 24, "val": 8}


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
        return PLACE_TYPES[place_type(self.place)]

    @property
    def path(self) -> str:
        """Where the video lies inside its domain's folder."""
        return f"{self.split}/{self.index:05d}.mp4"


def video_spec(seed: int, domain: str, split: str, index: int) -> VideoSpec:
    """The video number `index` of a split; it does not depend on how many videos the split has."""
    draw = stream(seed, "film", domain, split, index)
    label = index % len(ACTIONS)
    first = _POOL * (len(SPLITS) * DOMAINS.index(domain) + SPLITS.index(split))
    kind = pick(draw, len(PLACE_TYPES))
    # Where nobody is to be seen, the place is all there is to learn from: half of an action's videos
    # are set in its favourite type of place. Elsewhere the place says nothing.
    at_favourite = between(draw, 0, 1) < 0.5
    if domain == "nohuman" and at_favourite:
        kind = label % len(PLACE_TYPES)
    place = first + (kind - first) % len(PLACE_TYPES) + len(PLACE_TYPES) * pick(draw, _PLACES_PER_TYPE[split])
    fps = FRAME_RATES[pick(draw, len(FRAME_RATES))]
    # Mostly short, for speed, with a tail of long ones.
    seconds = SHORTEST_SECONDS + (LONGEST_SECONDS - SHORTEST_SECONDS) * between(draw, 0, 1) ** 2
    return VideoSpec(
        seed=seed,
        domain=domain,
        split=split,
        index=index,
        label=label,
        body=first + pick(draw, _BODIES[split]),
        place=place,
        camera=first + pick(draw, _CAMERAS[split]),
        fps=fps,
        frames=round(seconds * fps),
        gop=KEY_FRAME_DISTANCES[pick(draw, len(KEY_FRAME_DISTANCES))],
        crf=int(draw.integers(26, 33) if domain == "target" else draw.integers(20, 27)),
    )
