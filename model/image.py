"""From a portrait file to pixels and image features: reading, cropping, the vision tower of CLIP."""

import io
import math
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageCms, ImageFile, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, TiffImageFile
from torch import Tensor, nn

from model.config import ImageConfig
from model.errors import UserError
from model.files import placeholder
from model.param_map import ParamMapping, pattern_map

# Limits the memory for an elongated image, which is scaled by its short side: 32 Mpx take 128 MiB.
MAX_RESIZED_PIXELS = 2**25
SRGB_GAMMA, GAMMA_TOLERANCE = 1 / 2.2, 0.05  # of a PNG file; and how far another one is the same, as in libpng
WHITE_IS_ZERO = 0  # in TIFF's tag of that name: the photometric interpretation
LARGE, ENOUGH = 2**25, 2048  # pixels of an image, and of its shorter side: larger ones are read at a part of their size


def load_image(path: Path) -> Image.Image:
    """The image file at `path` as 8-bit RGB, as an image viewer shows it.

    EXIF orientation is applied, colours are converted from the file's colour profile or gamma to sRGB, transparent
    pixels are blended with white, channels of more than 8 bits are scaled to 8, and only the first frame of an
    animation is used. A colour profile that is damaged or belongs to other channels is ignored. Images of more than
    `LARGE` pixels are made smaller, to `ENOUGH` pixels a side or more. Raises `UserError` if the file cannot be read as
    an image or is unreasonably large.
    """
    try:
        with (
            # A large image is accepted. Pillow refuses one that is twice as large.
            warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning),
            Image.open(path) as file,
        ):
            if file.mode == "F":
                raise UserError(f"{path} has floating-point pixels of unknown range: convert it to PNG or JPEG")
            if file.width * file.height > LARGE:
                file.draft(None, (ENOUGH, ENOUGH))  # JPEG is decoded at a part of its size
            return _to_rgb(file)
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"no image file {path}") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{path} has too many pixels to be read safely: give a smaller image") from error
    except UnidentifiedImageError as error:
        unknown = "is in no known image format (HEIC, SVG and PDF are not known): give PNG, JPEG, WebP, AVIF or TIFF"
        raise UserError(f"{path} {placeholder(path) or unknown}") from error
    except Exception as error:  # Pillow's decoders raise many kinds of exceptions for a damaged file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"cannot read the image {path} ({reason}): give an intact PNG or JPEG file") from error


def _to_rgb(file: ImageFile.ImageFile) -> Image.Image:
    written = file.tile[0][3] if file.tile else None  # of PNG: the channels of the file, such as "L;2" or "RGB;16B"
    ImageOps.exif_transpose(file, in_place=True)
    opacity, image = _opacity(file, written), _eight_bits(file)
    factor = min(image.size) // ENOUGH if image.width * image.height > LARGE else 1
    if factor > 1:
        image, opacity = image.reduce(factor), opacity and opacity.reduce(factor)
    image = _to_srgb(image, file.info.get("icc_profile"))
    if not file.info.keys() & {"icc_profile", "srgb"}:  # which come before it
        image = _gamma_to_srgb(image, file.info.get("gamma", SRGB_GAMMA))
    return Image.composite(image, Image.new("RGB", image.size, "white"), opacity) if opacity else image


def _eight_bits(image: Image.Image) -> Image.Image:
    """The image without its transparency, in a mode of 8 bits a channel."""
    if image.mode.startswith("I"):  # grey of more than 8 bits; Pillow's own conversion would clip at 255
        white, inverted = _grey_scale(image)
        levels = (np.clip(np.asarray(image), 0, white) / (white / 255)).round().astype(np.uint8)
        return Image.fromarray(255 - levels if inverted else levels)
    mode = {"1": "L", "LA": "L", "L": "L", "CMYK": "CMYK"}.get(image.mode, "RGB")
    return image if image.mode == mode else image.convert(mode)


def _grey_scale(image: Image.Image) -> tuple[int, bool]:
    """The largest level of grey of more than 8 bits, and whether 0 is white, which Pillow applies only to fewer."""
    if not isinstance(image, TiffImageFile):
        return 65535, False
    tags = image.tag_v2
    bits, zero = tags[BITSPERSAMPLE][0], tags.get(PHOTOMETRIC_INTERPRETATION, WHITE_IS_ZERO)
    return 2 ** min(bits, 16) - 1, zero == WHITE_IS_ZERO


_GREY_STEPS = {"L;2": 85, "L;4": 17}  # levels from one shade to the next


