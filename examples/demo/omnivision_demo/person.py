"""The articulated person: its body, its joints (forward kinematics), and the rounded strokes that draw it."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from omnivision_demo.camera import Pen
from omnivision_demo.draws import Colour, between, hsv, pick, scaled, stream, varied
from omnivision_demo.spec import ACTIONS, VideoSpec

Array = NDArray[np.float64]

JOINTS = (
    *("pelvis", "chest", "neck", "head", "face"),
    *("left_shoulder", "left_elbow", "left_hand", "left_hip", "left_knee", "left_ankle", "left_toe"),
    *("right_shoulder", "right_elbow", "right_hand", "right_hip", "right_knee", "right_ankle", "right_toe"),
)
_SOLE = 0.022  # height of the ankle above the ground
_DOWN, _UP, _FORWARD = np.array([0.0, -1.0, 0.0]), np.array([0.0, 1.0, 0.0]), np.array([0.0, 0.0, 1.0])
_ELBOW, _SPREAD = np.radians([45.0, 14.0])  # bend of the elbows, angle of the thighs to the vertical
_ARC = np.linspace(-np.pi / 2, np.pi / 2, 7)  # directions of a stroke's round end
_SKINS: tuple[Colour, ...] = ((246, 208, 177), (233, 178, 139), (198, 134, 94), (150, 96, 62), (98, 62, 42))
_HAIRS: tuple[Colour, ...] = ((28, 22, 20), (64, 40, 24), (120, 76, 36), (206, 164, 84), (150, 150, 152), (140, 52, 28))


class Body:
    """The body with id `number`. The target domain's people are built like people, the others like toys.

    Lengths and radii are in world units; a grown person is about 1 high.
    """

    def __init__(self, seed: int, domain: str, number: int) -> None:
        draw = stream(seed, "body", number)
        real = domain == "target"
        size = between(draw, 0.92, 1.08)
        build = between(draw, 0.8, 1.3) if real else between(draw, 0.9, 1.1)
        self.head = size * (between(draw, 0.062, 0.072) if real else between(draw, 0.088, 0.105))  # radius
        leg = size * (between(draw, 0.45, 0.5) if real else between(draw, 0.39, 0.44))
        arm = size * (between(draw, 0.3, 0.36) if real else between(draw, 0.28, 0.33))
        thigh, upper_arm = between(draw, 0.49, 0.54), between(draw, 0.5, 0.56)  # shares
        self.thigh, self.shin = leg * thigh, leg * (1 - thigh)
        self.upper_arm, self.forearm = arm * upper_arm, arm * (1 - upper_arm)
        skin = _SKINS[pick(draw, len(_SKINS))]
        hue = between(draw, 0, 1)
        self.shirt = hsv(hue, between(draw, 0.45, 0.95), between(draw, 0.55, 0.98))
        self.trousers = hsv(hue + between(draw, 0.25, 0.75), between(draw, 0.2, 0.8), between(draw, 0.2, 0.65))
        self.pattern = scaled(self.shirt, 0.5) if between(draw, 0, 1) < 0.5 else (240, 236, 226)  # of the stripes
        self.torso = size * (between(draw, 0.27, 0.31) if real else between(draw, 0.26, 0.29))
        self.hip = size * 0.065 * build  # half the distance between the hip joints
        self.shoulder = (
            size * between(draw, 0.125, 0.145) * (0.6 + 0.4 * build)
        )  # half that between the shoulder joints
        self.neck = size * between(draw, 0.02, 0.035)
        # Radius of an upper arm; the other limbs are multiples of it.
        self.limb = size * (0.05 * build if real else between(draw, 0.056, 0.066))
        self.girth = size * 0.075 * build  # radius of the torso's sides
        self.skin = varied(draw, skin, 0.05)
        self.hair = varied(draw, _HAIRS[pick(draw, len(_HAIRS))], 0.06)
        self.shoes = hsv(between(draw, 0, 1), between(draw, 0, 0.6), between(draw, 0.1, 0.9))
        self.long_sleeves, self.long_trousers = between(draw, 0, 1) < 0.5, between(draw, 0, 1) < 0.65
        self.long_hair = between(draw, 0, 1) < 0.4
        self.stripes = pick(draw, 4) if real else 0  # across the shirt
        self.banded = real and between(draw, 0, 1) < 0.5  # bands around sleeves and trouser legs
        self.shaded = real  # limbs have a lit side


# ---- joints -------------------------------------------------------------------------------------------------------


def joints(body: Body, spec: VideoSpec) -> Array:
    """Return joint positions in world units, float64 (T, len(JOINTS), 3): x to the right, y up, z to the camera."""
    # The stance, which no action moves. Half turned: from the front, forward motion could not be seen.
    draw = spec.stream("stance")
    yaw = between(draw, 0.35, 0.95) * (1 if draw.uniform() < 0.5 else -1)  # heading, radians; 0 faces the camera
    twist = between(draw, 0.0, 1.0)  # of the upper arms about themselves, radians
    x = between(draw, -0.16, 0.16)
    angle = _angles(spec.channels())
    place: dict[str, Array] = {"pelvis": np.zeros((spec.frames, 3))}

    def rows(vector: Array) -> Array:
        return np.broadcast_to(vector, (spec.frames, 3))

    def upper(vector: Array) -> Array:  # moves with the torso
        return _rotate(rows(vector), "x", angle["bow"])

    place["chest"] = upper(_UP * body.torso)
    place["neck"] = upper(_UP * (body.torso + body.neck))
    skull = body.torso + body.neck + 0.95 * body.head
    place["head"] = upper(_UP * skull)
    place["face"] = upper(_UP * (skull - 0.16 * body.head) + _FORWARD * 0.36 * body.head)
    for side, sign in (("left", 1.0), ("right", -1.0)):
        abduction = sign * angle["abduction"]
        shoulder = upper(np.array([sign * body.shoulder, body.torso - 0.3 * body.limb, 0.0]))
        arm = upper(_rotate(rows(_DOWN), "z", abduction))
        bent = _rotate(_rotate(rows(_DOWN), "x", -_ELBOW), "y", -sign * twist)
        lower_arm = upper(_rotate(bent, "z", abduction))
        place[f"{side}_shoulder"] = shoulder
        place[f"{side}_elbow"] = shoulder + body.upper_arm * arm
        place[f"{side}_hand"] = place[f"{side}_elbow"] + body.forearm * lower_arm
        spread, hip, knee = sign * _SPREAD, -angle[f"{side}_hip"], angle[f"{side}_knee"]
        socket = rows(np.array([sign * body.hip, -0.2 * body.girth, 0.0]))
        place[f"{side}_hip"] = socket
        place[f"{side}_knee"] = socket + body.thigh * _rotate(_rotate(rows(_DOWN), "x", hip), "z", spread)
        shin = _rotate(_rotate(rows(_DOWN), "x", hip + knee), "z", spread)
        place[f"{side}_ankle"] = place[f"{side}_knee"] + body.shin * shin
        place[f"{side}_toe"] = place[f"{side}_ankle"] + np.array([0.25 * sign, -0.12, 1.0]) * 1.6 * body.limb
    positions = np.stack([place[name] for name in JOINTS], axis=1)  # (T, J, 3)
    positions = _rotate(positions, "y", yaw)
    # The lower foot is on the ground, unless the person jumps.
    lowest = np.minimum(place["left_ankle"][:, 1], place["right_ankle"][:, 1])
    positions[:, :, 0] += (x + angle["step"])[:, None]
    positions[:, :, 1] += (_SOLE - lowest + angle["lift"])[:, None]
    return positions


def _angles(motion: Array) -> dict[str, Array]:
    """Return joint angles (radians), lift and step (world units), each (T,), from channel values (T, len(ACTIONS)).

    Each is linear in one channel, but those of hips and knees in two: they bend together by `squat`, in turn by `march`.
    """
    value = {name: motion[:, number] for number, name in enumerate(ACTIONS)}
    bend, step_up, lift = (0.5 + 0.5 * value[name] for name in ("squat", "march", "jump"))  # 0 … 1
    degrees = {
        "abduction": 68 + 58 * value["raise_arms"],
        "left_hip": 50 * bend + 52 * step_up,
        "right_hip": 50 * bend + 52 * (1 - step_up),
        "left_knee": 90 * bend + 52 * step_up,
        "right_knee": 90 * bend + 52 * (1 - step_up),
        "bow": 24 + 27 * value["bow"],
    }
    return {name: np.radians(angle) for name, angle in degrees.items()} | {
        "lift": 0.21 * lift,
        "step": 0.27 * value["sidestep"],
    }


def _rotate(vector: Array, axis: str, angle: Array | float) -> Array:
    """Rotate vectors (..., 3) about an axis by angles (...), right-handed."""
    first, second = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[axis]
    rotated = vector.copy()
    rotated[..., first] = vector[..., first] * np.cos(angle) - vector[..., second] * np.sin(angle)
    rotated[..., second] = vector[..., first] * np.sin(angle) + vector[..., second] * np.cos(angle)
    return rotated


# ---- drawing ------------------------------------------------------------------------------------------------------


class _Stroke(NamedTuple):
    """A rounded stroke between two points, each given as (joint, joint, share of the way from one to the other)."""

    start: tuple[str, str, float]
    end: tuple[str, str, float]
    radius: tuple[float, float]
    colour: Colour
    depth: tuple[str, str]  # its depth is that of the middle of these two joints
    nearer: float = 0.0  # world units added to that
    shift: float = 0.0  # towards the light, in world units


def _strokes(body: Body) -> list[_Stroke]:
    """Return all strokes of a body."""
    strokes: list[_Stroke] = []

    def limb(start: str, end: str, first: float, last: float, colour: Colour, cloth: bool, nearer: float = 0.0) -> None:
        ends, depth = ((start, end, 0.0), (start, end, 1.0)), (start, end)
        strokes.append(_Stroke(*ends, (first, last), colour, depth, nearer))
        if body.banded and cloth:
            for at in (0.3, 0.7):
                band = (start, end, at - 0.04), (start, end, at + 0.04)
                strokes.append(_Stroke(*band, (0.95 * first, 0.95 * last), body.pattern, depth, nearer + 0.001))
        if body.shaded:
            lit, thin = scaled(colour, 1.25), (0.3 * first, 0.3 * last)
            strokes.append(_Stroke(*ends, thin, lit, depth, nearer + 0.002, 0.4 * first))

    def ball(joint: str, radius: float, colour: Colour, nearer: float, other: str | None = None) -> None:
        point = (joint, joint, 0.0)
        strokes.append(_Stroke(point, point, (radius, radius), colour, (joint, other or joint), nearer))

    sleeve = body.shirt if body.long_sleeves else body.skin
    leg = body.trousers if body.long_trousers else body.skin
    wide, girth, head = body.limb, body.girth, body.head
    for side in ("left", "right"):
        shoulder, elbow, hand = f"{side}_shoulder", f"{side}_elbow", f"{side}_hand"
        hip, knee, ankle, toe = f"{side}_hip", f"{side}_knee", f"{side}_ankle", f"{side}_toe"
        limb(ankle, toe, 0.8 * wide, 0.6 * wide, body.shoes, False)
        limb(knee, ankle, 1.05 * wide, 0.75 * wide, leg, body.long_trousers, 0.003)
        limb(hip, knee, 1.5 * wide, 1.1 * wide, body.trousers, True, 0.006)
        limb(shoulder, elbow, 1.05 * wide, 0.85 * wide, body.shirt, True, 0.012)
        limb(elbow, hand, 0.8 * wide, 0.65 * wide, sleeve, body.long_sleeves, 0.006)
        ball(hand, 0.85 * wide, body.skin, 0.009, elbow)

    trunk, hips = ("chest", "pelvis"), ("left_hip", "right_hip")
    strokes.append(_Stroke((*hips, 0.0), (*hips, 1.0), (girth, girth), body.trousers, trunk))
    for across in (0.12, 0.5, 0.88):  # two sides and a middle, so that it narrows when seen from the side
        top = ("left_shoulder", "right_shoulder", across)
        strokes.append(_Stroke(top, (*hips, across), (girth, 0.9 * girth), body.shirt, trunk, 0.01))
    for number in range(body.stripes):
        height = 0.1 + 0.75 * (number + 0.5) / body.stripes
        left, right = ("left_shoulder", "left_hip", height), ("right_shoulder", "right_hip", height)
        strokes.append(_Stroke(left, right, (0.3 * girth, 0.3 * girth), body.pattern, trunk, 0.011))
    throat = ("neck", "head", 0.0), ("neck", "chest", 1.0)
    strokes.append(_Stroke(*throat, (0.4 * head, 0.4 * head), scaled(body.skin, 0.85), ("neck", "neck")))
    ball("head", head, body.hair, 0.03)
    ball("face", 0.82 * head, body.skin, 0.03)
    if body.long_hair:  # from behind the head, seen from the face
        tail = ("face", "head", 1.5), ("head", "neck", 1.3)
        strokes.append(_Stroke(*tail, (0.75 * head, 0.6 * head), body.hair, ("head", "head"), 0.028))
    return strokes


class Figure:
    """A person ready to be drawn: for each frame, polygons in world units, the farthest first."""

    def __init__(self, body: Body, joints: Array) -> None:
        strokes = _strokes(body)

        def positions(names: Iterable[str]) -> Array:
            return joints[:, [JOINTS.index(name) for name in names]]

        def points(ends: Sequence[tuple[str, str, float]]) -> Array:
            first, second, share = zip(*ends, strict=True)
            start = positions(first)
            return start + np.array(share)[:, None] * (positions(second) - start)

        start, end, radius, self._colours, depth, nearer, shift = zip(*strokes, strict=True)
        light = np.array(shift)[:, None] * np.array([-0.7, 0.7])
        first, last = points(start)[:, :, :2] + light, points(end)[:, :, :2] + light
        self._polygons = _capsules(first, last, np.array(radius))  # (T, strokes, 14, 2)
        near, far = zip(*depth, strict=True)
        depths = 0.5 * (positions(near)[:, :, 2] + positions(far)[:, :, 2]) + np.array(nearer)
        self._order = np.argsort(depths, axis=1, kind="stable")  # (T, strokes)

    def draw(self, pen: Pen, frame: int) -> None:
        pixels = (self._polygons[frame] - (pen.left, pen.top)) * (pen.scale, -pen.scale)  # (strokes, 14, 2)
        flat = pixels.reshape(len(pixels), -1).tolist()
        for number in self._order[frame]:
            pen.draw.polygon(flat[number], fill=self._colours[number])


def _capsules(start: Array, end: Array, radius: Array) -> Array:
    """Return strokes from start to end (T, N, 2) with round ends of radius (N, 2), as polygons (T, N, 14, 2)."""
    along = end - start
    heading = np.arctan2(along[..., 1], along[..., 0])[..., None]  # (T, N, 1)
    halves = []
    for center, size, turn in ((end, radius[:, 1], 0.0), (start, radius[:, 0], np.pi)):
        arc = heading + turn + _ARC
        halves.append(center[:, :, None] + size[:, None, None] * np.stack([np.cos(arc), np.sin(arc)], axis=-1))
    return np.concatenate(halves, axis=2)
