"""From a video's spec to its frames."""

import numpy as np
from numpy.typing import NDArray

from omnivision_demo.camera import MARGIN_X, MARGIN_Y, OVERSAMPLING, Camera, Pen
from omnivision_demo.draws import between, hsv
from omnivision_demo.person import Body, Figure, joints
from omnivision_demo.places import Place
from omnivision_demo.props import draw_mover
from omnivision_demo.spec import VideoSpec


def render(spec: VideoSpec, person: bool | None = None) -> NDArray[np.uint8]:
    """Return the video's frames, RGB, uint8 (T, H, W, 3).

    person: whether its person is visible; without, exactly the same place is left, as if inpainted. By default nobody is in the
    videos of the domain `nohuman`.
    """
    if person is None:
        person = spec.domain != "nohuman"
    camera = Camera(spec.seed, spec.domain, spec.camera)
    place = Place(spec.seed, spec.domain, spec.place)
    draw = spec.stream("setting")
    corners = camera.path(spec.frames, spec.fps, draw)
    mover_phase, mover_colour = between(draw, 0, 1), hsv(between(draw, 0, 1), 0.7, 0.85)
    world = place.paint(camera)
    body = Body(spec.seed, spec.domain, spec.body)
    pose = joints(body, spec)
    figure = Figure(body, pose)

    width, height = OVERSAMPLING * camera.width, OVERSAMPLING * camera.height
    video = np.empty((spec.frames, camera.height, camera.width, 3), np.uint8)
    for t, (column, row) in enumerate(corners.tolist()):
        image = world.crop((column, row, column + width, row + height))
        left = -camera.half_width - MARGIN_X + column / camera.scale
        top = camera.low + camera.view + MARGIN_Y - row / camera.scale
        pen = Pen(image, camera.scale, left, top)
        if place.mover is not None:
            draw_mover(pen, place.mover, place.mover_x, place.horizon, mover_colour, t / spec.fps, mover_phase)
        if person:
            pen.shadow(float(pose[t, 0, 0]), 0.0, 0.2, 0.3)
            figure.draw(pen, t)
        video[t] = np.asarray(image.reduce(OVERSAMPLING))
    if spec.domain != "synthetic":
        camera.develop(video, spec.fps, draw)
    return video
