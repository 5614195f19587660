"""Tokens to text: nothing is lost, no character is cut, whatever the vocabulary."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from treetune.core.data import detokenise

FAMILY, FLAG, THUMB, ACCENT = "👨‍👩‍👧‍👦", "🇩🇪🇫🇷", "👍🏽", "e\u0301a\u0308"
TEXTS = [
    "plain words, 1 + 1", "你好，世界！", "日本語のテキスト", "한국어", FAMILY, FLAG, THUMB, ACCENT, "שלום עולם", "مرحبا بالعالم",
    "mixed 你 a 👍 b\n\n\tc", " leading and trailing ", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈", "a\ufffdb", "\ufffd", "", "naïve café", "<|im_end|>x",
]  # fmt: skip


def bytes_alone():
    """Each byte is a token, as in a byte-level BPE without merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>")


def byte_fallback():
    """Letters with ▁ for a space, and bytes for all that is not among them, as in Llama 2."""
    known = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *"▁abcdefghijklmnopqrstuvwxyz+1,你"]
    core = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(known)}, merges=[], unk_token="<unk>", byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def pieces_of_words():
    """Word pieces, whose decoder joins them."""
    known = ["[UNK]", *"abcdefghij", *(f"##{letter}" for letter in "abcdefghij")]
    core = Tokenizer(models.WordPiece(vocab={text: i for i, text in enumerate(known)}, unk_token="[UNK]"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]")


KINDS = {"bytes": bytes_alone(), "fallback": byte_fallback()}


def whole(tokenizer, ids):
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS)
def test_units_in_a_row_are_the_text(kind, text):
    tokenizer = KINDS[kind]
    ids = tokenizer(text)["input_ids"]
    found = list(detokenise.decode_units(tokenizer, ids))
    assert [token for unit in found for token in unit.tokens] == ids
    assert "".join(unit.text for unit in found) == whole(tokenizer, ids) == text
    if "\ufffd" not in text:
        assert all("\ufffd" not in unit.text for unit in found)
        assert max((len(unit.text) for unit in found), default=0) <= max(1, len("<|im_end|>") * ("<" in text))  # each character alone


def test_words_of_pieces_keep_their_letters_and_spaces():
    tokenizer = pieces_of_words()
    ids = tokenizer("abc de f")["input_ids"]
    assert "".join(unit.text for unit in detokenise.decode_units(tokenizer, ids)) == whole(tokenizer, ids) == "abc de f"


@pytest.mark.parametrize("seed", range(20))
def test_any_bytes_whatever_keep_all_their_tokens(seed):
    """Cut and mixed bytes are U+FFFD where they are no character, and every whole character around them is there."""
    rng, tokenizer = random.Random(seed), KINDS["bytes"]
    ids = [token for text in rng.choices(TEXTS, k=6) for token in tokenizer(text)["input_ids"] if rng.random() > 0.1]
    found = list(detokenise.decode_units(tokenizer, ids))
    assert [token for unit in found for token in unit.tokens] == ids
    assert all(len(unit.tokens) <= detokenise.LONGEST for unit in found)
    kept = "".join(unit.text for unit in found).replace("\ufffd", "")
    assert kept == whole(tokenizer, ids).replace("\ufffd", "")


def test_a_character_of_two_labels_has_the_one_that_completes_it():
    tokenizer = KINDS["bytes"]
    ids = tokenizer("a你b")["input_ids"]
    assert detokenise.label_units(tokenizer, ids, ["off", "off", "off", "on", "on"]) == [("a", "off"), ("你", "on"), ("b", "on")]


def test_a_growing_text_is_told_in_whole_characters():
    tokenizer, parts = KINDS["bytes"], []
    decoder = detokenise.Decoder(tokenizer, skip_special_tokens=True)
    for token in tokenizer("hi 👍🏽 你<|im_end|>")["input_ids"]:
        parts.append("".join(unit.text for unit in decoder.push(token)))
    assert [part for part in parts if part] == ["h", "i", " ", "👍", "🏽", " ", "你"]


def test_what_is_left_half_is_told_at_the_end():
    decoder = detokenise.Decoder(KINDS["bytes"])
    half = KINDS["bytes"]("👍")["input_ids"][:2]
    assert [decoder.push(token) for token in half] == [[], []]
    assert "".join(unit.text for unit in decoder.flush()).strip("\ufffd") == "" and not decoder.pending
