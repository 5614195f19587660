"""Mutated files of models and adapters: one line that names file and field, or the logits that transformers and PEFT give."""

import copy
import json
import random
import warnings

import pytest
import torch

from treetune.core import tree
from treetune.models import adapter, dense, hf

FAST, SLOW = 100, 2500  # mutations of each file
IDS = torch.tensor([3, 17, 60, 2, 2, 95, 40])
GONE = object()
VALUES = [
    None, True, False, 0, 1, -1, 2, 3, 7, 8, 64, 10**6, 10**9, 2**31, 2**63, 10**30, 0.0, 0.5, -0.5, 1.0, 1e-30, 1e30, 1e308,
    float("nan"), float("inf"), "", "0", "8", "full_attention", "llama", "silu", "none", "q_proj", "../x", "\u0000", "x" * 300,
    [], [1], [None], ["q_proj"], ["full_attention", "full_attention"], [[[]]], {}, {"a": 1}, {"rope_type": "llama3"}, {"q_proj": 2},
    {"a": {"b": {"c": []}}}, GONE,
]  # fmt: skip
NEW = ["sliding_window", "layer_types", "head_dim", "rope_scaling", "rope_theta", "attention_bias", "mlp_bias", "num_experts",
       "is_causal", "partial_rotary_factor", "logits_scaling", "original_max_position_embeddings", "quantization_config",
       "use_sliding_window"]  # fmt: skip


def paths(value, prefix=()):
    """The path of every field of a nested mapping."""
    found = []
    for name, inner in value.items():
        found.append((*prefix, name))
        found += paths(inner, (*prefix, name)) if isinstance(inner, dict) else []
    return found


def mutations(fields: dict, extra: list[str], count: int, seed: int):
    """(what was changed, the mutated mapping): all values at all fields first, then several fields at once, at random."""
    places = paths(fields) + [(name,) for name in extra]
    single = [[(place, value)] for place in places for value in VALUES]
    draw = random.Random(seed)
    draw.shuffle(single)
    while len(single) < count:
        single.append([(draw.choice(places), draw.choice(VALUES)) for _ in range(draw.randint(2, 4))])
    for changes in single[:count]:
        changed = copy.deepcopy(fields)
        for place, value in changes:
            inner = changed
            for name in place[:-1]:
                inner = inner.get(name) if isinstance(inner, dict) else None
            if isinstance(inner, dict):
                inner.pop(place[-1], None) if value is GONE else inner.__setitem__(place[-1], copy.deepcopy(value))
        yield changes, changed


def one_line(error: ValueError, file, changes) -> None:
    message = str(error)
    assert "\n" not in message and len(message) < 900, message
    assert str(file.parent) in message or file.name in message, (message, changes)


