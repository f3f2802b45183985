"""From a prompt to text features: cleaning, tokens, the umT5 encoder."""

import html
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from model.config import TextConfig
from model.errors import UserError
from model.param_map import ParamMapping, pattern_map

# {official tensor name: our parameter name}
OFFICIAL_TO_PARAM: dict[str, str | tuple[str, ...]] = {
    "token_embedding.weight": "encoder.embed_tokens.weight",
    "blocks.{i}.norm1.weight": "encoder.block.{i}.layer.0.layer_norm.weight",
    "blocks.{i}.attn.q.weight": "encoder.block.{i}.layer.0.SelfAttention.q.weight",
    "blocks.{i}.attn.k.weight": "encoder.block.{i}.layer.0.SelfAttention.k.weight",
    "blocks.{i}.attn.v.weight": "encoder.block.{i}.layer.0.SelfAttention.v.weight",
    "blocks.{i}.attn.o.weight": "encoder.block.{i}.layer.0.SelfAttention.o.weight",
    "blocks.{i}.pos_embedding.embedding.weight": (
        "encoder.block.{i}.layer.0.SelfAttention.relative_attention_bias.weight"
    ),
    "blocks.{i}.norm2.weight": "encoder.block.{i}.layer.1.layer_norm.weight",
    "blocks.{i}.ffn.gate.0.weight": "encoder.block.{i}.layer.1.DenseReluDense.wi_0.weight",
    "blocks.{i}.ffn.fc1.weight": "encoder.block.{i}.layer.1.DenseReluDense.wi_1.weight",
    "blocks.{i}.ffn.fc2.weight": "encoder.block.{i}.layer.1.DenseReluDense.wo.weight",
    "norm.weight": "encoder.final_layer_norm.weight",
}


def clean(text: str) -> str:
    """`text` with repaired Unicode, decoded HTML entities (twice), and each run of whitespace replaced by one space."""
    import ftfy  # imported here because machines that only generate do not need it

    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(text)))).strip()


def tokenize(text: str, config: TextConfig, text_len: int, folder: Path | None) -> Tensor:
    """Token ids of the cleaned `text` with the end-of-sequence id, truncated to `text_len` ids; int64 [L].

    1 <= L <= text_len, and the end-of-sequence id is kept when the text is truncated. `folder` is the checkpoint folder
    that holds the tokenizer `config.tokenizer`. The tokenizer "bytes", whose ids are UTF-8 bytes plus 3, needs none.
    Nothing is downloaded. Raises `UserError` if the tokenizer is missing or cannot be read.
    """
    if config.tokenizer == "bytes":
        from transformers import ByT5Tokenizer

        tokenizer = ByT5Tokenizer()
    else:
        tokenizer = _load_tokenizer((folder or Path()) / config.tokenizer)
    ids = tokenizer(clean(text), truncation=True, max_length=text_len)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def _load_tokenizer(path: Path):
    from transformers import AutoTokenizer

    if not path.is_dir():
        raise UserError(f"no tokenizer folder {path}: download it with the checkpoint")
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # of any kind: the files may hold anything
        raise UserError(f"{path} holds no readable tokenizer: download it again") from error


class TextEncoder(nn.Module):
    """umT5 encoder: RMS norms, unscaled attention with position biases in each layer, tanh-GELU gated FFN."""

    def __init__(self, config: TextConfig) -> None:
        from transformers import UMT5Config, UMT5EncoderModel  # which takes seconds

        super().__init__()
        self.config = config
        # Only the encoder stack is kept, because the whole model holds the embedding under two names.
        self.encoder = UMT5EncoderModel(
            UMT5Config(
                vocab_size=config.vocab_size,
                d_model=config.dim,
                d_kv=config.dim_attn // config.num_heads,
                d_ff=config.dim_ffn,
                num_heads=config.num_heads,
                num_layers=config.num_layers,
                relative_attention_num_buckets=config.num_buckets,
                relative_attention_max_distance=config.max_dist,
                layer_norm_epsilon=config.norm_eps,
                feed_forward_proj="gated-gelu",
            )
        ).encoder
        self.eval()

    def param_map(self) -> dict[str, ParamMapping]:
        """The map of the official text checkpoint's tensors to the parameters of this module."""
        return pattern_map(self, OFFICIAL_TO_PARAM, self.config.num_layers)

    def forward(self, ids: Tensor) -> Tensor:
        """Text features of token ids without padding, int64 [L] -> [L, dim] in the weights' dtype.

        Leaving out the padding is exact: the official code pads to `text_len`, but masks padded keys and returns only
        the rows of real tokens, and positions enter only as differences.
        """
        if ids.ndim != 1 or ids.dtype != torch.int64:
            raise ValueError(f"ids: got {ids.dtype} {tuple(ids.shape)}, wanted int64 [L]")
        return self.encoder(input_ids=ids[None]).last_hidden_state[0]
