"""Places: the types there are, and how one is painted, larger than any view of it so that a camera can move."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from omnivision_demo import props
from omnivision_demo.camera import MARGIN_X, MARGIN_Y, Camera, Pen
from omnivision_demo.draws import Colour, between, pick, scaled, stream, varied


@dataclass(frozen=True)
class _Type:
    """A type of place: colours from the top of the picture down, what stands there, and what moves there."""

    sky: Colour
    haze: Colour
    far_ground: Colour
    near_ground: Colour
    behind: tuple[props.Prop, ...]  # painted in this order across the whole width
    things: tuple[props.Prop, ...]  # some of them, here and there
    movers: tuple[str, ...]


_TYPES: dict[str, _Type] = {
    "living_room": _Type(
        *((214, 196, 168), (226, 210, 184), (150, 104, 66), (176, 126, 82)),
        *((props.wallpaper, props.window), (props.sofa, props.picture, props.plant, props.shelf), ("lamp", "ball")),
    ),
    "gym": _Type(
        *((156, 178, 192), (178, 196, 206), (206, 142, 74), (226, 164, 92)),
        *((props.wall_bars, props.court_lines), (props.mat, props.bench, props.picture), ("ball",)),
    ),
    "street": _Type(
        *((168, 196, 222), (206, 218, 226), (112, 112, 118), (90, 90, 96)),
        *((props.houses, props.pavement), (props.lamp_post, props.fir, props.sign), ("car", "bird")),
    ),
    "park": _Type(
        *((110, 178, 236), (190, 222, 242), (104, 164, 70), (126, 190, 82)),
        *((props.hills,), (props.tree, props.bench, props.tree, props.flowers), ("ball", "cloud")),
    ),
    "beach": _Type(
        *((92, 186, 232), (186, 230, 244), (226, 204, 150), (244, 224, 172)),
        *((props.sun, props.sea), (props.parasol, props.palm, props.stone), ("cloud", "bird", "ball")),
    ),
    "mountains": _Type(
        *((104, 156, 214), (206, 222, 238), (92, 128, 76), (116, 146, 88)),
        *((props.peaks, props.hills), (props.fir, props.stone, props.fir), ("cloud", "bird")),
    ),
    "stage": _Type(
        *((66, 16, 30), (98, 24, 40), (92, 62, 44), (122, 84, 58)),
        *((props.curtain, props.spotlights), (props.sign, props.lamp_post), ("lamp",)),
    ),
    "forest": _Type(
        *((44, 84, 66), (88, 132, 96), (62, 86, 48), (84, 102, 58)),
        *((props.trunks,), (props.fir, props.stone, props.tree, props.flowers), ("bird",)),
    ),
    "desert": _Type(
        *((240, 164, 96), (250, 212, 150), (206, 140, 78), (226, 166, 98)),
        *((props.sun, props.dunes), (props.cactus, props.stone, props.cactus), ("bird", "cloud")),
    ),
    "snow": _Type(
        *((172, 192, 214), (220, 228, 238), (226, 232, 242), (242, 246, 250)),
        *((props.peaks,), (props.fir, props.fir, props.snowman), ("cloud", "bird")),
    ),
    "night": _Type(
        *((16, 20, 52), (50, 46, 96), (52, 52, 70), (40, 40, 56)),
        *((props.stars, props.lit_houses, props.pavement), (props.lamp_post, props.sign), ("car",)),
    ),
    "kitchen": _Type(
        *((206, 222, 214), (222, 234, 226), (168, 172, 178), (190, 194, 200)),
        *((props.tiles, props.cupboards), (props.shelf, props.window, props.picture), ("lamp",)),
    ),
}
PLACE_TYPES = tuple(_TYPES)


@dataclass(frozen=True)
class Place:
    """One place: its type with its own colours, horizon and choice of things."""

    kind: int
    sky: Colour
    haze: Colour
    far_ground: Colour
    near_ground: Colour
    horizon: float  # world units above the feet
    things: tuple[tuple[int, float], ...]  # which of the type's things, and at which x
    mover: str | None
    mover_x: float
    texture: float  # contrast of the grain of walls, ground and things


def place_type(number: int) -> int:
    """The type, an index into PLACE_TYPES, of the place with id `number`."""
    return number % len(PLACE_TYPES)


def place(seed: int, domain: str, number: int) -> Place:
    """The place with id `number`; bare in the synthetic domain, cluttered and grainy in the target domain."""
    draw = stream(seed, "place", number)
    kind = place_type(number)
    template = _TYPES[PLACE_TYPES[kind]]
    least, most = {"synthetic": (0, 1), "nohuman": (2, 3), "target": (3, 5)}[domain]
    spots = np.linspace(-1.05, 1.05, most + 1)
    draw.shuffle(spots)
    chance = {"synthetic": 0.0, "nohuman": 1.0, "target": 0.5}[domain]
    moves = draw.uniform() < chance
    mover = template.movers[pick(draw, len(template.movers))]
    colours = (template.sky, template.haze, template.far_ground, template.near_ground)
    sky, haze, far_ground, near_ground = (varied(draw, colour, 0.09) for colour in colours)
    count = int(draw.integers(least, most + 1))
    return Place(
        kind=kind,
        sky=sky,
        haze=haze,
        far_ground=far_ground,
        near_ground=near_ground,
        horizon=between(draw, 0.2, 0.42),
        things=tuple((pick(draw, len(template.things)), float(x + draw.uniform(-0.12, 0.12))) for x in spots[:count]),
        mover=mover if moves else None,
        mover_x=between(draw, -0.6, 0.6),
        texture={"synthetic": 0.0, "nohuman": 0.06, "target": 0.12}[domain] * between(draw, 0.7, 1.3),
    )


def paint(seed: int, number: int, place: Place, camera: Camera) -> Image.Image:
    """The place as RGB picture: the camera's view, oversampled, with the margins that the camera can pan to."""
    draw = stream(seed, "paint", number)
    template = _TYPES[PLACE_TYPES[place.kind]]
    left, right = -camera.half_width - MARGIN_X, camera.half_width + MARGIN_X
    low, top = camera.low - MARGIN_Y, camera.low + camera.view + MARGIN_Y
    size = int(np.ceil(camera.scale * (right - left))) + 2, int(np.ceil(camera.scale * (top - low))) + 2
    heights = [top, place.horizon + 0.001, place.horizon, low]
    colours = np.array([place.sky, place.haze, place.far_ground, place.near_ground], dtype=np.float64)
    y = np.linspace(top, low, size[1])
    column = np.stack([np.interp(-y, [-height for height in heights], channel) for channel in colours.T], axis=1)
    picture = Image.fromarray(np.broadcast_to(column[:, None], (size[1], size[0], 3)).astype(np.uint8))
    pen = Pen(picture, camera.scale, left, top)
    # Every prop has a stream of its own: a camera that sees less of the world still sees the same world.
    for order, prop in enumerate(template.behind):
        prop(pen, stream(seed, "prop", number, order), 0.0, place.horizon, place.haze)
    for order, (which, x) in enumerate(place.things):
        template.things[which](
            pen, stream(seed, "thing", number, order), x, place.horizon, scaled(place.near_ground, 0.8)
        )
    if place.texture:
        picture = picture.filter(ImageFilter.BoxBlur(1))
        picture = _grained(picture, place.texture, draw)
    return picture


def _grained(picture: Image.Image, contrast: float, generator: np.random.Generator) -> Image.Image:
    """`picture` with its brightness varied by noise of several sizes, as bricks, grass or cloth would."""
    width, height = picture.size
    grain: NDArray[np.float32] = np.zeros((height, width), np.float32)
    for cell in (2, 5, 14, 40):
        coarse = generator.normal(0, 1, (height // cell + 2, width // cell + 2)).astype(np.float32)
        grain += np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR))
    shaded = np.asarray(picture) * (1 + np.float32(contrast / 2) * grain)[:, :, None]
    return Image.fromarray(np.clip(shaded, 0, 255).astype(np.uint8))
