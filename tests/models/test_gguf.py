"""GGUF files written here the way llama.cpp's converter writes them, read back and compared with their source."""

import gguf as package
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import quants
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from treetune.core import tree
from treetune.models import decoder_config, dense, gguf, hf, rope_scaling

BLOCK = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
}  # fmt: skip
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(key):
    module, _, kind = key.rpartition(".")
    if module in TOP:
        return f"{TOP[module]}.{kind}"
    number, _, rest = module.removeprefix("model.layers.").partition(".")
    return f"blk.{number}.{BLOCK[rest]}.{kind}"


def permute(weight, heads):
    """llama.cpp, convert_hf_to_gguf.py: LlamaModel.permute."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write(path, model, quantised=Kind.F32, tokenizer=None, edit=None):
    """Write a transformers model; returns the state dict after rounding to the quantised types."""
    config = model.config
    arch = config.model_type
    writer = package.GGUFWriter(str(path), arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if arch == "llama":
        writer.add_rope_dimension_count(config.head_dim)
    else:
        writer.add_key_length(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    if tokenizer is not None:
        add_tokenizer(writer, *tokenizer)
    rounded = {}
    for key, leaf in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array, heads = leaf.numpy(), {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        name = key.split(".")[-2]
        permuted = arch == "llama" and name in heads
        array = permute(array, heads[name]) if permuted else array
        kind = quantised if array.ndim == 2 and name != "embed_tokens" else Kind.Q8_0 if array.ndim == 2 else Kind.F32
        kind = Kind.F32 if quantised == Kind.F32 else kind
        data = quants.quantize(np.ascontiguousarray(array), kind)
        writer.add_tensor(gguf_name(key), data, raw_dtype=kind)
        back = quants.dequantize(data, kind)
        inverse = np.argsort(permute(np.arange(array.shape[0])[:, None], heads[name])[:, 0]) if permuted else slice(None)
        rounded[key] = torch.from_numpy(back[inverse].copy())
    if edit is not None:
        edit(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return rounded


@pytest.mark.sampled(3)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_float_file_is_the_model(oracle, documents, tmp_path, kind, tied):
    model, _ = oracle(kind, tied)
    write(tmp_path / "model.gguf", model)
    ours = hf.load(tmp_path / "model.gguf")
    assert ours.family == kind and ours.cfg == hf.load(oracle(kind, tied)[1]).cfg
    for path, leaf in tree.items(ours.params):
        assert torch.equal(leaf, model.state_dict()[hf.hf_key(kind, path)]), path
    ids = torch.tensor(documents[1])
    with torch.no_grad():
        torch.testing.assert_close(dense.probe(ours.params, ids, ours.cfg), model(ids[None]).logits[0], atol=2e-5, rtol=0)


@pytest.mark.parametrize("quantised", [Kind.Q4_1, Kind.Q8_0, Kind.F16, Kind.BF16])
def test_quantised_files_are_dequantised(oracle, tmp_path, quantised):
    model, _ = oracle("llama", True)
    rounded = write(tmp_path / "model.gguf", model, quantised)
    ours = gguf.load(tmp_path / "model.gguf")
    low = gguf.load(tmp_path / "model.gguf", dtype=torch.bfloat16)
    assert not torch.equal(rounded["model.layers.0.mlp.up_proj.weight"], model.state_dict()["model.layers.0.mlp.up_proj.weight"])
    for (path, leaf), half in zip(tree.items(ours.params), tree.leaves(low.params), strict=True):
        assert torch.equal(leaf, rounded[hf.hf_key("llama", path)]), path
        assert torch.equal(half, leaf.bfloat16())
    assert low.cfg.dtype == torch.bfloat16


def test_frequency_factors_are_the_llama3_scaling(oracle, documents, tmp_path):
    """The converter writes factors for a context of 8192, low 1, high 4: so must the source here."""
    import copy

    from transformers import LlamaForCausalLM

    base, _ = oracle("llama")
    config = copy.deepcopy(base.config)
    rope = dict(rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
    config.rope_parameters = rope | dict(original_max_position_embeddings=8192)
    config.head_dim = 32
    model = LlamaForCausalLM(config).eval()
    plain = 1.0 / 5e5 ** (torch.arange(0, 32, 2).float() / 32)
    factors = (plain / model.model.rotary_emb.inv_freq).numpy()
    assert factors.min() == pytest.approx(1.0) and factors.max() == pytest.approx(8.0) and len(set(factors.round(3))) == 3
    write(tmp_path / "model.gguf", model, edit=lambda writer: writer.add_tensor(gguf.FACTORS, factors))
    ours = gguf.load(tmp_path / "model.gguf")
    assert ours.cfg.rope_scaling == rope_scaling.Llama3Rope(8.0, 1.0, 4.0, 8192)
    torch.testing.assert_close(decoder_config.inv_freq(ours.cfg, torch.device("cpu")), model.model.rotary_emb.inv_freq, atol=0, rtol=1e-6)
    ids = torch.tensor(documents[1])
    with torch.no_grad():
        torch.testing.assert_close(dense.probe(ours.params, ids, ours.cfg), model(ids[None]).logits[0], atol=2e-5, rtol=0)
    wrong = np.linspace(1, 8, 16, dtype=np.float32)
    write(tmp_path / "wrong.gguf", model, edit=lambda writer: writer.add_tensor(gguf.FACTORS, wrong))
    with pytest.raises(ValueError, match="not those of Llama 3.1"):
        gguf.load(tmp_path / "wrong.gguf")


def test_what_is_not_known_is_refused(oracle, tmp_path):
    model, _ = oracle("llama")
    file = tmp_path / "model.gguf"
    for edit, message in (
        (lambda writer: writer.add_rope_scaling_type(package.RopeScalingType.YARN), 'rope.scaling.type must be none.*got "yarn"'),
        (lambda writer: writer.add_tensor("blk.0.attn_q.bias", np.zeros(32, np.float32)), "first is layers.0.q_bias"),
        (lambda writer: writer.add_tensor("blk.0.ffn_gate_inp.weight", np.zeros((4, 32), np.float32)), "ffn_gate_inp"),
    ):
        write(file, model, edit=edit)
        with pytest.raises(ValueError, match=message):
            gguf.load(file)
    writer = package.GGUFWriter(str(file), "gemma3")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ValueError, match='architecture must be one of llama, qwen2, qwen3, got "gemma3"'):
        gguf.load(file)
    file.write_bytes(b"not a gguf file at all")
    with pytest.raises(ValueError, match="cannot be read as GGUF"):
        gguf.load(file)
    with pytest.raises(ValueError, match="cannot be read as GGUF"):
        gguf.load(tmp_path / "absent.gguf")


WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEXTS = [
    "Hello world, it's 2024: 12345 + 67 = 12412!",
    "  two  spaces\n\nlines\t tabs   ",
    "I'LL don't we've O'Neil",
    "naïve café, e\u0301 Ünï 東京 1½ ٣٤",
    "<|im_start|>user\nhi<|im_end|> <|im_end|>x",
    "x=1;y=22;z=333;w=4444",
    "",
    " ",
    "emoji 🙂🙃 done",
    "\r\nwin\r\n",
]


def trained(pre):
    """The tokenizer of a model family, as its tokenizer.json has it, trained on a little text."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre in ("gpt-2", "smollm"))
    backend = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    parts = {
        "gpt-2": [],
        "smollm": [pre_tokenizers.Digits(individual_digits=True)],
        "llama-bpe": [pre_tokenizers.Split(Regex(WORDS), behavior="isolated", invert=False)],
        "qwen2": [pre_tokenizers.Split(Regex(WORDS.replace("{1,3}", "")), behavior="isolated", invert=False)],
    }
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Sequence([*parts[pre], level]), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    backend.train_from_iterator([text for text in TEXTS for _ in range(3)] + ["12345 12345 123 hello world"] * 5, trainer)
    if pre == "qwen2":
        from tokenizers import normalizers

        backend.normalizer = normalizers.NFC()
    if pre == "llama-bpe":
        begin = ("<|endoftext|>", 0)
        backend.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[begin])
    backend.add_tokens([AddedToken("<tool>", normalized=False)])
    return backend


