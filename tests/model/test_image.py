"""Image files of every kind, the crop against golden outputs and its definition, the encoder against golden outputs."""

import json
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file

from model import image as images
from model.config import TINY_RANDOM, ImageConfig
from model.errors import UserError
from model.image import ImageEncoder, is_unused_key, load_image, resize_center_crop, to_pixels

GOLDEN = Path(__file__).parents[1] / "golden"


def loaded(path: Path) -> list[list[tuple[int, ...]]]:
    image = load_image(path)
    assert image.mode == "RGB"
    return [[tuple(pixel) for pixel in row] for row in np.asarray(image).tolist()]


def png(path: Path, size: tuple[int, int], depth: int, color: int, rows: bytes, clear: bytes = b"") -> None:
    """A PNG of any bit depth and colour type, which Pillow cannot write, and the shade that is transparent."""

    def part(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", *size, depth, color, 0, 0, 0)
    body = (
        part(b"IHDR", header)
        + (part(b"tRNS", clear) if clear else b"")
        + part(b"IDAT", zlib.compress(rows))
        + part(b"IEND", b"")
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK"])
def test_modes_and_one_pixel(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "image.tif"
    Image.new("RGBA", (1, 1), "white").convert(mode if mode != "CMYK" else "RGB").convert(mode).save(path)
    assert loaded(path) == [[(255, 255, 255)]]


def test_orientation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)).save(tmp_path / "turned.png", exif=exif)
    assert loaded(tmp_path / "turned.png") == [[(1, 2, 3)], [(4, 5, 6)]]


def test_transparency_is_blended_with_white(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    Image.fromarray(np.array([[[10, 20, 30, a] for a in (0, 51, 255)]], np.uint8)).save(path)
    assert loaded(path) == [[(255, 255, 255), (206, 208, 210), (10, 20, 30)]]
    for mode, key in (("L", 7), ("RGB", (1, 2, 3))):
        Image.new(mode, (1, 1), key).save(path, transparency=key)
        assert loaded(path) == [[(255, 255, 255)]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((1, 0), 1)
    palette.save(path, transparency=0)
    assert loaded(path) == [[(255, 255, 255), (0, 255, 0)]]


@pytest.mark.parametrize(
    ("depth", "row", "key", "wanted"),
    [
        (1, b"\x40", 1, [0, 255]),
        (1, b"\x40", 0, [255, 255]),
        (2, b"\x1b", 1, [0, 255, 170, 255]),
        (2, b"\x1b", 2, [0, 85, 255, 255]),
        (4, b"\x12", 1, [255, 34]),
        (8, b"\x05\x06", 5, [255, 6]),
        (16, b"\x02\x58\x02\x59", 600, [255, 2]),
        (16, b"\x00\x00\xff\x00", 0, [255, 254]),
    ],
)
def test_a_transparent_shade_of_grey(tmp_path: Path, depth: int, row: bytes, key: int, wanted: list[int]) -> None:
    path = tmp_path / "image.png"
    png(path, (len(wanted), 1), depth, 0, b"\0" + row, struct.pack(">H", key))
    assert loaded(path) == [[(v, v, v) for v in wanted]]


def test_a_transparent_colour_of_16_bits(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    row = struct.pack(">9H", 6000, 7000, 8000, 60000, 7000, 8000, 6000, 7000, 8001)
    png(path, (3, 1), 16, 2, b"\0" + row, struct.pack(">3H", 6000, 7000, 8000))
    assert loaded(path) == [[(255, 255, 255), (234, 27, 31), (23, 27, 31)]]
    with Image.open(path) as image:
        exif = image.getexif()
        exif[0x0112] = 3  # turn by 180 degrees
    content = path.read_bytes()
    part = b"eXIf" + exif.tobytes()[6:]
    chunk = struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part))
    path.write_bytes(content[:33] + chunk + content[33:])
    assert loaded(path) == [[(23, 27, 31), (234, 27, 31), (255, 255, 255)]]


def swapped() -> bytes:
    """A profile of a screen whose red and blue are swapped."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    tags = {
        name: (at, size)
        for name, at, size in struct.iter_unpack(
            ">4sII", profile[132 : 132 + 12 * struct.unpack(">I", profile[128:132])[0]]
        )
    }
    (red, size), (blue, _) = tags[b"rXYZ"], tags[b"bXYZ"]
    profile[red : red + size], profile[blue : blue + size] = profile[blue : blue + size], profile[red : red + size]
    return bytes(profile)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
def test_colour_profiles_are_honoured(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"image.{suffix}"
    Image.new("RGB", (16, 16), (200, 40, 40)).save(path, icc_profile=swapped(), lossless=True)
    np.testing.assert_allclose(loaded(path)[8][8], (40, 40, 200), atol=3)


def test_colour_profiles_of_other_modes(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    Image.new("RGBA", (1, 1), (200, 40, 40, 51)).save(path, icc_profile=swapped())
    assert loaded(path) == [[(212, 212, 244)]]  # alpha .2 of (40, 40, 200), on white
    image = Image.new("P", (1, 1))
    image.putpalette([200, 40, 40])
    image.save(path, icc_profile=swapped())
    assert loaded(path) == [[(40, 40, 200)]]
    for mode in ("L", "1", "LA"):
        Image.new("L", (1, 1), 255).convert(mode).save(path, icc_profile=swapped())
        np.testing.assert_allclose(loaded(path)[0][0], 255, atol=1)


def chunks(**content: bytes) -> PngInfo:
    info = PngInfo()
    for name, data in content.items():
        info.add(name.encode(), data)
    return info


@pytest.mark.parametrize(
    ("gamma", "seen"),  # (v / 255)**(1 / gamma) is light, which sRGB's curve makes a level again
    [
        (1.0, (229, 110, 110)),
        (1 / 1.8, (210, 53, 53)),
        (1 / 2.2, (200, 40, 40)),
        (0.45, (200, 40, 40)),
        (0, (200, 40, 40)),
    ],
)
def test_gamma_of_png_is_honoured(tmp_path: Path, gamma: float, seen: tuple[int, int, int]) -> None:
    """Unless the file says that it is in sRGB, or has a colour profile."""
    path, image, number = tmp_path / "image.png", Image.new("RGB", (1, 1), (200, 40, 40)), round(gamma * 1e5)
    gama = number.to_bytes(4, "big")
    image.save(path, pnginfo=chunks(gAMA=gama))
    assert loaded(path) == [[seen]]
    image.save(path, pnginfo=chunks(gAMA=gama, sRGB=b"\0"))
    assert loaded(path) == [[(200, 40, 40)]]
    image.save(path, pnginfo=chunks(gAMA=gama), icc_profile=swapped())
    assert loaded(path) == [[(40, 40, 200)]]


def test_srgb_stays_as_it_is(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(pixels).save(tmp_path / "image.png", icc_profile=profile)
    np.testing.assert_allclose(np.asarray(load_image(tmp_path / "image.png")), pixels, atol=1)


def test_profiles_that_do_not_fit_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    whole = swapped()
    cmyk = whole[:16] + b"CMYK" + whole[20:]
    grey = whole[:16] + b"GRAY" + whole[20:]
    lost = whole[:132] + bytes(len(whole) - 132)
    for profile in (b"x", b"not a profile" * 50, whole[:200], whole[: len(whole) // 2], cmyk, grey, lost):
        Image.new("RGB", (1, 1), (200, 40, 40)).save(path, icc_profile=profile)
        assert loaded(path) == [[(200, 40, 40)]]
    Image.new("CMYK", (1, 1), (0, 0, 0, 0)).save(tmp_path / "image.tif", icc_profile=whole)
    assert loaded(tmp_path / "image.tif") == [[(255, 255, 255)]]


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_large_photographs_are_read_at_a_part_of_their_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setattr(images, "LARGE", 400 * 300 - 1)
    monkeypatch.setattr(images, "ENOUGH", 64)
    ramp = np.linspace(0, 255, 400, dtype=np.uint8)
    pixels = np.stack([np.tile(ramp, (300, 1)), np.full((300, 400), 128), np.full((300, 400), 60)], 2).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    Image.fromarray(pixels).save(tmp_path / f"large.{suffix}", exif=exif, quality=95)
    seen = load_image(tmp_path / f"large.{suffix}")
    assert seen.size == (75, 100)
    np.testing.assert_allclose(
        np.asarray(seen)[:, 40], np.asarray(Image.fromarray(pixels).resize((100, 75)))[40], atol=6
    )
    Image.fromarray(pixels[1:]).save(tmp_path / "usual.png")
    assert load_image(tmp_path / "usual.png").size == (400, 299)


def test_a_large_picture_is_no_reason_for_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)
    Image.new("RGB", (10, 10)).save(tmp_path / "large.png")
    assert load_image(tmp_path / "large.png").size == (10, 10)
    assert not recwarn.list


def test_a_large_picture_with_transparency(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "LARGE", 1000)
    monkeypatch.setattr(images, "ENOUGH", 16)
    for mode, colour, key in (("RGBA", (9, 9, 9, 0), None), ("L", 9, 9), ("P", 0, 0)):
        image = Image.new(mode, (64, 48), colour)
        if mode == "P":
            image.putpalette([10, 20, 30])
        image.save(tmp_path / "clear.png", transparency=key)
        seen = np.asarray(load_image(tmp_path / "clear.png"))
        assert seen.shape == (16, 22, 3)
        assert (seen == 255).all()


@pytest.mark.parametrize(
    "content",
    [
        b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99),
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%PDF-1.7\n",
    ],
)
def test_unknown_formats_are_told_from_damage(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "image.jpg"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"no known image format .* give PNG, JPEG, WebP") as raised:
        load_image(path)
    assert "\n" not in str(raised.value)


def test_sixteen_bit_channels_are_scaled(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    values = np.array([0, 400, 32896, 65535], ">u2")
    png(path, (4, 1), 16, 0, b"\0" + values.tobytes())  # grey
    assert loaded(path) == [[(v, v, v) for v in (0, 2, 128, 255)]]
    png(path, (1, 1), 16, 2, b"\0" + values[1:].tobytes())  # RGB
    assert loaded(path) == [[(1, 128, 255)]]  # Pillow keeps the upper byte
    for mode, order in (("I;16", "<u2"), ("I;16B", ">u2")):
        Image.frombytes(mode, (4, 1), values.astype(order).tobytes()).save(tmp_path / "image.tif")
        assert loaded(tmp_path / "image.tif") == [[(v, v, v) for v in (0, 2, 128, 255)]]


@pytest.mark.parametrize(
    ("bits", "inverted", "row"),
    [
        *((8, inverted, bytes([0, 64, 200, 255])) for inverted in (False, True)),
        *((16, inverted, struct.pack("<4H", 0, 64 * 257, 200 * 257, 65535)) for inverted in (False, True)),
        (12, False, bytes.fromhex("000400c8bfff")),  # Pillow does not know 12 bits whose 0 is white
    ],
)
def test_grey_tiff_of_scanners(tmp_path: Path, bits: int, inverted: bool, row: bytes) -> None:
    tags = [
        (256, 4),
        (257, 1),
        (258, bits),
        (259, 1),
        (262, not inverted),
        (273, 8),
        (277, 1),
        (278, 1),
        (279, len(row)),
    ]
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    path = tmp_path / "scan.tif"
    path.write_bytes(struct.pack("<2sHI", b"II", 42, 8 + len(row)) + row + struct.pack("<H", 9) + entries + bytes(4))
    wanted = [255, 191, 55, 0] if inverted else [0, 64, 200, 255]
    assert loaded(path) == [[(v, v, v) for v in wanted]]


def test_unreadable_files(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 255, (64, 64, 3), np.uint8))
    for name in ("cut.png", "cut.jpg"):
        noise.save(tmp_path / name)
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("one\ntwo\n")
    (tmp_path / "pointer.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n")
    (tmp_path / "page.jpg").write_text("<!DOCTYPE html><html>404</html>")
    png(tmp_path / "bomb.png", (60000, 60000), 8, 2, b"")
    Image.new("F", (2, 2)).save(tmp_path / "float.tif")
    for name, words in {
        "cut.png": "give an intact PNG or JPEG",
        "cut.jpg": "give an intact PNG or JPEG",
        "empty.png": "is empty",
        "text.png": "no known image format",
        "pointer.png": "git lfs pull",
        "page.jpg": "is a web page",
        "bomb.png": "too many pixels to be read safely: give a smaller image",
        "float.tif": "floating-point pixels of unknown range: convert it to PNG or JPEG",
        ".": "Is a directory",
    }.items():
        with pytest.raises(UserError, match=words) as caught:
            load_image(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"^no image file"):
        load_image(tmp_path / "missing.png")


@pytest.mark.parametrize("i", range(8))
def test_golden_crop(i: int) -> None:
    case = load_file(GOLDEN / "resize_and_centercrop.safetensors")
    wanted = case[f"out.crop{i}"][0, :, 0]
    crop = resize_center_crop(Image.fromarray(case[f"in.image{i}"].numpy()), *wanted.shape[1:])
    assert torch.equal(crop, wanted)


def triangles(old: int, new: int) -> NDArray[np.float64]:
    """Weights [new, old] of the bilinear filter, as wide as a new pixel when shrinking."""
    step = old / new
    distance = np.abs(np.arange(old) + 0.5 - (np.arange(new)[:, None] + 0.5) * step) / max(step, 1.0)
    weights = np.maximum(0.0, 1.0 - distance)
    return weights / weights.sum(1, keepdims=True)


sides = st.integers(1, 60)


@settings(max_examples=100)
@given(sides, sides, sides, sides, st.integers(0, 2**32 - 1))
def test_crop_is_the_filter_in_double_precision(h: int, w: int, height: int, width: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (h, w, 3), np.uint8)
    crop = resize_center_crop(Image.fromarray(pixels), height, width)
    assert crop.shape == (3, height, width)
    assert crop.dtype == torch.uint8
    assert crop.is_contiguous()
    scale = max(height / h, width / w)
    rows, columns = math.ceil(scale * h), math.ceil(scale * w)
    top, left = round((rows - height) / 2), round((columns - width) / 2)
    down, across = triangles(h, rows)[top : top + height], triangles(w, columns)[left : left + width]
    wanted = np.einsum("Hh,hwc,Ww->cHW", down, pixels.astype(np.float64), across)
    assert np.abs(crop.numpy() - wanted).max() < 1.1  # two roundings to whole levels


def test_crop_sizes_of_the_definition() -> None:
    for h, w, rows, columns in ((1024, 1024, 768, 768), (1920, 1080, 797, 448), (1000, 750, 768, 576)):
        scale = max(768 / h, 448 / w)
        assert (math.ceil(scale * h), math.ceil(scale * w)) == (rows, columns)
        image = Image.effect_noise((w, h), 80).convert("RGB")
        resized = np.asarray(image.resize((columns, rows), Image.Resampling.BILINEAR))
        top, left = {797: 14, 768: 0}[rows], {448: 0, 768: 160, 576: 64}[columns]
        wanted = torch.from_numpy(resized[top : top + 768, left : left + 448].copy()).permute(2, 0, 1)
        assert torch.equal(resize_center_crop(image, 768, 448), wanted)


def test_elongated_images_are_refused() -> None:
    for size in ((100_000, 1), (1, 100_000)):
        with pytest.raises(UserError, match=f"{size[0]} x {size[1]} pixels is too long"):
            resize_center_crop(Image.new("RGB", size), 768, 448)
    assert resize_center_crop(Image.new("RGB", (2000, 40)), 768, 448).shape == (3, 768, 448)


def test_only_rgb_is_cropped() -> None:
    with pytest.raises(ValueError, match="image: got mode L, wanted RGB"):
        resize_center_crop(Image.new("L", (4, 4)), 4, 4)


def test_pixels() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    pixels = to_pixels(levels)
    assert pixels.dtype == torch.float32
    torch.testing.assert_close(pixels.double(), torch.linspace(-1, 1, 256, dtype=torch.float64), rtol=0, atol=1e-7)
    with pytest.raises(ValueError, match=r"image: got torch.float32, wanted uint8"):
        to_pixels(pixels)


@torch.inference_mode()
def test_golden_features() -> None:
    config = ImageConfig(vision_dim=80, vision_heads=2, vision_layers=3)
    case, tensors = load_file(GOLDEN / "clip_visual.safetensors"), load_file(GOLDEN / "weights_clip.safetensors")
    with torch.device("meta"):
        encoder = ImageEncoder(config)
    param_map = encoder.param_map()
    assert param_map.keys() == {name for name in tensors if not is_unused_key(name, config)}
    pieces = {
        ours: piece
        for name, mapping in param_map.items()
        for ours, piece in zip(mapping.params, tensors[name].chunk(len(mapping.params)), strict=True)
    }
    encoder.load_state_dict(pieces, assign=True)
    features = encoder(case["in.image"][0, :, 0])
    torch.testing.assert_close(features, case["out.features"][0], rtol=0, atol=2e-5)


def test_param_map_has_the_official_keys_that_are_used() -> None:
    config = ImageConfig()
    keys = json.loads((GOLDEN / "checkpoint_keys.json").read_text())["clip"]["keys"]
    with torch.device("meta"):
        encoder = ImageEncoder(config)
    param_map = encoder.param_map()
    used = {name: tuple(shape) for name, shape in keys.items() if not is_unused_key(name, config)}
    assert {name: mapping.shape for name, mapping in param_map.items()} == used
    assert {ours for mapping in param_map.values() for ours in mapping.params} == encoder.state_dict().keys()
    assert sum(p.numel() for p in encoder.parameters()) == 611_086_080


def test_evaluation_mode_and_bad_images() -> None:
    encoder = ImageEncoder(TINY_RANDOM.image)
    assert not any(module.training for module in encoder.modules())
    for image in (torch.zeros(1, 3, 8, 8), torch.zeros(4, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="image: got"):
            encoder(image)
