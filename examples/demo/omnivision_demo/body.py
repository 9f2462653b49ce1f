"""Bodies: how long and thick the limbs are, and what they wear."""

from dataclasses import dataclass

from omnivision_demo.draws import Colour, between, hsv, pick, scaled, stream, varied

_SKINS: tuple[Colour, ...] = ((246, 208, 177), (233, 178, 139), (198, 134, 94), (150, 96, 62), (98, 62, 42))
_HAIRS: tuple[Colour, ...] = ((28, 22, 20), (64, 40, 24), (120, 76, 36), (206, 164, 84), (150, 150, 152), (140, 52, 28))


@dataclass(frozen=True)
class Body:
    """One person. Lengths and radii in world units; a grown person is about 1 high."""

    thigh: float
    shin: float
    torso: float
    hip: float  # half the distance between the hip joints
    shoulder: float  # half the distance between the shoulder joints
    upper_arm: float
    forearm: float
    neck: float
    head: float  # radius
    limb: float  # radius of an upper arm; the other limbs are multiples of it
    girth: float  # radius of the torso's sides
    skin: Colour
    hair: Colour
    shirt: Colour
    trousers: Colour
    shoes: Colour
    pattern: Colour  # of the stripes
    long_sleeves: bool
    long_trousers: bool
    long_hair: bool
    stripes: int  # across the shirt
    banded: bool  # bands around sleeves and trouser legs
    shaded: bool  # limbs have a lit side


def body(seed: int, domain: str, number: int) -> Body:
    """The body with id `number`. The target domain's people are built like people, the others like toys."""
    draw = stream(seed, "body", number)
    real = domain == "target"
    size = between(draw, 0.92, 1.08)
    build = between(draw, 0.8, 1.3) if real else between(draw, 0.9, 1.1)
    head = size * (between(draw, 0.062, 0.072) if real else between(draw, 0.088, 0.105))
    leg = size * (between(draw, 0.45, 0.5) if real else between(draw, 0.39, 0.44))
    arm = size * (between(draw, 0.3, 0.36) if real else between(draw, 0.28, 0.33))
    thigh_share, upper_arm_share = between(draw, 0.49, 0.54), between(draw, 0.5, 0.56)
    skin = _SKINS[pick(draw, len(_SKINS))]
    hue = between(draw, 0, 1)
    shirt = hsv(hue, between(draw, 0.45, 0.95), between(draw, 0.55, 0.98))
    trousers = hsv(hue + between(draw, 0.25, 0.75), between(draw, 0.2, 0.8), between(draw, 0.2, 0.65))
    dark_stripes = between(draw, 0, 1) < 0.5
    return Body(
        thigh=leg * thigh_share,
        shin=leg * (1 - thigh_share),
        torso=size * (between(draw, 0.27, 0.31) if real else between(draw, 0.26, 0.29)),
        hip=size * 0.052 * build,
        shoulder=size * between(draw, 0.105, 0.125) * (0.6 + 0.4 * build),
        upper_arm=arm * upper_arm_share,
        forearm=arm * (1 - upper_arm_share),
        neck=size * between(draw, 0.02, 0.035),
        head=head,
        limb=size * (0.034 * build if real else between(draw, 0.029, 0.035)),
        girth=size * 0.058 * build,
        skin=varied(draw, skin, 0.05),
        hair=varied(draw, _HAIRS[pick(draw, len(_HAIRS))], 0.06),
        shirt=shirt,
        trousers=trousers,
        shoes=hsv(between(draw, 0, 1), between(draw, 0, 0.6), between(draw, 0.1, 0.9)),
        pattern=scaled(shirt, 0.5) if dark_stripes else (240, 236, 226),
        long_sleeves=between(draw, 0, 1) < 0.5,
        long_trousers=between(draw, 0, 1) < 0.65,
        long_hair=between(draw, 0, 1) < 0.4,
        stripes=pick(draw, 4) if real else 0,
        banded=real and between(draw, 0, 1) < 0.5,
        shaded=real,
    )