def transformers_logits(folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        return model(IDS[None]).logits[0]


def same(ours, theirs) -> None:
    assert torch.isfinite(ours).all() == torch.isfinite(theirs).all()
    if torch.isfinite(theirs).all():
        torch.testing.assert_close(ours, theirs, atol=1e-4 * max(1.0, float(theirs.abs().max())), rtol=0)


def sizes(request) -> int:
    return SLOW if request.param == "many" else FAST


COUNT = [pytest.param("few", id="few"), pytest.param("many", id="many", marks=pytest.mark.slow)]


@pytest.fixture(params=COUNT)
def count(request):
    return sizes(request)


OTHERS = [
    pytest.param(kind, marks=pytest.mark.slow)
    for kind in ("smollm3", "granite", "olmo3", "gemma", "gemma2", "mixtral", "qwen3_moe", "gpt_oss")
]


@pytest.mark.sampled(5)
@pytest.mark.parametrize("kind", ["llama3", "mistral", "qwen3", "phi3", "gemma3", *OTHERS])
def test_config(oracle, tmp_path, kind, count):
    source = oracle(kind)[1]
    (tmp_path / hf.SINGLE).symlink_to(source / hf.SINGLE)
    fields, taken, told = json.loads((source / "config.json").read_text()), 0, 0
    file = tmp_path / "config.json"
    for changes, changed in mutations(fields, NEW, count // 2, seed=1):
        file.write_text(json.dumps(changed))
        try:
            with torch.no_grad():
                model = hf.load(tmp_path)
                ours = dense.probe(model.params, IDS, model.cfg)
        except ValueError as error:
            one_line(error, file, changes)
            told += 1
            continue
        taken += 1
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                theirs = transformers_logits(tmp_path)
        except Exception:  # transformers asks for types of fields that no logit depends on
            continue
        same(ours, theirs)
    assert taken and told


def test_adapter_config(oracle, tmp_path, count):
    import peft

    model, source = oracle("llama", True)
    base = hf.load(source)
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "v_proj"], modules_to_save=["norm"], task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for leaf in [leaf for leaf in wrapped.parameters() if leaf.requires_grad]:
            leaf.add_(torch.randn(leaf.shape, generator=generator) * 0.1)
    wrapped.save_pretrained(tmp_path)
    file = tmp_path / adapter.CONFIG
    fields, taken, told = json.loads(file.read_text()), 0, 0
    for changes, changed in mutations(fields, ["something_new"], count if count == SLOW else count // 2, seed=2):
        file.write_text(json.dumps(changed))
        try:
            low, whole, _ = adapter.load(tmp_path, base)
        except ValueError as error:
            one_line(error, file, changes)
            told += 1
            continue
        taken += 1
        ours = dense.probe(tree.merge(base.params, whole), IDS, base.cfg, lora=low)
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()(IDS[None]).logits[0]
        except Exception:  # PEFT stops at types of fields that change nothing
            continue
        same(ours, theirs)
    assert taken and told


def test_index_and_generation_config(oracle, tmp_path, words, count):
    source = oracle("llama")[1]
    model = hf.load(source)
    hf.save(tmp_path / "model", model, max_shard_bytes=40_000)
    root = tmp_path / "model"
    (root / "treetune_manifest.json").unlink()
    file = root / hf.INDEX
    for changes, changed in mutations(json.loads(file.read_text()), ["x"], count // 2, seed=3):
        file.write_text(json.dumps(changed))
        try:
            again = hf.load(root)
        except ValueError as error:
            one_line(error, file, changes)
            continue
        assert all(torch.equal(a, b) for a, b in zip(tree.leaves(again.params), tree.leaves(model.params), strict=True))
    file, plain = root / "generation_config.json", {"eos_token_id": [1, 2], "bos_token_id": 1, "pad_token_id": 0, "temperature": 0.5}
    for changes, changed in mutations(plain, ["x"], count // 2, seed=4):
        file.write_text(json.dumps(changed))
        try:
            ids = hf.stop_ids(root, words)
            torch.tensor(ids, dtype=torch.int64)
            assert all(isinstance(one, int) for one in ids)
        except ValueError as error:
            one_line(error, file, changes)


def test_tokenizer_config(tmp_path, words, count):
    """Through the reader that every command uses: what goes through also encodes, decodes and writes a chat."""
    from treetune.core.run.errors import BadInput
    from treetune.models import tokenizer as tokenizers

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    words.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    plain = json.loads(file.read_text()) | {"chat_template": words.chat_template, "add_bos_token": False}
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    extra = ["bos_token", "unk_token", "additional_special_tokens", "added_tokens_decoder", "extra_special_tokens", "auto_map"]
    from treetune.core.data import prompt_ids

    for changes, changed in mutations(plain, extra, count // 2, seed=5):
        file.write_text(json.dumps(changed))
        try:
            tokenizer = tokenizers.load_tokenizer(tmp_path)
            ids = prompt_ids.encode_text(tokenizer, "abc 12")
            assert isinstance(tokenizer.decode(ids), str) and len(tokenizer) > 0
            if tokenizer.chat_template:
                prompt_ids.encode_chat(tokenizer, "abc")
        except (ValueError, BadInput) as error:
            assert "\n" not in str(error) or len(str(error)) < 3000, changes


def test_gguf_keys(oracle, tmp_path, count):
    """Keys of a .gguf file set to other values and types, one at a time; the weights are those of the model."""
    import gguf as package

    from treetune.models import gguf

    sizes = {
        "block_count": 1, "context_length": 128, "embedding_length": 8, "feed_forward_length": 16, "attention.head_count": 2,
        "attention.head_count_kv": 1, "attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 1e4, "rope.dimension_count": 4,
    }  # fmt: skip
    plain = {"general.architecture": "llama"} | {f"llama.{name}": value for name, value in sizes.items()}
    extra = ["llama.attention.sliding_window", "llama.rope.scaling.type", "llama.expert_count", "llama.attention.key_length", "split.count",
             "llama.attention.value_length", "llama.logit_scale", "general.alignment"]  # fmt: skip
    file, taken = tmp_path / "model.gguf", 0
    fitting = [value for value in VALUES if isinstance(value, bool | str | float) or (isinstance(value, int) and -(2**31) <= value < 2**31)]
    cases = [(name, value) for name in (*plain, *extra) for value in (*fitting, [1, 2], ["a"], GONE)]
    random.Random(6).shuffle(cases)
    for name, value in cases[: count // 2]:
        keys = plain | {name: value}
        if name == "general.alignment" and not isinstance(value, int):
            continue
        write_gguf(package, file, {key: one for key, one in keys.items() if one is not GONE})
        try:
            with torch.no_grad():
                model = gguf.load(file)
                logits = dense.probe(model.params, IDS % 32, model.cfg)
        except ValueError as error:
            one_line(error, file, (name, value))
            continue
        taken += 1
        assert logits.shape == (7, 32)
    assert taken


def write_gguf(package, file, keys: dict) -> None:
    """A llama of one layer with these keys, whatever they are."""
    import numpy as np

    writer = package.GGUFWriter(str(file), "llama")
    writer.kv_data[0].clear()
    for key, value in keys.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            (writer.add_int32 if value < 0 else writer.add_uint32)(key, value)
        elif isinstance(value, float):
            with np.errstate(all="ignore"):
                writer.add_float32(key, max(min(value, 3e38), -3e38))
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    generator = np.random.default_rng(1)
    shapes = {"token_embd": (32, 8), "output_norm": (8,), "output": (32, 8)} | {
        f"blk.0.{name}": shape
        for name, shape in {
            "attn_norm": (8,), "attn_q": (8, 8), "attn_k": (4, 8), "attn_v": (4, 8), "attn_output": (8, 8), "ffn_norm": (8,),
            "ffn_gate": (16, 8), "ffn_up": (16, 8), "ffn_down": (8, 16),
        }.items()
    }  # fmt: skip
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", generator.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
