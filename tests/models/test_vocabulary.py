"""Special and added tokens: new ids at the end, old ids where they were, and a BOS that follows its change."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from treetune.models import vocabulary


def make(*, around=False, roberta=False):
    """A byte-level tokenizer with one merged token, `abc`; around: it puts its BOS and EOS around every text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {letter: i for i, letter in enumerate(letters)} | {"ab": 256, "abc": 257, "<s>": 258, "</s>": 259}
    core = Tokenizer(models.BPE(vocab=words, merges=[("a", "b"), ("ab", "c")]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    byte = processors.ByteLevel(trim_offsets=False)
    core.post_processor = byte
    if around:
        template = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 258), ("</s>", 259)])
        core.post_processor = processors.Sequence([byte, template])
    if roberta:
        core.post_processor = processors.RobertaProcessing(("</s>", 259), ("<s>", 258))
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_new_tokens_take_the_next_ids_and_old_ones_stay():
    plain = make()
    out, added = vocabulary.add_tokens(plain, special_tokens={"pad_token": "<pad>", "unk_token": "<unk>"}, tokens=["<a>", "<b c>", "<a>"])
    assert added == ["<pad>", "<unk>", "<a>", "<b c>"]
    assert out.convert_tokens_to_ids(added) == [260, 261, 262, 263] and len(out) == 264
    assert (out.pad_token, out.pad_token_id, out.unk_token, out.eos_token) == ("<pad>", 260, "<unk>", "</s>")
    assert ids(out, "x<b c>y<a>") == [*ids(plain, "x"), 263, *ids(plain, "y"), 262]
    assert ids(out, "abc def") == ids(plain, "abc def")
    assert out.decode([262, 257, 260], skip_special_tokens=True) == "<a>abc"


def test_the_given_tokenizer_stays_as_it_is():
    plain = make()
    before = plain.backend_tokenizer.to_str()
    vocabulary.add_tokens(plain, special_tokens={"pad_token": "<pad>"}, tokens=["<a>"])
    assert plain.backend_tokenizer.to_str() == before and plain.pad_token == "</s>" and len(plain) == 260
    assert vocabulary.add_tokens(plain) == (plain, [])


def test_a_token_that_exists_keeps_its_id():
    out, added = vocabulary.add_tokens(make(), special_tokens={"eos_token": "abc", "pad_token": "</s>"}, tokens=["ab", "</s>"])
    assert added == [] and len(out) == 260 and (out.eos_token_id, out.pad_token_id) == (257, 259)
    assert ids(out, "xab") == [*ids(out, "x"), 256]


def test_a_special_text_listed_twice_stays_special():
    out, added = vocabulary.add_tokens(make(), special_tokens={"pad_token": "<pad>"}, tokens=["<pad>", "<a>"])
    assert added == ["<pad>", "<a>"] and out.decode([260, 261], skip_special_tokens=True) == "<a>"


def test_bos_and_eos_around_a_text_follow_the_change():
    plain = make(around=True)
    assert plain("abc")["input_ids"] == [258, 257, 259]
    out, added = vocabulary.add_tokens(plain, special_tokens={"bos_token": "<go>", "eos_token": "<stop>"})
    assert added == ["<go>", "<stop>"] and out("abc")["input_ids"] == [260, 257, 261]
    swapped, _ = vocabulary.add_tokens(plain, special_tokens={"bos_token": "</s>", "eos_token": "<s>"})
    assert swapped("abc")["input_ids"] == [259, 257, 258]
    pad, _ = vocabulary.add_tokens(plain, special_tokens={"pad_token": "<pad>"})
    assert pad("abc")["input_ids"] == [258, 257, 259]


def test_one_text_that_begins_and_ends_is_renamed_on_one_side_only():
    plain = make(around=True)
    both, _ = vocabulary.add_tokens(plain, special_tokens={"bos_token": "</s>"})
    assert both("abc")["input_ids"] == [259, 257, 259]
    assert vocabulary.add_tokens(both, special_tokens={"eos_token": "<stop>"})[0]("abc")["input_ids"] == [259, 257, 260]
    assert vocabulary.add_tokens(both, special_tokens={"bos_token": "<go>"})[0]("abc")["input_ids"] == [260, 257, 259]


def test_a_rule_that_is_no_template_is_refused():
    with pytest.raises(ValueError, match="puts .'<s>', '</s>'. around every text by a rule of its own"):
        vocabulary.add_tokens(make(roberta=True), special_tokens={"bos_token": "<go>"})


@pytest.mark.parametrize(
    "special, extra, words",
    [
        ({"end_token": "x"}, (), "'end_token'.*expected one of bos_token, eos_token"),
        ({"additional_special_tokens": "x"}, (), "further tokens go into tokens"),
        ({"pad_token": ""}, (), "pad_token has ''.*at least one character"),
        ({"pad_token": None}, (), "pad_token has None"),
        ({}, ("a", ""), "tokens has ''"),
        ({}, (3,), "tokens has 3; expected the text"),
    ],
)
def test_what_is_no_token_is_refused(special, extra, words):
    with pytest.raises(ValueError, match=words):
        vocabulary.add_tokens(make(), special_tokens=special, tokens=extra)


def test_saved_and_read_again_it_is_the_same(tmp_path):
    out, _ = vocabulary.add_tokens(make(around=True), special_tokens={"bos_token": "<go>", "pad_token": "<pad>"}, tokens=["<a>"])
    out.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("x<a><pad>")["input_ids"] == out("x<a><pad>")["input_ids"] and len(again) == len(out)
    assert (again.bos_token_id, again.pad_token_id) == (out.bos_token_id, out.pad_token_id)
    assert again.decode([out.pad_token_id, 262], skip_special_tokens=True) == "<a>"