def add_tokenizer(writer, backend, pre, add_bos=None, kind="gpt2"):
    import json

    vocab = backend.get_vocab()
    tokens = sorted(vocab, key=vocab.get)
    added = {index: token for index, token in backend.get_added_tokens_decoder().items()}
    types = [1 if i not in added else 3 if added[i].special else 4 for i in range(len(tokens))]
    merges = json.loads(backend.to_str())["model"]["merges"]
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*tokens, "[PAD421]"])
    writer.add_token_types([*types, 5])
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    if add_bos is not None:
        writer.add_add_bos_token(add_bos)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}")


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_tokenizer_is_the_one_of_the_family(oracle, tmp_path, pre):
    source = trained(pre)
    write(tmp_path / "model.gguf", oracle("llama")[0], tokenizer=(source, pre))
    ours = hf.tokenizer(tmp_path / "model.gguf")
    for text in TEXTS:
        ids = source.encode(text).ids
        assert ours(text)["input_ids"] == ids, text
        assert ours.decode(ids) == source.decode(ids, skip_special_tokens=False)
    assert (ours.bos_token, ours.eos_token, ours.pad_token) == ("<|endoftext|>", "<|im_end|>", "<|im_end|>")
    assert ours.convert_tokens_to_ids("<tool>") == source.token_to_id("<tool>") and len(ours) == source.get_vocab_size()
    assert ours.decode(ours("a<tool>b<|im_end|>")["input_ids"], skip_special_tokens=True).endswith("a<tool>b")
    rendered = ours.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert rendered == "<|im_start|>hi<|im_end|>" and ours.model_max_length == 128


