"""Talking heads drawn from numbers: who it is, how the head and the mouth move, and where the mouth is.

A picture is a function of an *identity* (shape of head and features, age, colours, hair, clothes, light, background)
and of a *motion* (17 numbers a frame, `MOTION`). The shading is done by `face.cpp`, which is compiled once by the C++
compiler of the machine and kept in the user's cache. Results may differ in the last bits between processors.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from model.errors import UserError
from model.files import replacing
from model.machine import device_cache_dir

MOUTH = ("open", "wide", "round", "close", "lip_teeth", "tongue")
"""The numbers of the mouth, each 0 to 1: opening of the jaw, spread corners, rounded lips, pressed lips, lower lip
under the upper teeth, lifted tip of the tongue."""

MOTION = ("yaw", "pitch", "roll", "shift_x", "shift_y", "blink", "gaze_x", "gaze_y", "brow", "smile", *MOUTH, "breath")
"""The numbers of one frame. Yaw, pitch and roll are in radians, shifts in half widths of the picture, `blink` and
`smile` 0 to 1, gaze, brow and breath about -1 to 1. Positive yaw turns the face to the right of the picture, positive
pitch turns it down, and positive roll tilts the head to the left."""

_NUMBERS = (
    # place, shape and features of the head
    "scale", "offset_x", "offset_y", "head_width", "head_height", "head_depth", "jaw_width", "chin_width", "cheeks",
    "brow_ridge", "ear_size", "earring", "neck_width", "shoulder_y", "eye_x", "eye_y", "eye_width", "eye_height",
    "eye_tilt", "iris_size", "brow_y", "brow_thickness", "brow_arch", "brow_tilt", "brow_width", "nose_width",
    "nose_bottom", "nose_height", "mouth_y", "mouth_width", "lip_upper", "lip_lower",
    # skin
    "age", "wrinkles", "freckles", "blush", "makeup", "beard", "beard_width",
    # hair
    "hair_cover", "hair_top", "hair_side", "hair_square", "hair_rough", "hair_curl", "hair_wave", "hair_shine",
    "hairline", "recession", "temple", "parting", "sweep", "swept_back", "fringe", "sideburn", "lock_count",
    "hair_layers", "hair_length", "hair_flare", "hair_front", "bun", "bun_x", "tail",
    # glasses, clothes, light and background
    "glasses", "glasses_height", "glasses_thickness", "clothes_kind", "clothes_pattern", "light_x", "light_y",
    "light_warmth", "light_key", "rim", "scene", "textured",
)  # fmt: skip
_COLORS = (  # linear RGB
    "skin", "hair", "iris", "eye_white", "lip_inner", "lip_rim", "brow_color", "lash_color", "beard_color",
    "glasses_color", "clothes", "clothes_second", "wall", "wall_second",
)  # fmt: skip

FIELDS: dict[str, int] = {
    **dict.fromkeys(_NUMBERS, 1),
    **dict.fromkeys(_COLORS, 3),
    "background": 20,
    "phase": 12,
    "texture_scale": 3,
    "texture_color": 9,
}
"""Members of an identity and how many numbers each has, in the order in which the renderer reads them."""

# What the whole numbers of the members `scene`, `clothes_kind` and `clothes_pattern` mean, in order.
SCENES = ("wall", "window", "shelves", "plant")
CLOTHES_KINDS = ("crew_neck", "v_neck", "shirt", "hood", "jacket", "roll_neck")
PATTERNS = ("plain", "stripes", "checks", "knitted")

HEAD_CENTER_Y = 0.05  # height of the head's centre in the picture, -1 .. 1, before offsets

# Palettes in sRGB.
SKIN_TONES = (
    (0.99, 0.87, 0.80), (0.98, 0.84, 0.75), (0.97, 0.81, 0.71), (0.95, 0.78, 0.66), (0.91, 0.72, 0.58),
    (0.84, 0.64, 0.49), (0.74, 0.53, 0.39), (0.62, 0.43, 0.31), (0.50, 0.33, 0.23), (0.41, 0.27, 0.19),
)  # fmt: skip
DARK_HAIR = ((0.10, 0.08, 0.07), (0.17, 0.12, 0.09), (0.13, 0.12, 0.14), (0.24, 0.16, 0.11))
LIGHT_HAIR = (
    (0.34, 0.21, 0.12), (0.50, 0.32, 0.17), (0.74, 0.56, 0.32),
    (0.86, 0.72, 0.48), (0.58, 0.25, 0.11), (0.44, 0.27, 0.16),
)  # fmt: skip
IRIS = (
    (0.28, 0.16, 0.09), (0.38, 0.24, 0.12), (0.22, 0.42, 0.55),
    (0.32, 0.48, 0.34), (0.42, 0.40, 0.22), (0.36, 0.46, 0.52),
)  # fmt: skip
CLOTHES = (
    (0.16, 0.22, 0.36), (0.45, 0.12, 0.14), (0.14, 0.34, 0.32), (0.80, 0.78, 0.74), (0.22, 0.22, 0.24),
    (0.76, 0.56, 0.24), (0.36, 0.26, 0.46), (0.55, 0.66, 0.74), (0.62, 0.38, 0.36), (0.30, 0.38, 0.24),
    (0.86, 0.60, 0.56), (0.30, 0.46, 0.66),
)  # fmt: skip
WALLS = (
    (0.55, 0.62, 0.68), (0.72, 0.66, 0.58), (0.32, 0.40, 0.46), (0.62, 0.68, 0.58), (0.78, 0.74, 0.72),
    (0.42, 0.36, 0.42), (0.26, 0.32, 0.30), (0.66, 0.54, 0.48), (0.46, 0.56, 0.70), (0.82, 0.79, 0.74),
)  # fmt: skip
FRAMES = ((0.18, 0.18, 0.20), (0.35, 0.22, 0.14), (0.50, 0.48, 0.45))

# Hair styles: each is a point in the same space of volumes, lengths and roughness. A pair is a range to draw from.
Style = dict[str, float | tuple[float, float]]
_ANY: Style = {
    "hair_cover": 1.0, "hair_top": (0.06, 0.11), "hair_side": (0.015, 0.035), "hair_square": (0.02, 0.14),
    "hair_rough": (0.6, 1.2), "hair_curl": 0.0, "hair_wave": 0.0, "hair_shine": 1.0, "hairline": (0.50, 0.58),
    "recession": 0.0, "temple": (0.90, 0.95), "parting": (-0.6, 0.6), "sweep": 0.0, "swept_back": 0.0, "fringe": 0.0,
    "sideburn": (0.06, 0.22), "lock_count": (9.0, 13.0), "hair_layers": 0.0, "hair_length": 0.0, "hair_flare": 0.0,
    "hair_front": 0.0, "bun": 0.0, "bun_x": 0.0, "tail": 0.0,
}  # fmt: skip
_CUT: Style = {"hair_layers": (0.8, 1.6), "lock_count": (11.0, 17.0)}
_LONG: Style = {
    "hair_length": (0.85, 1.25), "hair_side": (0.03, 0.06), "sideburn": 0.75, "temple": (0.80, 0.88),
    "sweep": (0.0, 0.8), "hair_flare": (-0.02, 0.08), "hair_front": (0.10, 0.17), "parting": (-0.45, 0.45),
    "hairline": (0.46, 0.55), "fringe": (0.7, 1.05),
}  # fmt: skip
_TIED: Style = {
    "hair_top": (0.04, 0.06), "hair_side": 0.012, "swept_back": 1.0, "sideburn": 0.12, "hair_rough": 0.35,
    "fringe": (0.6, 1.0),
}  # fmt: skip
_CURLY: Style = {
    "hair_curl": (0.8, 1.0), "hair_top": (0.10, 0.16), "hair_side": (0.04, 0.09), "hair_shine": 0.5, "hair_rough": 1.5,
}  # fmt: skip
_BALD: Style = {"recession": (2.0, 2.4), "hair_top": 0.01, "hair_side": 0.015, "hair_square": 0.0}
HAIR_STYLES: dict[str, Style] = {
    "long": _LONG,
    "wavy": _LONG | {"hair_wave": (0.5, 1.0), "hair_flare": (0.03, 0.12), "hair_rough": (0.9, 1.5)},
    "bob": _LONG | {"hair_length": (0.50, 0.72), "hair_front": 0.0, "hair_side": (0.05, 0.09),
                    "hair_flare": (-0.03, 0.05), "sideburn": (0.48, 0.62)},
    "tail": _TIED | {"tail": (0.09, 0.14)},
    "bun": _TIED | {"bun": (0.17, 0.23), "bun_x": (-0.05, 0.05)},
    "pixie": _CUT | {"fringe": (0.5, 0.9), "sweep": (0.2, 0.8), "hair_rough": (1.2, 2.0), "temple": (0.82, 0.90),
                     "sideburn": (0.2, 0.4)},
    "curly": _CURLY,
    "long curly": _CURLY | {"hair_length": (0.5, 1.0), "sideburn": 0.7, "temple": 0.84, "hair_side": (0.08, 0.13),
                            "hair_front": 0.12},
    "afro": {"hair_curl": 1.0, "hair_top": (0.12, 0.24), "hair_side": (0.07, 0.17), "hair_shine": 0.25,
             "hair_rough": 0.8, "temple": 0.88},
    "crop": _CUT,
    "side parting": _CUT | {"sweep": (0.7, 1.1), "hair_top": (0.08, 0.12), "temple": (0.86, 0.93)},
    "quiff": _CUT | {"swept_back": 0.8, "hair_top": (0.12, 0.17), "hair_side": 0.012, "hair_rough": (1.0, 1.8),
                     "hairline": (0.52, 0.58)},
    "fringe": _CUT | {"fringe": (0.4, 0.85), "hair_rough": (1.2, 2.2), "hair_top": (0.08, 0.12),
                      "temple": (0.84, 0.90)},
    "buzz": {"hair_cover": 0.82, "hair_top": 0.012, "hair_side": 0.004, "hair_rough": 0.1, "hair_curl": 0.8,
             "hair_shine": 0.2, "hair_square": 0.0},
    "receding": _CUT | {"recession": (0.4, 1.0), "hair_top": (0.03, 0.06), "swept_back": 0.6},
    "bald": _BALD | {"hair_cover": 0.0},
    "bald crown": _BALD,
}  # fmt: skip
_FEMININE = ("long", "long", "wavy", "wavy", "bob", "bob", "tail", "bun", "pixie", "long curly", "afro")
_MASCULINE = ("crop", "crop", "side parting", "side parting", "quiff", "buzz", "curly", "fringe", "afro")
_OLD_MASCULINE = (*_MASCULINE, "receding", "receding", "bald", "bald crown")
_FRINGE_SHARE = {"long": 0.3, "wavy": 0.3, "bob": 0.5, "tail": 0.35, "bun": 0.35}  # of these styles, others keep theirs
_CAN_CURL = ("long", "wavy", "bob", "pixie", "crop", "side parting", "quiff", "fringe")

Color = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Identity:
    """One person in one light before one background.

    `values` are the renderer's numbers, float32 [N], in the order of `FIELDS`; `skin_tone` is 0 for the lightest skin
    and 1 for the darkest. `identity["mouth_width"]` is a member of `FIELDS` that is one number.
    """

    values: NDArray[np.float32]
    skin_tone: float

    def __getitem__(self, name: str) -> float:
        return float(self.values[_NUMBERS.index(name)])


@dataclass(frozen=True)
class _Person:
    """What the parts of an identity have in common: skin tone and age 0 to 1, and who may wear which hair and beard."""

    tone: float
    age: float
    feminine: bool

    @property
    def young(self) -> float:
        """1 for a small child, 0 from adolescence on."""
        return max(1 - self.age / 0.18, 0.0)

    @property
    def old(self) -> float:
        """0 up to middle age, 1 for the oldest."""
        return max((self.age - 0.4) / 0.6, 0.0)


def _linear(color: ArrayLike) -> Color:
    """sRGB 0 to 1 as linear light."""
    return np.clip(np.asarray(color, np.float64), 0.02, 0.99) ** 2.2


def _pick(rng: np.random.Generator, palette: tuple[tuple[float, float, float], ...], jitter: float) -> Color:
    """One colour of a palette with random changes up to `jitter`, linear."""
    color = np.asarray(palette[rng.integers(len(palette))])
    return _linear(color + rng.uniform(-jitter, jitter, 3))


def _draw_hair(rng: np.random.Generator, person: _Person) -> dict[str, float]:
    """Numbers of a random hair style that suits the person."""
    u = rng.uniform
    styles = _FEMININE if person.feminine else _OLD_MASCULINE if person.age > 0.45 else _MASCULINE
    style = styles[rng.integers(len(styles))]
    ranges = _ANY | HAIR_STYLES[style]
    hair = {name: float(u(*value)) if isinstance(value, tuple) else value for name, value in ranges.items()}
    hair["tail"] *= rng.choice((-1, 1))
    if u() > _FRINGE_SHARE.get(style, 1.0):
        hair["fringe"] = 0.0
    if style in _CAN_CURL and u() < 0.55 * (person.tone - 0.4):
        hair |= {"hair_curl": u(0.6, 1.0), "hair_shine": 0.5, "hair_rough": 1.4}
    return hair


def _draw_shape(rng: np.random.Generator, person: _Person) -> dict[str, float]:
    """Place, shape and features of the head."""
    u, young, old = rng.uniform, person.young, person.old
    soft = 0.03 if person.feminine else -0.02
    scale, width, jaw = u(1.10, 1.20), u(0.465, 0.505), u(0.87, 1.03) - soft + 0.03 * old - 0.02 * young
    return {
        "scale": scale, "offset_x": u(-0.04, 0.04), "offset_y": u(-0.03, 0.04),
        "head_width": width, "head_height": width * u(1.31, 1.42) - 0.03 * young, "head_depth": u(0.54, 0.59),
        "jaw_width": jaw, "chin_width": u(0.80, 1.02) - soft,
        "cheeks": u(0.7, 1.3) + 0.9 * young - 0.2 * old,
        "brow_ridge": u(0.5, 1.0) if person.feminine else u(0.8, 1.6), "ear_size": u(0.9, 1.1) + 0.12 * old,
        "earring": u(0.020, 0.036) if person.feminine and person.age > 0.15 and u() < 0.5 else 0.0,
        "neck_width": u(0.54, 0.61) + (0.0 if person.feminine else 0.10) - 0.10 * young, "shoulder_y": u(-0.76, -0.70),
        "eye_x": u(0.405, 0.445), "eye_y": u(-0.05, 0.01) - 0.10 * young, "eye_width": u(0.21, 0.245) + 0.025 * young,
        "eye_height": u(0.074, 0.098) + 0.030 * young - 0.010 * old, "eye_tilt": u(-0.08, 0.14) - 0.06 * old,
        "iris_size": u(0.050, 0.055) + 0.010 * young,
        "brow_y": u(0.155, 0.20) + 0.01 * person.feminine, "brow_arch": u(0.02, 0.06), "brow_tilt": u(-0.14, 0.03),
        "brow_thickness": u(0.020, 0.032) if person.feminine else u(0.028, 0.046) - 0.012 * young,
        "brow_width": u(0.21, 0.25), "nose_width": u(0.85, 1.25) - 0.10 * young + 0.10 * person.tone,
        "nose_bottom": u(-0.37, -0.31) - 0.02 * young, "nose_height": u(0.9, 1.35) * (1 - 0.30 * young),
        # Mouths are about equally wide in pixels, so that spread lips can be told from a large mouth.
        "mouth_y": u(-0.605, -0.57), "mouth_width": u(0.194, 0.204) / (scale * width * jaw),
        "lip_upper": u(0.042, 0.066) + 0.012 * person.tone - 0.014 * old,
        "lip_lower": u(0.060, 0.088) + 0.012 * person.tone - 0.014 * old,
        "age": person.age, "wrinkles": old * u(0.8, 1.2),
    }  # fmt: skip


def _draw_lips(rng: np.random.Generator, tone: float, skin: Color, makeup: float) -> dict[str, ArrayLike]:
    """Colours of the lips.

    The rim of dark lips is about as dark as the skin around it and their inner part lighter and pinker, so that the
    mouth can be read in a small picture.
    """
    u = rng.uniform
    rim = skin * (0.82, 0.50, 0.50) * (1 - 0.42 * tone) + _linear((0.78, 0.36, 0.36)) * (0.24 + 0.06 * makeup)
    inner = skin * (0.45, 0.26, 0.26) + _linear((0.80, 0.38, 0.40)) * (0.55 - 0.05 * tone)
    lipstick = _linear((u(0.55, 0.8), u(0.08, 0.25), u(0.15, 0.32)))
    share = u(0.3, 0.7) if makeup > 0.65 else 0.0
    return {
        "lip_rim": rim * (1 - share) + 0.8 * lipstick * share,
        "lip_inner": inner * (1 - share) + lipstick * share,
    }


def _draw_colors(rng: np.random.Generator, person: _Person) -> dict[str, ArrayLike]:
    """Colours of skin, lips, hair and eyes, make-up, freckles and beard."""
    u, tone = rng.uniform, person.tone
    place = tone * (len(SKIN_TONES) - 1)
    tones = np.arange(len(SKIN_TONES))
    skin = _linear([np.interp(place, tones, channel) for channel in zip(*SKIN_TONES, strict=True)] + u(-0.02, 0.02, 3))
    hair = _pick(rng, DARK_HAIR if u() < tone * 1.3 + 0.15 else LIGHT_HAIR, 0.02)
    grey = float(np.clip((person.age - 0.45) * 2.2 + u(-0.4, 0.2), 0, 1)) if person.age > 0.45 else 0.0
    hair = hair * (1 - grey) + _linear(u(0.55, 0.86) + np.asarray((0.01, 0.0, -0.01))) * grey
    makeup = u(0.2, 0.9) if person.feminine and person.age > 0.15 else 0.0
    return {
        "skin": skin, "hair": hair, "iris": _pick(rng, IRIS if tone < 0.6 else IRIS[:2], 0.03),
        "brow_color": (hair * 0.5 + 0.15 * skin * (1 - tone)) * (1 - 0.25 * grey) + 0.002,
        "lash_color": hair * 0.10 + 0.004, "beard_color": hair * 0.8 + skin * 0.06,
        "eye_white": np.asarray((0.80, 0.77, 0.76)) * (1 - 0.22 * tone), "makeup": makeup,
        "blush": (u(0.30, 0.60) + 0.15 * person.young) * (1 - 0.4 * tone) + 0.25 * makeup * (1 - tone),
        "freckles": u(0.2, 0.5) if u() < 0.15 and tone < 0.6 else 0.0,
        "beard": u(0.25, 0.9) if not person.feminine and person.age > 0.2 and u() < 0.45 else 0.0,
        "beard_width": u(0.25, 0.40) if u() < 0.2 else 1.2,
        # The key light is stronger on dark skin, as a photographer would set it.
        "light_key": u(0.88, 1.12) * (1 - 0.12 * skin.mean()) + 0.12 * tone,
        **_draw_lips(rng, tone, skin, makeup),
    }  # fmt: skip


def _draw_scene(rng: np.random.Generator, person: _Person) -> dict[str, ArrayLike]:
    """Glasses, clothes, light and background, and the seeds of all noise."""
    u = rng.uniform
    return {
        "glasses": float(u() < 0.16 + 0.2 * person.old), "glasses_height": u(0.16, 0.24),
        "glasses_thickness": u(0.06, 0.11), "glasses_color": _pick(rng, FRAMES, 0.0),
        "clothes": _pick(rng, CLOTHES, 0.05), "clothes_second": _pick(rng, CLOTHES, 0.05),
        "clothes_kind": rng.integers(len(CLOTHES_KINDS)),
        "clothes_pattern": rng.choice(len(PATTERNS), p=(0.6, 0.14, 0.12, 0.14)),
        "wall": _pick(rng, WALLS, 0.06), "wall_second": _pick(rng, WALLS, 0.06), "scene": rng.integers(len(SCENES)),
        "light_x": u(0.2, 0.85) * rng.choice((-1, 1)), "light_y": u(0.25, 0.7), "light_warmth": u(-0.06, 0.08),
        "rim": u(0.0, 0.4), "background": u(0, 1, FIELDS["background"]), "phase": u(0, 2 * np.pi, FIELDS["phase"]),
    }  # fmt: skip


def draw_identity(rng: np.random.Generator, textured: bool | None = None) -> Identity:
    """Draws a random person: age, skin of ten tones, shape, hair, clothes, light and background.

    A *textured* head has all its albedos multiplied with random smooth colours at three scales, which makes faces that
    no palette has; with `textured` None these are 30 % of the identities. The person does not depend on `textured`.
    """
    u = rng.uniform
    age = float(rng.choice((u(0.0, 0.15), u(0.15, 0.45), u(0.45, 0.72), u(0.72, 1.0)), p=(0.10, 0.45, 0.28, 0.17)))
    person = _Person(tone=float(u()), age=age, feminine=bool(u() < 0.5))
    drawn = u() < 0.3
    values: dict[str, ArrayLike] = {
        "textured": drawn if textured is None else textured,
        "texture_scale": (u(1.0, 2.5), u(2.5, 6.0), u(6.0, 12.0)),
        "texture_color": (u(-1, 1, (3, 3)) * u(0.1, 0.5, (3, 1))).ravel(),
        **_draw_shape(rng, person),
        **_draw_colors(rng, person),
        **_draw_hair(rng, person),
        **_draw_scene(rng, person),
    }
    return Identity(np.hstack([values[name] for name in FIELDS]).astype(np.float32), person.tone)


def _source() -> str:
    """The whole C++ program: structures and enumerations from the tables above, then `face.cpp`."""
    identity = "".join(f"  float {name}{f'[{count}]' if count > 1 else ''};\n" for name, count in FIELDS.items())
    motion = "".join(f"  float {name};\n" for name in MOTION)
    enumerations = "".join(f"enum {{ {', '.join(kinds).upper()} }};\n" for kinds in (SCENES, CLOTHES_KINDS, PATTERNS))
    body = Path(__file__).with_name("face.cpp").read_text()
    return (
        f"struct Identity {{\n{identity}}};\nstruct Motion {{\n{motion}}};\n{enumerations}"
        f"constexpr float HEAD_CENTER_Y = {HEAD_CENTER_Y}f;\n{body}"
    )


# The parts of -ffast-math. As one option it would link code that makes all of Python flush subnormal numbers to zero.
FAST_MATH = (
    "-fno-math-errno -fno-trapping-math -fno-signed-zeros -fassociative-math -freciprocal-math -ffinite-math-only"
)
COMPILER_FLAGS = f"-std=c++17 -O3 {FAST_MATH} -march=native -Wno-psabi -shared -fPIC"


_LOADING = threading.Lock()


def _compile(target: Path) -> None:
    """Compiles the renderer to a shared library. Raises `UserError` if there is no compiler or it fails."""
    wanted = os.environ.get("CXX")
    names = (wanted,) if wanted else ("g++", "clang++")
    compiler = next((path for name in names if (path := shutil.which(name))), None)
    if compiler is None:
        raise UserError(f"The renderer of faces needs a C++ compiler ({' or '.join(names)}): install one or set CXX.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target, f".{target.name}.{os.getpid()}.tmp") as temporary:
        command = [compiler, *COMPILER_FLAGS.split(), "-x", "c++", "-", "-o", str(temporary)]
        done = subprocess.run(command, input=_source(), text=True, capture_output=True)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error" in line] or [f"exit code {done.returncode}"]
            raise UserError(f"{compiler} cannot compile the renderer of faces: {errors[0]}")


def _library() -> ctypes.CDLL:
    """The compiled renderer; other threads wait while the first one compiles it."""
    with _LOADING:
        return _loaded()


@functools.cache
def _loaded() -> ctypes.CDLL:
    """The compiled renderer, from the cache if this source was compiled before."""
    program = "\0".join((os.environ.get("CXX", ""), COMPILER_FLAGS, _source()))
    key = hashlib.sha256(program.encode()).hexdigest()[:16]
    path = device_cache_dir(torch.device("cpu")) / f"face-{key}.so"
    if not path.exists():
        _compile(path)
    library = ctypes.CDLL(str(path))
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    library.render_frames.argtypes = [pointer, pointer, integer, integer, integer, integer, integer, pointer]
    library.render_frames.restype = None
    return library


def _checked_motion(motion: ArrayLike) -> NDArray[np.float32]:
    checked = np.ascontiguousarray(motion, np.float32)
    if checked.ndim != 2 or checked.shape[1] != len(MOTION):
        raise ValueError(f"motion: got {checked.shape}, wanted [T, {len(MOTION)}]")
    if not np.isfinite(checked).all():
        raise ValueError("motion: got numbers that are not finite")
    return checked


def render(
    identity: Identity, motion: ArrayLike, size: int = 128, window: tuple[int, int, int] | None = None
) -> NDArray[np.uint8]:
    """Draws a person in T frames: uint8 [T, size, size, 3], sRGB, each pixel the mean of 2 x 2 samples.

    `motion` is float32 [T, 17] in the order of `MOTION`. `window` (x, y, width) draws only the square of that width
    whose upper left pixel is column x and row y: the same bytes as that part of the full picture, uint8
    [T, width, width, 3]. Several threads may draw at once. Raises `ValueError` for other shapes and for a window
    outside the picture, and `UserError` if no C++ compiler is found when the renderer is not in the cache.
    """
    motion = _checked_motion(motion)
    if size < 8:
        raise ValueError(f"size: got {size}, wanted at least 8")
    left, top, width = window or (0, 0, size)
    if min(left, top) < 0 or width < 1 or max(left, top) + width > size:
        raise ValueError(f"window: got {window}, wanted a square inside of {size} x {size} pixels")
    values = np.ascontiguousarray(identity.values, np.float32)
    if values.shape != (sum(FIELDS.values()),):
        raise ValueError(f"identity.values: got {values.shape}, wanted [{sum(FIELDS.values())}]")
    frames = np.empty((len(motion), width, width, 3), np.uint8)
    _library().render_frames(
        values.ctypes.data, motion.ctypes.data, len(motion), size, left, top, width, frames.ctypes.data
    )
    return frames


def mouth_centre(identity: Identity, motion: ArrayLike, size: int = 128) -> NDArray[np.float32]:
    """The pixel column and row of the mouth's centre in each frame, float32 [T, 2].

    The centre is a point fixed to the skull a little below the line of the closed lips; it follows the pose, not the
    jaw. Whole numbers are borders between pixels. `motion` is float32 [T, 17] in the order of `MOTION`.
    """
    named = dict(zip(MOTION, _checked_motion(motion).astype(np.float64).T, strict=True))
    yaw, pitch, roll = named["yaw"], named["pitch"], named["roll"]
    height = identity["mouth_y"] * identity["head_height"] - 0.035
    depth = identity["head_depth"] * 0.87
    x = np.sin(yaw) * (np.sin(pitch) * height + np.cos(pitch) * depth)
    x *= 0.92 * identity["jaw_width"]  # narrower than the ellipsoid, and the far half of the lips looks shorter
    y = np.cos(pitch) * height - np.sin(pitch) * depth + 0.5  # from the point about which the head rolls
    turned_x = np.cos(roll) * x - np.sin(roll) * y
    turned_y = np.sin(roll) * x + np.cos(roll) * y - 0.5
    picture_x = turned_x * identity["scale"] + identity["offset_x"] + named["shift_x"]
    picture_y = turned_y * identity["scale"] + HEAD_CENTER_Y + identity["offset_y"] + named["shift_y"]
    return (np.stack((1 + picture_x, 1 - picture_y), 1) * (size / 2)).astype(np.float32)
