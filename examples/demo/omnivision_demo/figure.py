"""From joints to a picture: the person as rounded limbs, drawn from the farthest to the nearest."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import ImageDraw

from omnivision_demo.body import Body
from omnivision_demo.draws import Colour, scaled
from omnivision_demo.skeleton import JOINTS

Array = NDArray[np.float64]
_ARC = np.linspace(-np.pi / 2, np.pi / 2, 7)  # directions of a limb's round end


@dataclass(frozen=True)
class _Limb:
    """A rounded stroke between two joints, or two points given as (joint, joint, share of the way)."""

    start: tuple[str, str, float]
    end: tuple[str, str, float]
    radius: tuple[float, float]
    colour: Colour
    depth: tuple[str, str]  # the middle of these two joints says how near it is
    nearer: float = 0.0  # world units added to that
    shift: float = 0.0  # towards the light, in world units


def limbs(body: Body) -> list[_Limb]:
    """All strokes a body is drawn with."""
    found: list[_Limb] = []

    def limb(start: str, end: str, first: float, last: float, colour: Colour, cloth: bool, nearer: float = 0.0) -> None:
        found.append(_Limb((start, end, 0.0), (start, end, 1.0), (first, last), colour, (start, end), nearer))
        if body.banded and cloth:
            for at in (0.3, 0.7):
                band = ((start, end, at - 0.04), (start, end, at + 0.04))
                found.append(_Limb(*band, (0.95 * first, 0.95 * last), body.pattern, (start, end), nearer + 0.001))
        if body.shaded:
            ends = ((start, end, 0.0), (start, end, 1.0))
            lit, thin = scaled(colour, 1.25), (0.3 * first, 0.3 * last)
            found.append(_Limb(*ends, thin, lit, (start, end), nearer + 0.002, shift=0.4 * first))

    sleeve = body.shirt if body.long_sleeves else body.skin
    leg = body.trousers if body.long_trousers else body.skin
    wide = body.limb
    for side in ("left", "right"):
        shoulder, elbow, hand = f"{side}_shoulder", f"{side}_elbow", f"{side}_hand"
        hip, knee, ankle, toe = f"{side}_hip", f"{side}_knee", f"{side}_ankle", f"{side}_toe"
        limb(ankle, toe, 0.8 * wide, 0.6 * wide, body.shoes, False)
        limb(knee, ankle, 1.05 * wide, 0.75 * wide, leg, body.long_trousers, 0.003)
        limb(hip, knee, 1.5 * wide, 1.1 * wide, body.trousers, True, 0.006)
        limb(shoulder, elbow, 1.05 * wide, 0.85 * wide, body.shirt, True, 0.012)
        limb(elbow, hand, 0.8 * wide, 0.65 * wide, sleeve, body.long_sleeves, 0.006)
        found.append(_Limb((hand, hand, 0), (hand, hand, 0), (0.85 * wide,) * 2, body.skin, (hand, elbow), 0.009))
    found += _trunk(body)
    found += _head(body)
    return found


def _trunk(body: Body) -> list[_Limb]:
    trunk = ("chest", "pelvis")
    found = [
        _Limb(("left_hip", "right_hip", 0.0), ("left_hip", "right_hip", 1.0), (body.girth,) * 2, body.trousers, trunk)
    ]
    for across in (0.12, 0.5, 0.88):  # two sides and a middle, so that it narrows when seen from the side
        top, low = ("left_shoulder", "right_shoulder", across), ("left_hip", "right_hip", across)
        found.append(_Limb(top, low, (body.girth, 0.9 * body.girth), body.shirt, trunk, 0.01))
    for number in range(body.stripes):
        height = 0.1 + 0.75 * (number + 0.5) / body.stripes
        left, right = ("left_shoulder", "left_hip", height), ("right_shoulder", "right_hip", height)
        found.append(_Limb(left, right, (0.3 * body.girth,) * 2, body.pattern, trunk, 0.011))
    return found


def _head(body: Body) -> list[_Limb]:
    radius = body.head
    found = [
        _Limb(
            ("neck", "head", 0.0),
            ("neck", "chest", 1.0),
            (0.4 * radius,) * 2,
            scaled(body.skin, 0.85),
            ("neck", "neck"),
        ),
        _Limb(("head", "head", 0.0), ("head", "head", 0.0), (radius,) * 2, body.hair, ("head", "head"), 0.03),
        _Limb(("face", "face", 0.0), ("face", "face", 0.0), (0.82 * radius,) * 2, body.skin, ("face", "face"), 0.03),
    ]
    if body.long_hair:
        back = ("face", "head", 1.5)  # beyond the head's middle, seen from the face
        tail = ("head", "neck", 1.3)
        found.append(_Limb(back, tail, (0.75 * radius, 0.6 * radius), body.hair, ("head", "head"), 0.028))
    return found


@dataclass(frozen=True)
class Outline:
    """A person ready to be drawn: for each frame, polygons in world units, the farthest first."""

    points: Array  # (T, limbs, 14, 2)
    order: NDArray[np.int64]  # (T, limbs)
    colours: list[Colour]


def outline(body: Body, joints: Array) -> Outline:
    """The outline of `body` with its joints at `joints` (T, len(JOINTS), 3)."""
    number = {name: position for position, name in enumerate(JOINTS)}
    strokes = limbs(body)
    ends = []
    for which in ("start", "end"):
        spots = [getattr(stroke, which) for stroke in strokes]
        a = joints[:, [number[spot[0]] for spot in spots]]
        b = joints[:, [number[spot[1]] for spot in spots]]
        ends.append(a + np.array([spot[2] for spot in spots])[:, None] * (b - a))
    nearness = 0.5 * sum(joints[:, [number[stroke.depth[side]] for stroke in strokes], 2] for side in (0, 1))
    nearness = nearness + np.array([stroke.nearer for stroke in strokes])
    start, end = (points[:, :, :2] for points in ends)
    light = np.array([stroke.shift for stroke in strokes])[:, None] * np.array([-0.7, 0.7])
    shapes = _capsules(start + light, end + light, np.array([stroke.radius for stroke in strokes]))
    return Outline(shapes, np.argsort(nearness, axis=1, kind="stable"), [stroke.colour for stroke in strokes])


def _capsules(start: Array, end: Array, radius: Array) -> Array:
    """Strokes from start to end (T, N, 2) with round ends of radius (N, 2), as polygons (T, N, 14, 2)."""
    along = end - start
    heading = np.arctan2(along[..., 1], along[..., 0])[..., None]  # (T, N, 1)
    halves = []
    for centre, size, turn in ((end, radius[:, 1], 0.0), (start, radius[:, 0], np.pi)):
        arc = heading + turn + _ARC
        halves.append(centre[:, :, None] + size[:, None, None] * np.stack([np.cos(arc), np.sin(arc)], axis=-1))
    return np.concatenate(halves, axis=2)


def draw(outline: Outline, frame: int, pen: ImageDraw.ImageDraw, scale: float, left: float, top: float) -> None:
    """Draw one frame of `outline`; (left, top) is the world point at the picture's corner, `scale` its pixels a unit."""
    pixels = (outline.points[frame] - (left, top)) * (scale, -scale)  # (limbs, 14, 2)
    flat = pixels.reshape(len(pixels), -1).tolist()
    for number in outline.order[frame]:
        pen.polygon(flat[number], fill=outline.colours[number])
