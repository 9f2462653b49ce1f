"""From a video's spec to its frames."""

import numpy as np
from numpy.typing import NDArray
from PIL import ImageDraw

from omnivision_demo import actions, figure, skeleton
from omnivision_demo.body import body
from omnivision_demo.camera import MARGIN_X, MARGIN_Y, OVERSAMPLING, Pen, camera, develop, path
from omnivision_demo.draws import between, hsv, stream
from omnivision_demo.movers import draw_mover
from omnivision_demo.places import paint, place
from omnivision_demo.spec import VideoSpec


def channels(spec: VideoSpec) -> NDArray[np.float64]:
    """The video's true motion: channel values, float64 (T, len(ACTIONS))."""
    draw = stream(spec.seed, "motion", spec.domain, spec.split, spec.index)
    return actions.motion(spec.label, spec.frames, spec.fps, draw)


def render(spec: VideoSpec, person: bool | None = None) -> NDArray[np.uint8]:
    """The video's frames, RGB, uint8 (T, H, W, 3).

    person: whether it shows its person. Without, exactly the same place is left, as if inpainted. By default
    the videos of the domain `nohuman` show nobody and the others do.
    """
    if person is None:
        person = spec.domain != "nohuman"
    seen_by = camera(spec.seed, spec.domain, spec.camera)
    where = place(spec.seed, spec.domain, spec.place)
    draw = stream(spec.seed, "setting", spec.domain, spec.split, spec.index)
    corners = path(seen_by, spec.frames, spec.fps, draw)
    mover_phase, mover_colour = between(draw, 0, 1), hsv(between(draw, 0, 1), 0.7, 0.85)
    world = paint(spec.seed, spec.place, where, seen_by)
    scale = seen_by.scale
    stance = skeleton.stance(spec.seed, spec.domain, spec.split, spec.index)
    who = body(spec.seed, spec.domain, spec.body)
    pose = skeleton.joints(who, channels(spec), stance) if person else None
    drawn = figure.outline(who, pose) if pose is not None else None

    width, height = OVERSAMPLING * seen_by.width, OVERSAMPLING * seen_by.height
    video = np.empty((spec.frames, seen_by.height, seen_by.width, 3), np.uint8)
    for t, (column, row) in enumerate(corners.tolist()):
        picture = world.crop((column, row, column + width, row + height))
        left = -seen_by.half_width - MARGIN_X + column / scale
        top = seen_by.low + seen_by.view + MARGIN_Y - row / scale
        pen = Pen(picture, scale, left, top)
        if where.mover is not None:
            draw_mover(pen, where.mover, where.mover_x, where.horizon, mover_colour, t / spec.fps, mover_phase)
        if pose is not None and drawn is not None:
            pen.shadow(float(pose[t, 0, 0]), 0.0, 0.2, 0.3)
            figure.draw(drawn, t, ImageDraw.Draw(picture), scale, left, top)
        video[t] = np.asarray(picture.reduce(OVERSAMPLING))
    if spec.domain != "synthetic":
        video = develop(seen_by, video, spec.fps, draw)
    return video
