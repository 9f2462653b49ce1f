"""From channel values to joints: forward kinematics of the articulated person, all frames at once."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from omnivision_demo.actions import ACTIONS
from omnivision_demo.body import Body
from omnivision_demo.draws import between, stream

Array = NDArray[np.float64]

JOINTS = (
    *("pelvis", "chest", "neck", "head", "face"),
    *("left_shoulder", "left_elbow", "left_hand", "left_hip", "left_knee", "left_ankle", "left_toe"),
    *("right_shoulder", "right_elbow", "right_hand", "right_hip", "right_knee", "right_ankle", "right_toe"),
)
_SOLE = 0.022  # height of the ankle above the ground
_DOWN, _UP, _FORWARD = np.array([0.0, -1.0, 0.0]), np.array([0.0, 1.0, 0.0]), np.array([0.0, 0.0, 1.0])


@dataclass(frozen=True)
class Stance:
    """What a video draws of its person that no action ever moves."""

    yaw: float  # heading, radians; 0 faces the camera
    twist: float  # of the upper arms about themselves, radians: where bent forearms point
    x: float  # where the person stands


def stance(seed: int, domain: str, split: str, index: int) -> Stance:
    """The stance of one video's person; independent of its label."""
    draw = stream(seed, "stance", domain, split, index)
    # Half turned: seen straight from the front, what moves forwards would not be seen to move.
    yaw = between(draw, 0.35, 0.95) * (1 if draw.uniform() < 0.5 else -1)
    return Stance(yaw=yaw, twist=between(draw, 0.0, 1.0), x=between(draw, -0.16, 0.16))


def angles(motion: Array) -> dict[str, Array]:
    """Joint angles (radians), lift and step (world units), each (T,), from channel values (T, len(ACTIONS)).

    Every one is linear in one channel, or in two that share it equally, so each channel is free of the others.
    """
    value = {name: motion[:, number] for number, name in enumerate(ACTIONS)}
    half = {name: 0.5 + 0.5 * channel for name, channel in value.items()}  # 0 … 1
    bend, step_up = half["squat"], half["march"]
    return {
        "abduction": np.radians(68 + 58 * value["raise_arms"]),
        "left_swing": np.radians(8 + 55 * value["swing_arms"]),
        "right_swing": np.radians(8 - 55 * value["swing_arms"]),
        "left_elbow": np.radians(78 + 38 * (value["curl_arms"] + value["punch"])),
        "right_elbow": np.radians(78 + 38 * (value["curl_arms"] - value["punch"])),
        "spread": np.radians(19 + 17 * value["straddle"]),
        "left_hip": np.radians(50 * bend + 52 * step_up),
        "right_hip": np.radians(50 * bend + 52 * (1 - step_up)),
        "left_knee": np.radians(90 * bend + 52 * step_up),
        "right_knee": np.radians(90 * bend + 52 * (1 - step_up)),
        "bow": np.radians(24 + 27 * value["bow"]),
        "sway": np.radians(25 * value["sway"]),
        "lift": 0.21 * half["jump"],
        "step": 0.27 * value["sidestep"],
        "turn": np.radians(55 * value["turn"]),
    }


def joints(body: Body, motion: Array, stance: Stance) -> Array:
    """Joint positions in world units, float64 (T, len(JOINTS), 3): x to the right, y up, z to the camera."""
    angle = angles(motion)
    frames = len(motion)
    place: dict[str, Array] = {"pelvis": np.zeros((frames, 3))}

    def upper(vector: Array) -> Array:  # what the torso carries along
        return _about_z(_about_x(vector, angle["bow"]), angle["sway"])

    def rows(vector: Array) -> Array:
        return np.broadcast_to(vector, (frames, 3))

    place["chest"] = upper(rows(_UP * body.torso))
    place["neck"] = upper(rows(_UP * (body.torso + body.neck)))
    skull = body.torso + body.neck + 0.95 * body.head
    place["head"] = upper(rows(_UP * skull))
    place["face"] = upper(rows(_UP * (skull - 0.16 * body.head) + _FORWARD * 0.36 * body.head))
    for side, sign in (("left", 1.0), ("right", -1.0)):
        abduction, swing, elbow = sign * angle["abduction"], -angle[f"{side}_swing"], -angle[f"{side}_elbow"]
        inward = np.full(frames, -sign * stance.twist)
        shoulder = upper(rows(np.array([sign * body.shoulder, body.torso - 0.3 * body.limb, 0.0])))
        arm = upper(_about_z(_about_x(rows(_DOWN), swing), abduction))
        bent = _about_y(_about_x(rows(_DOWN), elbow), inward)
        lower_arm = upper(_about_z(_about_x(bent, swing), abduction))
        place[f"{side}_shoulder"] = shoulder
        place[f"{side}_elbow"] = shoulder + body.upper_arm * arm
        place[f"{side}_hand"] = place[f"{side}_elbow"] + body.forearm * lower_arm
        spread, hip, knee = sign * angle["spread"], -angle[f"{side}_hip"], angle[f"{side}_knee"]
        socket = rows(np.array([sign * body.hip, -0.2 * body.girth, 0.0]))
        place[f"{side}_hip"] = socket
        place[f"{side}_knee"] = socket + body.thigh * _about_z(_about_x(rows(_DOWN), hip), spread)
        shin = _about_z(_about_x(rows(_DOWN), hip + knee), spread)
        place[f"{side}_ankle"] = place[f"{side}_knee"] + body.shin * shin
        toe = np.array([0.25 * sign, -0.12, 1.0]) * 1.6 * body.limb
        place[f"{side}_toe"] = place[f"{side}_ankle"] + toe
    everything = np.stack([place[name] for name in JOINTS], axis=1)  # (T, J, 3)
    heading = stance.yaw + angle["turn"]
    everything = _about_y(everything, heading[:, None])
    # The lower foot stands on the ground, unless the person is in the air.
    lowest = np.minimum(place["left_ankle"][:, 1], place["right_ankle"][:, 1])
    everything[:, :, 0] += (stance.x + angle["step"])[:, None]
    everything[:, :, 1] += (_SOLE - lowest + angle["lift"])[:, None]
    return everything


# Rotations of vectors (..., 3) by angles (...), right-handed.


def _about_x(vector: Array, angle: Array) -> Array:
    x, y, z = np.moveaxis(vector, -1, 0)
    return np.stack([x, y * np.cos(angle) - z * np.sin(angle), y * np.sin(angle) + z * np.cos(angle)], axis=-1)


def _about_y(vector: Array, angle: Array) -> Array:
    x, y, z = np.moveaxis(vector, -1, 0)
    return np.stack([x * np.cos(angle) + z * np.sin(angle), y, z * np.cos(angle) - x * np.sin(angle)], axis=-1)


def _about_z(vector: Array, angle: Array) -> Array:
    x, y, z = np.moveaxis(vector, -1, 0)
    return np.stack([x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle), z], axis=-1)
