"""All settings of the networks and of the chunk loop, as frozen dataclasses, and the presets built from them.

Fields have the official names, from the checkpoint's `config.json` and the constructors of the official code, so that
`from_official` can convert an official mapping. Defaults are the values of SoulX-FlashTalk-14B.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch

from model.errors import UserError


@dataclass(frozen=True)
class DiTConfig:
    """The student: a diffusion transformer on 3-D patches, conditioned on text, image and audio."""

    in_dim: int = 36  # 16 noisy latent + 4 mask + 16 condition latent channels
    out_dim: int = 16
    dim: int = 5120
    ffn_dim: int = 13824
    num_layers: int = 40
    num_heads: int = 40
    freq_dim: int = 256  # channels of the timestep sinusoid
    text_dim: int = 4096
    text_len: int = 512
    img_dim: int = 1280
    img_tokens: int = 257
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    audio_window: int = 5
    audio_blocks: int = 12  # speech-encoder layers stacked into one audio feature
    audio_channels: int = 768
    intermediate_dim: int = 512
    output_dim: int = 768
    context_tokens: int = 32  # audio tokens per latent frame and speaker
    vae_scale: int = 4  # video frames per latent frame
    class_range: int = 24  # length of the audio position axis, which separates two speakers
    class_interval: int = 4  # length of a speaker's interval on it: speaker 1 at the start, speaker 2 at the end

    def __post_init__(self) -> None:
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise ValueError(f"dim {self.dim} does not split into {self.num_heads} heads of even size")
        if self.patch_size[0] != 1:
            raise ValueError(f"patch_size {self.patch_size}: patches span one latent frame, so it begins with 1")

    @property
    def head_dim(self) -> int:
        """Channels per attention head."""
        return self.dim // self.num_heads


@dataclass(frozen=True)
class VAEConfig:
    """The causal video VAE of Wan2.1: four levels, 4 x 8 x 8 times smaller latents."""

    dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temperal_downsample: tuple[bool, ...] = (False, True, True)  # [sic], as the official code spells it
    patch: int = 1  # pixels of patch x patch squares become channels before the first level, as in Wan2.2
    phases: bool = False  # whether the checkpoint holds the up-sampling's convolutions as phases, see `Upsample`
    latent_mean: tuple[float, ...] = (
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    )  # fmt: skip
    latent_std: tuple[float, ...] = (
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    )  # fmt: skip

    def __post_init__(self) -> None:
        if len(self.temperal_downsample) != len(self.dim_mult) - 1:
            raise ValueError("temperal_downsample needs one entry fewer than dim_mult")
        if not len(self.latent_mean) == len(self.latent_std) == self.z_dim:
            raise ValueError(f"latent_mean and latent_std need z_dim = {self.z_dim} entries")

    @property
    def spatial_stride(self) -> int:
        """Pixels per latent row and column."""
        return self.patch * 2 ** len(self.temperal_downsample)

    @property
    def temporal_stride(self) -> int:
        """Video frames per latent frame, after the first."""
        return 2 ** sum(self.temperal_downsample)


@dataclass(frozen=True)
class TextConfig:
    """The umT5-xxl encoder. `tokenizer` is a folder in the checkpoint, or "bytes" for UTF-8 bytes without a file."""

    vocab_size: int = 256384
    dim: int = 4096
    dim_attn: int = 4096
    dim_ffn: int = 10240
    num_heads: int = 64
    num_layers: int = 24
    num_buckets: int = 32
    max_dist: int = 128
    norm_eps: float = 1e-6
    tokenizer: str = "google/umt5-xxl"


@dataclass(frozen=True)
class ImageConfig:
    """The vision tower of CLIP ViT-H/14. The last of its `vision_layers` is neither needed nor loaded."""

    vision_dim: int = 1280
    vision_heads: int = 16
    vision_layers: int = 32
    vision_mlp_ratio: int = 4
    image_size: int = 224
    patch_size: int = 14
    norm_eps: float = 1e-5
    pixel_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    pixel_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class AudioConfig:
    """The speech encoder, wav2vec2-base: fields of transformers' `Wav2Vec2Config`, which has defaults for the rest."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    conv_dim: tuple[int, ...] = (512, 512, 512, 512, 512, 512, 512)
    conv_kernel: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    conv_stride: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    conv_bias: bool = False
    feat_extract_norm: str = "group"
    do_stable_layer_norm: bool = False
    num_conv_pos_embeddings: int = 128
    num_conv_pos_embedding_groups: int = 16
    layer_norm_eps: float = 1e-5
    do_normalize: bool = True  # normalise the whole input to zero mean and unit variance
    mouth_outputs: int = 0  # not official: numbers of the mouth that a trained head gives in place of hidden states

    @property
    def feature_shape(self) -> tuple[int, int]:
        """Layers and channels of the features of one frame."""
        return (1, self.mouth_outputs) if self.mouth_outputs else (self.num_hidden_layers, self.hidden_size)


