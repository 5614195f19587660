"""Tiny random transformers models as oracles, saved to folders, and the streams that both sides read."""

import importlib.util
from pathlib import Path

import pytest
import torch

SIZES = dict(
    vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=128, bos_token_id=None, eos_token_id=None, pad_token_id=None, attn_implementation="eager",
)  # fmt: skip
LLAMA3 = dict(rope_type="llama3", rope_theta=1000.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0)
LONGROPE = dict(
    rope_type="longrope", rope_theta=1000.0, partial_rotary_factor=0.75, short_factor=[1.0, 1.5, 2.0], long_factor=[2.0, 4.0, 9.0]
)
YARN = dict(rope_type="yarn", rope_theta=1000.0, factor=4.0, original_max_position_embeddings=32)
LINEAR = dict(rope_type="linear", rope_theta=1000.0, factor=4.0)
KINDS = {
    "llama": ("Llama", dict(rms_norm_eps=1e-5)),
    "llama3": ("Llama", dict(rope_parameters=LLAMA3 | dict(original_max_position_embeddings=32), head_dim=16)),
    "mistral": ("Mistral", dict(sliding_window=8)),
    "qwen2": ("Qwen2", dict()),
    "qwen3": ("Qwen3", dict(head_dim=16)),
    "mixtral": ("Mixtral", dict(intermediate_size=24, num_local_experts=5, num_experts_per_tok=2, sliding_window=8)),
    "qwen3_moe": ("Qwen3Moe", dict(head_dim=16, moe_intermediate_size=24, num_experts=5, num_experts_per_tok=3, mlp_only_layers=[0])),
    "gpt_oss": (
        "GptOss",
        dict(
            head_dim=16,
            intermediate_size=24,
            num_local_experts=5,
            num_experts_per_tok=2,
            sliding_window=8,
            num_hidden_layers=2,
            swiglu_limit=0.8,
            rope_parameters=YARN | dict(truncate=False),
        ),
    ),
    "smollm3": ("SmolLM3", dict(no_rope_layer_interval=2)),
    "granite": (
        "Granite",
        dict(embedding_multiplier=3.0, attention_multiplier=0.3, residual_multiplier=0.7, logits_scaling=2.5),
    ),
    "olmo2": ("Olmo2", dict()),
    "olmo3": ("Olmo3", dict(sliding_window=8, rope_parameters=dict(full_attention=YARN), num_hidden_layers=4)),
    "gemma": ("Gemma", dict(head_dim=16)),
    "gemma2": (
        "Gemma2",
        dict(head_dim=16, sliding_window=8, query_pre_attn_scalar=20, attn_logit_softcapping=5.0, final_logit_softcapping=4.0),
    ),
    "gemma3": (
        "Gemma3Text",
        dict(
            head_dim=16,
            sliding_window=8,
            query_pre_attn_scalar=20,
            rope_parameters=dict(full_attention=LINEAR),
            num_hidden_layers=3,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
    ),
    "phi3": ("Phi3", dict(rope_parameters=LONGROPE, original_max_position_embeddings=40)),
}


def _build(kind: str, tied: bool):
    import transformers

    name, extra = KINDS[kind]
    config = getattr(transformers, f"{name}Config")(**(SIZES | extra), tie_word_embeddings=tied)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        # No leaf at a neutral start: a bias of 0 or a norm of 1 would hide a leaf that is not used.
        for path, leaf in model.named_parameters():
            neutral = 1.0 if "norm" in path and "Gemma" not in name else 0.0
            leaf.copy_(torch.randn(leaf.shape, generator=generator) * 0.2 + neutral)
    return model


def beside(name):
    """The module of a file in this folder."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def passes():
    """Forward and backward passes of a small model (`passes.py`)."""
    return beside("passes")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """folder(model_type) -> a small random model of an architecture (`architectures.py`), saved by transformers once per session."""
    from treetune.models import plain_model

    architectures = beside("architectures")
    root = tmp_path_factory.mktemp("architectures")

    def save(model_type):
        if not (root / model_type).exists():
            with plain_model.without_bars():
                architectures.save(model_type, root / model_type)
        return root / model_type

    return save


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """plain(prefix, fields) -> a small random model of transformers' class of that prefix, of whole blocks of 64 unless fields say else."""
    import transformers

    root = tmp_path_factory.mktemp("plain")
    sizes = SIZES | dict(hidden_size=64, intermediate_size=192)
    sizes.pop("attn_implementation")

    def save(prefix, fields):
        path = root / f"{prefix} {sorted(fields.items())}".replace("/", "")
        if not path.exists():
            torch.manual_seed(0)
            config = getattr(transformers, f"{prefix}Config")(**sizes | fields)
            getattr(transformers, f"{prefix}ForCausalLM")(config).save_pretrained(path)
        return path

    return save


@pytest.fixture(scope="session")
def oracle(tmp_path_factory):
    """oracle(kind, tied) -> (transformers model in float32, the folder it was saved to); made once."""
    made = {}

    def get(kind: str, tied: bool = False):
        if (kind, tied) not in made:
            model = _build(kind, tied)
            path = tmp_path_factory.mktemp(f"{kind}-{tied}")
            model.save_pretrained(path)
            made[kind, tied] = (model, path)
        return made[kind, tied]

    return get


@pytest.fixture(scope="session")
def stream():
    """stream([ids, ...]) -> the packed batch of bare documents in which every token but the first is scored."""

    def make(documents: list[list[int]], rows: list[int] | None = None) -> dict[str, torch.Tensor]:
        lens = torch.tensor([len(ids) for ids in documents])
        cu = torch.nn.functional.pad(lens.cumsum(0), (1, 0))
        tokens = torch.tensor([token for ids in documents for token in ids])
        positions = torch.cat([torch.arange(size) for size in lens.tolist()])
        at = (torch.arange(len(tokens)))[positions < (lens - 1).repeat_interleave(lens)]
        number = torch.arange(len(documents))
        return {
            "tokens": tokens, "positions": positions, "cu_docs": cu.int(), "at": at, "targets": tokens[at + 1],
            "seq": number.repeat_interleave(lens - 1), "seq_lens": lens - 1, "doc_of_seq": number,
            "row": number if rows is None else torch.tensor(rows),
        }  # fmt: skip

    return make


@pytest.fixture(scope="session")
def stepwise():
    """stepwise(model, ids, first=5) -> hidden states [T, D] as a sampler has them: the first tokens at once, the others one by one."""
    from treetune.models import decoder_attention, dense

    def run(model, ids, first=5):
        cache = dense.Cache(*decoder_attention.buffers(model.cfg, 1, len(ids), ids.device), None, None, 0)
        rows, out = torch.zeros(first, dtype=torch.int64), []
        for lo, hi in [(0, first), *((slot, slot + 1) for slot in range(first, len(ids)))]:
            batch = {"tokens": ids[lo:hi], "positions": torch.arange(lo, hi), "cu_docs": torch.tensor([0, hi - lo])}
            plan = None if lo else decoder_attention.plan(batch, model.cfg)
            step = cache._replace(rows=rows[: hi - lo], slots=batch["positions"], span=hi)
            out.append(dense.forward(model.params, batch, plan, model.cfg, cache=step).hidden)
        return torch.cat(out)

    return run


@pytest.fixture(scope="session")
def documents():
    """Token ids of four ragged documents, the longest well past the tiny window and the tiny llama3 context."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 96, (size,), generator=generator).tolist() for size in (11, 48, 2, 23)]


@pytest.fixture(scope="session")
def words():
    """A fast tokenizer of fewer tokens than the models have rows, with an end token, a chat template and a length."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["<|end|>"], initial_alphabet=list("abc12345Ġ<|>nd"), show_progress=False)
    backend.train_from_iterator(["abc bca cab abc ab bc 12 345"] * 3, trainer)
    template = "{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}"
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", chat_template=template, model_max_length=77)


@pytest.fixture
def float32_products(monkeypatch):
    """bitsandbytes multiplies 4-bit weights in bfloat16 where the processor can, whatever the dtype of the model: not here."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
