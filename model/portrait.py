"""Keeps the face in the picture where a portrait is cut to another format."""

import numpy as np
from PIL import Image

DETECTED_SIDE = 320  # pixels of the shorter side of what the detector sees
SMALLEST = 0.08  # side of a face, as a share of the shorter side
ABOVE, BELOW, BESIDE = 0.45, 0.2, 0.15  # hair, chin and ears around a detected face, as shares of its side


def keep_face(image: Image.Image, height: int, width: int) -> Image.Image:
    """Cuts `image` at one edge, if need be, so that cutting its centre out in the format width : height keeps the face.

    The published code cuts the centre out, and so does this one wherever that keeps the head. If it does not, the cut
    moves no further than it must. If the whole head does not fit, the cut is centred on the face. A picture in which no
    face is found stays as it is. Of several faces the largest counts.
    """
    scale = max(height / image.height, width / image.width)
    window = (width / scale, height / scale)
    axis = 0 if image.width - window[0] > image.height - window[1] else 1
    size, length = image.size[axis], window[axis]
    if size - length < 1 or (face := find_face(image)) is None:
        return image
    start, side = face[axis], face[2]
    before, after = (BESIDE, BESIDE) if axis == 0 else (ABOVE, BELOW)
    first, last = start - before * side, start + (1 + after) * side  # of the head
    centre = size / 2
    if last - first > length:
        centre = start + side / 2
    elif first < centre - length / 2:
        centre = first + length / 2
    elif last > centre + length / 2:
        centre = last - length / 2
    centre = min(max(centre, length / 2), size - length / 2)
    low, high = max(0, round(2 * centre) - size), min(size, round(2 * centre))
    return image.crop((low, 0, high, image.height) if axis == 0 else (0, low, image.width, high))


def find_face(image: Image.Image) -> tuple[float, float, float] | None:
    """Column, row and side of the largest upright frontal face in an RGB image, in pixels, or None.

    The square spans about from the brows to the chin. The detector is scikit-image's cascade of local binary patterns.
    """
    from skimage.data import lbp_frontal_face_cascade_filename  # imported here: only pictures of other formats need it
    from skimage.feature import Cascade

    scale = DETECTED_SIDE / min(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    if max(size) > 4 * DETECTED_SIDE:
        return None
    least = round(SMALLEST * DETECTED_SIDE)
    faces = Cascade(lbp_frontal_face_cascade_filename()).detect_multi_scale(
        img=np.asarray(image.convert("L").resize(size)),
        scale_factor=1.2,
        step_ratio=1,
        min_size=(least, least),
        max_size=(DETECTED_SIDE, DETECTED_SIDE),
    )
    if not faces:
        return None
    largest = max(faces, key=lambda face: face["width"])
    return largest["c"] / scale, largest["r"] / scale, largest["width"] / scale