@dataclass(frozen=True)
class ChunkConfig:
    """Geometry, timing and sampling of one chunk."""

    height: int = 768  # pixels
    width: int = 448
    frame_num: int = 33  # video frames generated together
    motion_frames_num: int = 5  # of these, the first ones, taken from the previous chunk
    tgt_fps: int = 25
    sample_rate: int = 16000  # of the speech encoder's audio, in Hz
    cached_audio_duration: int = 8  # seconds of audio that the speech encoder sees at once
    sample_steps: int = 4
    sample_shift: float = 5.0
    color_correction_strength: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.motion_frames_num < self.frame_num:
            raise ValueError(f"motion_frames_num {self.motion_frames_num} must be in 1..{self.frame_num - 1}")
        if self.sample_steps < 1:
            raise ValueError(f"sample_steps must be at least 1, not {self.sample_steps}")
        if self.frame_num > self.cached_audio_duration * self.tgt_fps:
            raise ValueError("a chunk is longer than the cached audio")
        if self.sample_rate % self.tgt_fps:
            raise ValueError(f"sample_rate {self.sample_rate} is not a multiple of tgt_fps {self.tgt_fps}")

    @property
    def new_frames(self) -> int:
        """Frames of a chunk that are shown: all but the motion frames."""
        return self.frame_num - self.motion_frames_num

    @property
    def warmup_frames(self) -> int:
        """Video frames at the beginning of a chunk that are neither shown nor motion frames of the next chunk.

        They are decoded only for the state of the VAE's decoder.
        """
        return min(self.motion_frames_num, self.new_frames)

    @property
    def frame_samples(self) -> int:
        """Audio samples per video frame."""
        return self.sample_rate // self.tgt_fps

    @property
    def slice_samples(self) -> int:
        """Audio samples per chunk, for its new frames."""
        return self.new_frames * self.frame_samples

    @property
    def cached_samples(self) -> int:
        """Audio samples that the speech encoder sees at once."""
        return self.cached_audio_duration * self.sample_rate

    @property
    def cached_frames(self) -> int:
        """Video frames that correspond to `cached_samples`."""
        return self.cached_audio_duration * self.tgt_fps


DEFAULT_PROMPT = "A person is talking. Only the foreground characters are moving, the background remains static."