def test_splits_of_numbers_differ_between_families(oracle, tmp_path):
    """The digits of 12345 are one, three or five at a time: a wrong pre-tokenizer would be seen."""
    pieces = {}
    for pre in ("gpt-2", "smollm", "llama-bpe", "qwen2"):
        write(tmp_path / "model.gguf", oracle("llama")[0], tokenizer=(trained("gpt-2"), pre, False))
        pieces[pre] = gguf.tokenizer(tmp_path / "model.gguf").tokenize("12345")
    assert pieces["gpt-2"] == ["12345"] and pieces["llama-bpe"] == ["123", "45"]
    assert pieces["smollm"] == pieces["qwen2"] == ["1", "2", "3", "4", "5"]


@pytest.mark.parametrize("add_bos", [False, True])
def test_bos_is_added_when_the_file_says_so(oracle, tmp_path, add_bos):
    write(tmp_path / "model.gguf", oracle("llama")[0], tokenizer=(trained("smollm"), "smollm", add_bos))
    ours = gguf.tokenizer(tmp_path / "model.gguf")
    assert ours("hello")["input_ids"].count(ours.bos_token_id) == int(add_bos)
    assert ours.bos_token_id not in ours("hello", add_special_tokens=False)["input_ids"]


def test_tokenizer_survives_saving(oracle, tmp_path):
    """Saved beside the model, it loads the same through AutoTokenizer."""
    from transformers import AutoTokenizer

    write(tmp_path / "model.gguf", oracle("llama")[0], tokenizer=(trained("smollm"), "smollm", True))
    ours = gguf.tokenizer(tmp_path / "model.gguf")
    hf.save(tmp_path / "saved", gguf.load(tmp_path / "model.gguf"), tokenizer=ours)
    auto, again = AutoTokenizer.from_pretrained(tmp_path / "saved"), hf.tokenizer(tmp_path / "saved")
    for text in TEXTS:
        assert auto(text)["input_ids"] == again(text)["input_ids"] == ours(text)["input_ids"]
    assert auto.chat_template == again.chat_template == ours.chat_template
    assert (auto.eos_token_id, auto.pad_token_id) == (again.eos_token_id, again.pad_token_id) == (2, 2)


@pytest.mark.parametrize("pre,kind", [("deepseek-llm", "gpt2"), ("smollm", "llama")])
def test_unknown_tokenizers_are_refused(oracle, tmp_path, pre, kind):
    write(tmp_path / "model.gguf", oracle("llama")[0], tokenizer=(trained("gpt-2"), pre, None, kind))
    with pytest.raises(ValueError, match="expected 'gpt2' with one of gpt-2, smollm, llama-bpe, qwen2"):
        gguf.tokenizer(tmp_path / "model.gguf")
