"""GGUF files written by us and read back: every family, tied or not, each type, tokenizer and template; what is refused."""

from dataclasses import replace

import gguf as package
import pytest
import torch

from treetune.core import tree
from treetune.models import decoder_config, gguf, gguf_export, gguf_tokenizer, gguf_writer, hf, rope_scaling
from treetune.models.gguf_export import Source

SIZES = dict(
    vocab_size=264, hidden_size=64, mlp_size=96, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, max_positions=512, init_std=0.05,
)  # fmt: skip
OF_FAMILY = {"llama": {}, "qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": True, "head_dim": 32}}
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


def tiny(family, **changed):
    cfg = decoder_config.Config(**SIZES | OF_FAMILY[family] | changed)
    model = hf.random(family, cfg, seed=3)
    # Vectors start as ones and zeros, which would not show in another place.
    noise = torch.Generator().manual_seed(1)
    return model._replace(
        params=tree.map(lambda leaf: leaf + 0.1 * torch.randn(leaf.shape, generator=noise) if leaf.ndim == 1 else leaf, model.params)
    )


def tokenizer(pre="smollm"):
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("1", "2"), ("12", "3"), ("t", "h"), ("Ġ", "th")]
    vocab = {piece: index for index, piece in enumerate([*letters, *(a + b for a, b in merges)])}
    core = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre == "llama-bpe"))
    split = gguf.SPLITS[pre]
    first = [pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []
    first += [] if split is None else [pre_tokenizers.Split(Regex(split), behavior="isolated")]
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    core.pre_tokenizer, core.decoder = pre_tokenizers.Sequence([*first, level]), decoders.ByteLevel()
    if pre == "qwen2":
        core.normalizer = normalizers.NFC()
    fast = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE)
    fast.add_tokens([AddedToken("<tool>", normalized=False)])
    return fast


@pytest.mark.sampled(3)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", OF_FAMILY)
def test_a_file_in_float32_gives_the_model_back(family, tied, tmp_path):
    model, path = tiny(family, tied=tied), tmp_path / "m.gguf"
    written = gguf_export.write(path, Source(model, None, tokenizer(), "m"), "f32", ["a conversation"])
    read = gguf.load(path)
    assert read.family == family and read.cfg == replace(model.cfg, init_std=read.cfg.init_std)
    assert ("lm_head" in read.params) != tied
    for (leaf_path, leaf), other in zip(tree.items(model.params), tree.leaves(read.params), strict=True):
        assert torch.equal(leaf, other), leaf_path
    assert written.difference.largest == 0 and written.tokens > len("a conversation") and written.bytes == path.stat().st_size


@pytest.mark.parametrize("kind,bits", [("f16", 11), ("bf16", 8)])
def test_sixteen_bits_are_rounded_once(kind, bits, tmp_path):
    model, path = tiny("llama"), tmp_path / "m.gguf"
    written = gguf_export.write(path, Source(model, None, tokenizer(), "m"), kind)
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[kind]
    for leaf, other in zip(tree.leaves(model.params), tree.leaves(gguf.load(path).params), strict=True):
        assert torch.equal(other, leaf.to(dtype).float() if leaf.ndim == 2 else leaf)
        assert ((leaf - other).abs() <= 2.0**-bits * leaf.abs() + 2.0**-25).all()
    assert 0 < written.difference.kl < gguf_export.LARGEST_KL[kind]


def test_eight_bits_are_off_by_half_a_step_and_other_rows_are_float16(tmp_path):
    model, path = tiny("qwen3", hidden_size=48, mlp_size=64), tmp_path / "m.gguf"
    written = gguf_export.write(path, Source(model, None, tokenizer(), "m"), "q8_0")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in package.GGUFReader(str(path)).tensors}
    assert kinds["blk.0.attn_q.weight"] == "F16" and kinds["blk.0.ffn_down.weight"] == "Q8_0" and kinds["output_norm.weight"] == "F32"
    read = dict(tree.items(gguf.load(path).params))
    for name, leaf in tree.items(model.params):
        if leaf.ndim == 2 and leaf.shape[1] % 32 == 0:
            blocks, others = (one.reshape(-1, 32) for one in (leaf, read[name]))
            step = blocks.abs().amax(1, keepdim=True) / 127
            # Half a step of rounding, and the step itself in float16.
            assert ((blocks - others).abs() <= step * (0.5 + 127 * 2.0**-11) + 1e-7).all(), name
            assert not torch.equal(blocks, others)
    assert 0 < written.difference.kl < gguf_export.LARGEST_KL["q8_0"]
    with pytest.raises(ValueError, match="off by a mean KL of .* more than max_kl 1e-09: not kept"):
        gguf_export.write(tmp_path / "n.gguf", Source(model, None, tokenizer(), "m"), "q8_0", max_kl=1e-9)