@dataclass(frozen=True)
class Config:
    """A whole system: its five networks and the chunk that they generate."""

    name: str
    dit: DiTConfig = field(default_factory=DiTConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    text: TextConfig = field(default_factory=TextConfig)
    image: ImageConfig = field(default_factory=ImageConfig)
    audio: AudioConfig = field(default_factory=AudioConfig)
    chunk: ChunkConfig = field(default_factory=ChunkConfig)

    def __post_init__(self) -> None:
        stride, patch = self.vae.spatial_stride, self.dit.patch_size[1]
        for side in ("height", "width"):
            if getattr(self.chunk, side) % (stride * patch):
                raise ValueError(f"{side} {getattr(self.chunk, side)} is not a multiple of {stride * patch}")
        for count in ("frame_num", "motion_frames_num"):
            if (getattr(self.chunk, count) - 1) % self.vae.temporal_stride:
                raise ValueError(f"{count} {getattr(self.chunk, count)} is not 1 + a multiple of the temporal stride")

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """Latent frames, channels, rows and columns of one chunk's latents."""
        chunk, stride = self.chunk, self.vae.spatial_stride
        frames = (chunk.frame_num - 1) // self.vae.temporal_stride + 1
        return (frames, self.vae.z_dim, chunk.height // stride, chunk.width // stride)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Token grid of one chunk: latent frames, rows and columns of patches."""
        frames, _, rows, columns = self.latent_shape
        return (frames, rows // self.dit.patch_size[1], columns // self.dit.patch_size[2])


FLASHTALK_14B = Config(name="flashtalk-14b")

TINY_RANDOM = Config(
    name="tiny-random",
    dit=DiTConfig(
        dim=256, ffn_dim=512, num_layers=3, num_heads=2, text_dim=64, text_len=128, img_dim=64, img_tokens=65,
        audio_blocks=4, audio_channels=96, intermediate_dim=64, output_dim=96,
    ),
    vae=VAEConfig(dim=8, num_res_blocks=1),
    text=TextConfig(
        vocab_size=384, dim=64, dim_attn=64, dim_ffn=160, num_heads=4, num_layers=2, tokenizer="bytes"
    ),
    image=ImageConfig(vision_dim=64, vision_heads=2, vision_layers=4, image_size=112),
    audio=AudioConfig(
        hidden_size=96, num_hidden_layers=4, num_attention_heads=4, intermediate_size=192, conv_dim=(32,) * 7
    ),
    chunk=ChunkConfig(height=128, width=128),
)  # fmt: skip

# The preset that ships with trained weights: synthetic talking heads of 128 x 128 pixels. Its latents are normalised by
# the weights of the codec, so they have mean 0 and deviation 1. Text and portrait features have no influence.
TINY = Config(
    name="tiny",
    dit=DiTConfig(
        in_dim=100, out_dim=48, dim=256, ffn_dim=768, num_layers=4, num_heads=4, text_dim=64, text_len=128, img_dim=64,
        img_tokens=65, audio_blocks=1, audio_channels=6, intermediate_dim=256, output_dim=96, context_tokens=8,
    ),
    vae=VAEConfig(
        dim=24, z_dim=48, dim_mult=(1, 2, 3), num_res_blocks=1, temperal_downsample=(True, True), patch=2, phases=True,
        latent_mean=(0.0,) * 48, latent_std=(1.0,) * 48,
    ),
    text=TINY_RANDOM.text,
    image=TINY_RANDOM.image,
    # The first convolution is a filter bank of 20 ms every 10 ms, and the third makes one feature of three of its
    # moments. Together they see 40 ms and move by 40 ms: just a frame. So there is one feature per frame and
    # interpolation changes nothing. A wider view would shift features against frames, which are aligned at both ends.
    audio=AudioConfig(
        hidden_size=96, num_hidden_layers=4, num_attention_heads=4, intermediate_size=192, conv_dim=(128, 128, 192),
        conv_kernel=(320, 1, 3), conv_stride=(160, 1, 4), conv_bias=True, feat_extract_norm="layer",
        num_conv_pos_embeddings=9, num_conv_pos_embedding_groups=1, mouth_outputs=6,
    ),
    chunk=ChunkConfig(height=128, width=128, sample_shift=2.0),
)  # fmt: skip

PRESETS = {preset.name: preset for preset in (TINY, TINY_RANDOM, FLASHTALK_14B)}
BUNDLED = (TINY.name,)  # presets whose weights are part of the package


@dataclass(frozen=True)
class FP8Policy:
    """Which linear layers of the student multiply in FP8 (e4m3).

    A layer whose error is above `max_error` is not quantised: the relative error of its output for random inputs, which
    `model.weights.quantize.layer_error` measures.

    Embeddings and modulation stay in the student's dtype, and so do the keys and values of text, image and audio: they
    are computed once per session or per chunk, so FP8 would cost accuracy and save hardly any time. The head stays in
    float32.
    """

    format: ClassVar[str] = "fp8"
    layers: tuple[str, ...] = (  # shell patterns
        "blocks.*.self_attn.qkv",
        "blocks.*.self_attn.o",
        "blocks.*.cross_attn.q",
        "blocks.*.cross_attn.o",
        "blocks.*.audio_cross_attn.q_linear",
        "blocks.*.audio_cross_attn.proj",
        "blocks.*.ffn.up",
        "blocks.*.ffn.down",
    )
    max_error: float = 0.05  # rounding alone: 0.037


@dataclass(frozen=True)
class INT8Policy:
    """Which linear layers of the student multiply in INT8, with rotated operands; other layers as in `FP8Policy`.

    The audio layers stay in the student's dtype: their projections are absorbed into keys and values, which a rotation
    of their weights would have to be taken back for.
    """

    format: ClassVar[str] = "int8"
    layers: tuple[str, ...] = (
        "blocks.*.self_attn.qkv",
        "blocks.*.self_attn.o",
        "blocks.*.cross_attn.q",
        "blocks.*.cross_attn.o",
        "blocks.*.ffn.up",
        "blocks.*.ffn.down",
    )
    max_error: float = 0.03  # rounding alone: 0.014


@dataclass(frozen=True)
class Precision:
    """Dtype of each network's parameters and matrix products. Norms, modulation and colour are always float32.

    `eight_bits` names the student's layers that are e4m3 or int8 instead. `fp8_attention` makes its self-attention
    e4m3. `fp8_vae` names the levels of the VAE's decoder whose residual blocks are e4m3; level 0 is that of latents.
    """

    dit: torch.dtype
    vae: torch.dtype
    text: torch.dtype
    image: torch.dtype
    audio: torch.dtype
    eight_bits: FP8Policy | INT8Policy | None = None
    fp8_attention: bool = False
    fp8_vae: tuple[int, ...] = ()

    @property
    def needs_fp8(self) -> bool:
        """Whether anything is e4m3, which not every GPU can multiply."""
        return isinstance(self.eight_bits, FP8Policy) or self.fp8_attention or bool(self.fp8_vae)


_BF16 = Precision(torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.float16, torch.float32)

PRECISIONS = {
    "fp32": Precision(torch.float32, torch.float32, torch.float32, torch.float32, torch.float32),
    "bf16": _BF16,
    "fp8": dataclasses.replace(_BF16, eight_bits=FP8Policy()),
    "fp8-attn": dataclasses.replace(_BF16, eight_bits=FP8Policy(), fp8_attention=True),
    # The limit is a PSNR of 38 dB. With one level in FP8 it is 39 to 41 dB (random weights of full width, three seeds);
    # with two it is 38 to 39 dB, and 36.5 dB on a whole frame (tests/model/test_vae.py). Level 2, with 192 channels,
    # gains most: it has a third of all products, and FP8 halves their time.
    "fp8-vae": dataclasses.replace(_BF16, eight_bits=FP8Policy(), fp8_attention=True, fp8_vae=(2,)),
    "int8": dataclasses.replace(_BF16, eight_bits=INT8Policy()),
    "int8-vae": dataclasses.replace(_BF16, eight_bits=INT8Policy(), fp8_attention=True, fp8_vae=(2,)),
}
FP8_CAPABILITY = (8, 9)  # the least compute capability of GPUs that multiply e4m3
FORMATS = {policy.format: policy for policy in (FP8Policy(), INT8Policy())}  # of quantised students


def precisions_of(held: str) -> tuple[str, ...]:
    """The precisions whose student is quantised in the format `held`, of `FORMATS`."""
    return tuple(name for name, x in PRECISIONS.items() if x.eight_bits is not None and x.eight_bits.format == held)


# Official settings that are no fields here. Of those in `_FIXED` only one value is implemented, and `from_official`
# refuses the others. Those in `_UNUSED` have no effect.
_FIXED: dict[str, Any] = {
    "model_type": "i2v",
    "window_size": [-1, -1],
    "qk_norm": True,
    "cross_attn_norm": True,
    "norm_input_visual": True,
    "norm_output_audio": True,
    "shared_pos": False,
    "activation": "gelu",
    "attn_scales": [],
}
_JSON_TYPES = {tuple: (list, tuple), float: (float, int)}  # where they differ from the type of the field
_UNUSED = {"dropout", "embed_dim", "vocab_size", "max_text_len", "text_dim", "text_heads", "text_layers"}


def is_known(cls: type, key: str) -> bool:
    """Whether `from_official` uses the official setting `key` for a config of class `cls`."""
    return key in _FIXED or key in {f.name for f in dataclasses.fields(cls)}


C = TypeVar("C", DiTConfig, VAEConfig, TextConfig, ImageConfig, AudioConfig, ChunkConfig)


def from_official(cls: type[C], values: Mapping[str, Any]) -> C:
    """Converts an official mapping (a `config.json`, or the arguments of a constructor) to a config.

    Keys that begin with `_` (notes by diffusers) and settings of unused parts are dropped. Raises `UserError` for a
    setting that is not implemented, so none is ignored silently.
    """
    types = {f.name: type(getattr(cls(), f.name)) for f in dataclasses.fields(cls)}
    kept = {}
    for key, value in values.items():
        if key in types:
            if type(value) not in _JSON_TYPES.get(types[key], (types[key],)):
                raise UserError(f"{key} = {value!r} is no value of this setting, whose type is {types[key].__name__}")
            kept[key] = tuple(value) if isinstance(value, list) else value
        elif key in _FIXED:
            if value != _FIXED[key]:
                raise UserError(f"{key} = {value!r} is not supported, only {_FIXED[key]!r}")
        elif key not in _UNUSED and not key.startswith("_"):
            raise UserError(f"{key} = {value!r} is not a setting of {cls.__name__}")
    return cls(**kept)