def _opacity(image: ImageFile.ImageFile, written: object) -> Image.Image | None:
    """How opaque each pixel is, mode L, or None where all are. `written` are the channels of a PNG file."""
    if not image.has_transparency_data:
        return None
    shade = image.info.get("transparency")  # of PNG without an alpha channel: as written, of Pillow's pixels: scaled
    if image.mode.startswith("I"):
        return Image.fromarray(np.where(np.asarray(image) == shade, 0, 255).astype(np.uint8))
    if isinstance(shade, int) and isinstance(written, str) and written in _GREY_STEPS:
        image.info["transparency"] = shade * _GREY_STEPS[written]
    elif isinstance(shade, tuple) and written == "RGB;16B":
        upper, lower = ([channel >> shift & 255 for channel in shade] for shift in (8, 0))
        clear = (np.asarray(image) == upper).all(axis=2) & (np.asarray(_lower_bytes(image)) == lower).all(axis=2)
        return Image.fromarray(np.where(clear, 0, 255).astype(np.uint8))
    return image.convert("RGBA").getchannel("A")


def _lower_bytes(image: ImageFile.ImageFile) -> Image.Image:
    """The lower bytes of the 16-bit channels of an RGB PNG file, of which Pillow keeps the upper ones."""
    with Image.open(image.filename) as file:
        file.tile = [tile._replace(args="RGB;16L") for tile in file.tile]  # little-endian, so that it takes the others
        return ImageOps.exif_transpose(file)


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """The image, mode L, RGB or CMYK, as RGB in sRGB; a colour profile that does not fit or is damaged is ignored."""
    space = (profile or b"")[16:20]
    if (image.mode, space) == ("L", b"RGB "):
        image = image.convert("RGB")
    if profile and (image.mode, space) in (("L", b"GRAY"), ("RGB", b"RGB "), ("CMYK", b"CMYK")):
        with suppress(ImageCms.PyCMSError, OSError):
            source, target = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
            return ImageCms.profileToProfile(image, source, target, outputMode="RGB") or image
    return image.convert("RGB")


def _gamma_to_srgb(image: Image.Image, gamma: float) -> Image.Image:
    """The RGB image in sRGB; a level in the PNG file is (level of light)**gamma. Values near sRGB's change nothing."""
    if gamma <= 0 or abs(gamma / SRGB_GAMMA - 1) < GAMMA_TOLERANCE:
        return image
    light = np.linspace(0, 1, 256) ** (1 / gamma)
    levels = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)  # IEC 61966-2-1
    return image.point((255 * levels).round().astype(int).tolist() * 3)


def resize_center_crop(image: Image.Image, height: int, width: int) -> Tensor:
    """Scales the 8-bit RGB `image` to cover `height` x `width` pixels and crops its centre; uint8 [3, height, width].

    The scale is max(height / h, width / w), and the scaled size is ceil(scale * h) x ceil(scale * w) in double
    precision, where rounding may add a pixel. The filter is Pillow's bilinear one, which antialiases when it shrinks.
    The crop begins at round((scaled - wanted) / 2), halves to even. Raises `UserError` for an image so elongated that
    the scaled one would exceed `MAX_RESIZED_PIXELS`.
    """
    if image.mode != "RGB":
        raise ValueError(f"image: got mode {image.mode}, wanted RGB")
    scale = max(height / image.height, width / image.width)
    rows, columns = math.ceil(scale * image.height), math.ceil(scale * image.width)
    if rows * columns > MAX_RESIZED_PIXELS:
        raise UserError(
            f"the image of {image.width} x {image.height} pixels is too long for {width} x {height}: crop it first"
        )
    top, left = round((rows - height) / 2), round((columns - width) / 2)
    resized = image.resize((columns, rows), Image.Resampling.BILINEAR)
    crop = np.array(resized.crop((left, top, left + width, top + height)))  # [H, W, 3]
    return torch.from_numpy(crop).permute(2, 0, 1).contiguous()


def to_pixels(image: Tensor) -> Tensor:
    """uint8 RGB of any shape -> float32 in [-1, 1]: (p / 255 - 0.5) * 2."""
    if image.dtype != torch.uint8:
        raise ValueError(f"image: got {image.dtype}, wanted uint8")
    return (image.float() / 255 - 0.5) * 2


