"""Cleaning and tokens against their definitions, the encoder against the golden outputs of the official one."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from model.config import TINY_RANDOM, TextConfig, from_official
from model.errors import UserError
from model.text import TextEncoder, clean, tokenize

GOLDEN = Path(__file__).parents[1] / "golden"
BYTES = TextConfig(tokenizer="bytes")


def filled_encoder() -> TextEncoder:
    config = json.loads((GOLDEN / "t5_encoder.json").read_text())["config"]["t5"]
    with torch.device("meta"):
        encoder = TextEncoder(from_official(TextConfig, config))
    tensors = load_file(GOLDEN / "weights_t5.safetensors")
    param_map = encoder.param_map()
    assert param_map.keys() == tensors.keys()
    encoder.load_state_dict({mapping.params[0]: tensors[name] for name, mapping in param_map.items()}, assign=True)
    return encoder


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  a \n\t b\u00a0c ", "a b c"),
        ("Tom &amp;amp; Ann &lt;3", "Tom & Ann <3"),
        ("a < b &amp;amp;amp; c", "a < b &amp; c"),  # the sign < keeps ftfy from decoding once more
        ("schÃ¶n", "schön"),
        ("Keep Case", "Keep Case"),
        ("", ""),
    ],
)
def test_clean(text: str, cleaned: str) -> None:
    assert clean(text) == cleaned


def test_clean_strips_the_space_that_decoding_leaves() -> None:
    assert clean("&amp;nbsp;a&nbsp;") == "a"


@given(st.text(max_size=40), st.integers(1, 30))
def test_byte_tokens_are_shifted_terminated_and_truncated(text: str, text_len: int) -> None:
    text = text.replace("<", "").replace("&", "")  # neither a special token's name nor an entity
    expected = [*[byte + 3 for byte in clean(text).encode()][: text_len - 1], 1]
    ids = tokenize(text, BYTES, text_len, None)
    assert ids.dtype == torch.int64
    assert ids.tolist() == expected


def save_tokenizer(folder: Path) -> Tokenizer:
    """A tokenizer such as the official one's, of three words and all ASCII letters."""
    words = ["▁talk", "▁a", "ing", "▁", *"abcdefghijklmnopqrstuvwxyz."]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)] + [(word, -float(i)) for i, word in enumerate(words)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "extra_ids": 0}))
    return tokenizer


def test_tokenizer_of_the_checkpoint(tmp_path: Path) -> None:
    expected = save_tokenizer(tmp_path / "google" / "umt5-xxl").encode("a talking bee.").ids
    assert expected[-1] == 1
    config = TextConfig()
    assert tokenize(" a  talking\nbee. ", config, 512, tmp_path).tolist() == expected
    assert tokenize("a talking bee.", config, 4, tmp_path).tolist() == [*expected[:3], 1]
    assert tokenize("", config, 512, tmp_path).tolist() == [1]


@pytest.mark.parametrize("folder", [None, Path("nowhere")])
def test_missing_tokenizer_is_named(folder: Path | None) -> None:
    with pytest.raises(UserError, match=r"google/umt5-xxl") as caught:
        tokenize("a", TextConfig(), 512, folder)
    assert "\n" not in str(caught.value)


def test_broken_tokenizer_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "google" / "umt5-xxl"
    folder.mkdir(parents=True)
    for content in (None, "{}", "not JSON"):
        if content is not None:
            (folder / "tokenizer.json").write_text(content)
        with pytest.raises(UserError, match=r"google/umt5-xxl") as caught:
            tokenize("a", TextConfig(), 512, tmp_path)
        assert "\n" not in str(caught.value)


@torch.inference_mode()
def test_golden_context() -> None:
    encoder, case = filled_encoder(), load_file(GOLDEN / "t5_encoder.safetensors")
    for row, mask in enumerate(case["in.mask"].bool()):
        context = encoder(case["in.ids"][row][mask])
        torch.testing.assert_close(context, case[f"out.context{row}"], rtol=0, atol=2e-5)


@torch.inference_mode()
def test_leaving_out_the_padding_is_exact() -> None:
    encoder = filled_encoder().double()
    ids = torch.randint(1, 97, (23,), generator=torch.Generator().manual_seed(5))
    padded, mask = torch.nn.functional.pad(ids, (0, 40)), torch.arange(63) < 23
    official = encoder.encoder(input_ids=padded[None], attention_mask=mask[None].long()).last_hidden_state[0, :23]
    torch.testing.assert_close(encoder(ids), official, rtol=0, atol=1e-6)


def test_param_map_has_the_official_keys() -> None:
    official = json.loads((GOLDEN / "checkpoint_keys.json").read_text())["t5"]["keys"]
    with torch.device("meta"):
        encoder = TextEncoder(TextConfig())
    param_map = encoder.param_map()
    assert {name: mapping.shape for name, mapping in param_map.items()} == {
        name: tuple(shape) for name, shape in official.items()
    }
    assert {ours for mapping in param_map.values() for ours in mapping.params} == encoder.state_dict().keys()


def test_evaluation_mode_and_bad_ids() -> None:
    encoder = TextEncoder(TINY_RANDOM.text)
    assert not any(module.training for module in encoder.modules())
    with pytest.raises(ValueError, match=r"ids: got torch.float32 \(3,\)"):
        encoder(torch.zeros(3))