def test_frequency_factors_of_llama31_come_back(tmp_path):
    model, path = tiny("llama", rope_theta=5e5, rope_scaling=rope_scaling.Llama3Rope(8.0, 1.0, 4.0, 8192), head_dim=32), tmp_path / "m.gguf"
    written = gguf_export.write(path, Source(model, None, tokenizer(), "m"), "f32")
    assert gguf.load(path).cfg.rope_scaling == model.cfg.rope_scaling and written.difference.largest < 1e-4


@pytest.mark.parametrize("pre", gguf.SPLITS)
def test_the_tokenizer_comes_back(pre, tmp_path):
    source, path = tokenizer(pre), tmp_path / "m.gguf"
    gguf_export.write(path, Source(tiny("llama"), None, source, "m", source.convert_tokens_to_ids("<tool>")), "f32")
    read = gguf.tokenizer(path)
    assert gguf_tokenizer.check_same(source, read, "m") >= len(gguf_tokenizer.TEXTS)
    assert (read.chat_template, len(read), read.eos_token, read.pad_token) == (TEMPLATE, len(source), "<|im_end|>", "<|endoftext|>")
    keys = {name: field.contents() for name, field in package.GGUFReader(str(path)).fields.items() if name.startswith("tokenizer")}
    assert keys["tokenizer.ggml.pre"] == pre and keys["tokenizer.ggml.eot_token_id"] == source.convert_tokens_to_ids("<tool>")
    assert len(keys["tokenizer.ggml.tokens"]) == SIZES["vocab_size"] and keys["tokenizer.ggml.add_bos_token"] is False
    assert source("12 three")["input_ids"] == read("12 three")["input_ids"]


def test_a_tokenizer_that_differs_is_told():
    ours, other = tokenizer("smollm"), tokenizer("gpt-2")
    with pytest.raises(ValueError, match="m: the tokenizer of the file reads '12345"):
        gguf_tokenizer.check_same(ours, other, "m")
    other = tokenizer("smollm")
    other.chat_template = TEMPLATE + " "
    with pytest.raises(ValueError, match="m: the chat template of the file is"):
        gguf_tokenizer.check_same(ours, other, "m")
    other = tokenizer("smollm")
    other.pad_token = "<tool>"
    with pytest.raises(ValueError, match="m: the pad token of the file is"):
        gguf_tokenizer.check_same(ours, other, "m")


def test_bos_is_kept_and_told_where_conversations_lack_it(tmp_path):
    from tokenizers import processors

    source, path = tokenizer("llama-bpe"), tmp_path / "m.gguf"
    source.bos_token = "<|endoftext|>"
    bos = (source.bos_token, source.bos_token_id)
    source.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[bos])
    gguf_export.write(path, Source(tiny("llama"), None, source, "m"), "f32")
    assert gguf.tokenizer(path)("a")["input_ids"][0] == source.bos_token_id
    assert gguf_tokenizer.unwritten_bos(source, ["<|im_start|>x"]) == "<|endoftext|>"
    assert gguf_tokenizer.unwritten_bos(source, ["<|endoftext|>x"]) is None


def test_what_files_do_not_hold_is_refused(tmp_path):
    model = tiny("llama")
    for changed, message in (
        ({"window": 64}, "m has a sliding window of 64 tokens"),
        ({"rope_scaling": rope_scaling.LinearRope(2.0)}, "m has the rope scaling LinearRope"),
        ({"rope_scaling": rope_scaling.Llama3Rope(8.0, 1.0, 4.0, 4096)}, "m has the rope scaling Llama3Rope"),
    ):
        with pytest.raises(ValueError, match=message):
            gguf_writer.check("llama", replace(model.cfg, **changed), "m")
    scaled = replace(model.cfg, rope_scaling=gguf.llama31(8.0))
    gguf_writer.check("llama", scaled, "m")
    for family in ("qwen2", "qwen3"):
        with pytest.raises(ValueError, match=f"m is a {family} model with the rope scaling of Llama 3.1"):
            gguf_writer.check(family, scaled, "m")
    with pytest.raises(ValueError, match="m is a gemma2 model; GGUF files are written of llama, qwen2, qwen3"):
        gguf_writer.check("gemma2", model.cfg, "m")
    model.params["layers"][0]["up_proj"][3, 5] = 1e5
    with pytest.raises(ValueError, match="blk.0.ffn_up.weight has the number 1e.05.*take --gguf bf16"):
        gguf_export.write(tmp_path / "m.gguf", Source(model, None, tokenizer(), "m"), "f16")
    small = tiny("llama", vocab_size=200)
    with pytest.raises(ValueError, match="the tokenizer has a token of id 262, and the model 200 rows"):
        gguf_export.write(tmp_path / "m.gguf", Source(small, None, tokenizer(), "m"), "f16")
    words = tokenizer()
    from tokenizers import pre_tokenizers

    words.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match="m has a BPE tokenizer that is not byte-level BPE split as gpt-2, smollm"):
        gguf_export.write(tmp_path / "m.gguf", Source(tiny("llama"), None, words, "m"), "f16")
