"""Places: the types there are, and how one is painted, larger than any view of it so that a camera can move."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageFilter

from omnivision_demo import props
from omnivision_demo.camera import MARGIN_X, MARGIN_Y, Camera, Pen
from omnivision_demo.draws import between, pick, scaled, stream, varied
from omnivision_demo.spec import PLACE_TYPES

# Of each type: the colours of sky, haze, far ground and near ground; the props across the whole width, in this order; those of
# which some are placed here and there; and the movers, one of which may appear.
_TYPES = {
    "living_room": ("#d6c4a8 #e2d2b8 #966842 #b07e52", "wallpaper window", "sofa picture plant shelf", "lamp ball"),
    "gym": ("#9cb2c0 #b2c4ce #ce8e4a #e2a45c", "wall_bars court_lines", "mat bench picture", "ball"),
    "street": ("#a8c4de #cedae2 #707076 #5a5a60", "houses pavement", "lamp_post fir sign", "car bird"),
    "park": ("#6eb2ec #bedef2 #68a446 #7ebe52", "hills", "tree bench tree flowers", "ball cloud"),
    "beach": ("#5cbae8 #bae6f4 #e2cc96 #f4e0ac", "sun sea", "parasol palm stone", "cloud bird ball"),
    "mountains": ("#689cd6 #cedeee #5c804c #749258", "peaks hills", "fir stone fir", "cloud bird"),
    "stage": ("#42101e #621828 #5c3e2c #7a543a", "curtain spotlights", "sign lamp_post", "lamp"),
    "forest": ("#2c5442 #588460 #3e5630 #54663a", "trunks", "fir stone tree flowers", "bird"),
    "desert": ("#f0a460 #fad496 #ce8c4e #e2a662", "sun dunes", "cactus stone cactus", "bird cloud"),
    "snow": ("#acc0d6 #dce4ee #e2e8f2 #f2f6fa", "peaks", "fir fir snowman", "cloud bird"),
    "night": ("#101434 #322e60 #343446 #282838", "stars lit_houses pavement", "lamp_post sign", "car"),
    "kitchen": ("#ceded6 #deeae2 #a8acb2 #bec2c8", "tiles cupboards", "shelf window picture", "lamp"),
}


class Place:
    """The place with id `number`; with more things and grain in the target domain than in the synthetic one."""

    def __init__(self, seed: int, domain: str, number: int) -> None:
        self.seed, self.number = seed, number
        draw = stream(seed, "place", number)
        colours, behind, things, movers = (column.split() for column in _TYPES[PLACE_TYPES[number % len(PLACE_TYPES)]])
        self.behind = behind
        least, most = {"synthetic": (1, 3), "nohuman": (2, 3), "target": (2, 4)}[domain]
        spots = np.linspace(-1.05, 1.05, most + 1)
        draw.shuffle(spots)
        moves = draw.uniform() < {"synthetic": 0.3, "nohuman": 1.0, "target": 0.5}[domain]
        mover = movers[pick(draw, len(movers))]
        self.mover = mover if moves else None
        # Sky, haze, far ground and near ground.
        self.colours = [varied(draw, ImageColor.getrgb(colour)[:3], 0.09) for colour in colours]
        count = int(draw.integers(least, most + 1))
        self.horizon = between(draw, 0.2, 0.42)  # world units above the feet
        self.things = [(things[pick(draw, len(things))], float(x + draw.uniform(-0.12, 0.12))) for x in spots[:count]]
        self.mover_x = between(draw, -0.6, 0.6)
        # Contrast of the grain of walls, ground and things.
        self.texture = {"synthetic": 0.04, "nohuman": 0.06, "target": 0.1}[domain] * between(draw, 0.7, 1.3)

    def paint(self, camera: Camera) -> Image.Image:
        """Return the place as an RGB image: the camera's view, oversampled, with the margins that the camera can pan to."""
        left, right = -camera.half_width - MARGIN_X, camera.half_width + MARGIN_X
        low, top = camera.low - MARGIN_Y, camera.low + camera.view + MARGIN_Y
        width, height = (int(np.ceil(camera.scale * size)) + 2 for size in (right - left, top - low))
        depths = [-top, -self.horizon - 0.001, -self.horizon, -low]
        y = -np.linspace(top, low, height)
        column = np.stack([np.interp(y, depths, channel) for channel in np.array(self.colours, np.float64).T], axis=1)
        image = Image.fromarray(np.broadcast_to(column[:, None], (height, width, 3)).astype(np.uint8))
        pen = Pen(image, camera.scale, left, top)
        # Each prop has its own stream of draws: a camera that sees less of the world still sees the same world.
        for order, name in enumerate(self.behind):
            draw = stream(self.seed, "prop", self.number, order)
            getattr(props, name)(pen, draw, 0.0, self.horizon, self.colours[1])
        for order, (name, x) in enumerate(self.things):
            draw = stream(self.seed, "thing", self.number, order)
            getattr(props, name)(pen, draw, x, self.horizon, scaled(self.colours[3], 0.8))
        return _grained(image.filter(ImageFilter.BoxBlur(1)), self.texture, stream(self.seed, "paint", self.number))


def _grained(image: Image.Image, contrast: float, draw: np.random.Generator) -> Image.Image:
    """Vary the brightness of an image by noise of several sizes, as bricks, grass or cloth would."""
    width, height = image.size
    grain: NDArray[np.float32] = np.zeros((height, width), np.float32)
    for cell in (2, 5, 14, 40):
        coarse = draw.normal(0, 1, (height // cell + 2, width // cell + 2)).astype(np.float32)
        grain += np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR))
    shaded = np.asarray(image) * (1 + np.float32(contrast / 2) * grain)[:, :, None]
    return Image.fromarray(np.clip(shaded, 0, 255).astype(np.uint8))