# {official tensor name: our parameter name or names}
OFFICIAL_TO_PARAM: dict[str, str | tuple[str, ...]] = {
    "visual.cls_embedding": "cls_embedding",
    "visual.pos_embedding": "pos_embedding",
    "visual.patch_embedding.weight": "patch_embedding.weight",
    "visual.pre_norm.weight": "pre_norm.weight",
    "visual.pre_norm.bias": "pre_norm.bias",
    "visual.transformer.{i}.norm1.weight": "encoder.layers.{i}.layer_norm1.weight",
    "visual.transformer.{i}.norm1.bias": "encoder.layers.{i}.layer_norm1.bias",
    "visual.transformer.{i}.attn.to_qkv.weight": (
        "encoder.layers.{i}.self_attn.q_proj.weight",
        "encoder.layers.{i}.self_attn.k_proj.weight",
        "encoder.layers.{i}.self_attn.v_proj.weight",
    ),
    "visual.transformer.{i}.attn.to_qkv.bias": (
        "encoder.layers.{i}.self_attn.q_proj.bias",
        "encoder.layers.{i}.self_attn.k_proj.bias",
        "encoder.layers.{i}.self_attn.v_proj.bias",
    ),
    "visual.transformer.{i}.attn.proj.weight": "encoder.layers.{i}.self_attn.out_proj.weight",
    "visual.transformer.{i}.attn.proj.bias": "encoder.layers.{i}.self_attn.out_proj.bias",
    "visual.transformer.{i}.norm2.weight": "encoder.layers.{i}.layer_norm2.weight",
    "visual.transformer.{i}.norm2.bias": "encoder.layers.{i}.layer_norm2.bias",
    "visual.transformer.{i}.mlp.0.weight": "encoder.layers.{i}.mlp.fc1.weight",
    "visual.transformer.{i}.mlp.0.bias": "encoder.layers.{i}.mlp.fc1.bias",
    "visual.transformer.{i}.mlp.2.weight": "encoder.layers.{i}.mlp.fc2.weight",
    "visual.transformer.{i}.mlp.2.bias": "encoder.layers.{i}.mlp.fc2.bias",
}


def is_unused_key(key: str, config: ImageConfig) -> bool:
    """Whether the official image-text checkpoint holds `key` but `ImageEncoder` does not need it.

    These keys are the text tower, the logit scale, the last block of the vision tower and everything after it.
    """
    last_block = f"visual.transformer.{config.vision_layers - 1}."
    return key in ("log_scale", "visual.head") or key.startswith(("textual.", "visual.post_norm.", last_block))


class ImageEncoder(nn.Module):
    """Vision tower of CLIP ViT-H/14 without its last block: features of all patches rather than one pooled vector."""

    def __init__(self, config: ImageConfig) -> None:
        from transformers import CLIPVisionConfig  # which takes seconds, and most of what we measure needs no encoder
        from transformers.models.clip.modeling_clip import CLIPEncoder

        super().__init__()
        self.config = config
        dim, patch = config.vision_dim, config.patch_size
        self.cls_embedding = nn.Parameter(torch.randn(1, 1, dim) * dim**-0.5)
        tokens = 1 + (config.image_size // patch) ** 2
        self.pos_embedding = nn.Parameter(torch.randn(1, tokens, dim) * dim**-0.5)
        self.patch_embedding = nn.Conv2d(3, dim, patch, stride=patch, bias=False)
        self.pre_norm = nn.LayerNorm(dim, eps=config.norm_eps)
        settings = {
            "hidden_size": dim,
            "intermediate_size": dim * config.vision_mlp_ratio,
            "num_hidden_layers": config.vision_layers - 1,
            "num_attention_heads": config.vision_heads,
            "hidden_act": "gelu",
            "layer_norm_eps": config.norm_eps,
            "attn_implementation": "sdpa",
        }
        # CLIPEncoder is annotated for the joint CLIPConfig, but transformers itself passes a CLIPVisionConfig.
        self.encoder = CLIPEncoder(CLIPVisionConfig(**settings))  # pyright: ignore[reportArgumentType]
        self.eval()

    def param_map(self) -> dict[str, ParamMapping]:
        """The map of the official image-text checkpoint's tensors that are used to the parameters of this module."""
        return pattern_map(self, OFFICIAL_TO_PARAM, self.config.vision_layers - 1)

    def forward(self, image: Tensor) -> Tensor:
        """Features of an RGB image in [-1, 1], float [3, H, W] -> [1 + patches, vision_dim] in the weights' dtype.

        The image is resized to image_size x image_size (bicubic, without antialiasing or clamping; the aspect ratio is
        not kept), mapped to [0, 1] and normalised by the mean and standard deviation of each channel, all in float32.
        The class token and the patches in row-major order then pass through position embedding, norm and all blocks but
        the last.
        """
        if image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point():
            raise ValueError(f"image: got {image.dtype} {tuple(image.shape)}, wanted float [3, H, W]")
        size = (self.config.image_size, self.config.image_size)
        square = F.interpolate(image[None].float(), size=size, mode="bicubic", align_corners=False)
        mean = square.new_tensor(self.config.pixel_mean)[:, None, None]
        std = square.new_tensor(self.config.pixel_std)[:, None, None]
        pixels = ((square * 0.5 + 0.5 - mean) / std).to(self.pos_embedding.dtype)  # [1, 3, S, S]
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # [1, patches, D]
        x = torch.cat((self.cls_embedding, patches), dim=1) + self.pos_embedding
        return self.encoder(inputs_embeds=self.pre_norm(x)).last_hidden_state[0]
