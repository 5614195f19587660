"""Rotary scalings against transformers: frequencies and attention factor, and the choice of a document by its own length."""

import math

import pytest
import torch

from treetune.core import fields
from treetune.models import hf_rope, rope_scaling
from treetune.models.hf_rope import Options

DIM, MAX = 16, 256
FACTORS = {"short_factor": [1.0 + 0.1 * i for i in range(DIM // 2)], "long_factor": [2.0 + 0.5 * i for i in range(DIM // 2)]}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
KINDS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": LLAMA3,
    "llama3 without a length": {name: value for name, value in LLAMA3.items() if name != "original_max_position_embeddings"},
    "yarn": YARN,
    "yarn, no length": {"rope_type": "yarn", "factor": 4.0},
    "yarn, mscale": YARN | {"mscale": 1.2, "mscale_all_dim": 0.7},
    "yarn, one mscale": YARN | {"mscale": 1.2, "mscale_all_dim": 0.0},
    "yarn, factor": YARN | {"attention_factor": 0.8},
    "yarn, bounds": YARN | {"beta_fast": 20.0, "beta_slow": 2, "truncate": False},
    "yarn, one point": YARN | {"beta_fast": 1.0, "beta_slow": 1.0, "original_max_position_embeddings": 6},
    "longrope": {"rope_type": "longrope", "original_max_position_embeddings": 64} | FACTORS,
    "longrope, factor": {"rope_type": "longrope", "factor": 8.0, "original_max_position_embeddings": 64} | FACTORS,
    "longrope, attention": {"rope_type": "longrope", "attention_factor": 1.3, "original_max_position_embeddings": 64} | FACTORS,
}


def peer(parameters, part=1.0, **lengths):
    """Frequencies and factor of cosine and sine in transformers."""
    import transformers
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    sizes = dict(hidden_size=2 * DIM, num_attention_heads=2, max_position_embeddings=MAX)
    rope = {"rope_theta": 5000.0, "partial_rotary_factor": part} | parameters
    config = transformers.LlamaConfig(**sizes, rope_parameters=rope)
    if config.rope_parameters["rope_type"] == "default":
        return Phi3RotaryEmbedding.compute_default_rope_parameters(config)
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    return ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config, torch.device("cpu"), **lengths)


def ours(parameters, part=1.0):
    values = {"rope_parameters": {"rope_theta": 5000.0, "partial_rotary_factor": part} | parameters}
    return hf_rope.read(fields.mapping(values, "config.json"), MAX, DIM, Options(partial=True))


def stream(lens):
    positions = torch.cat([torch.arange(size) for size in lens])
    return {"positions": positions, "cu_docs": torch.tensor([0, *lens]).cumsum(0).int()}


@pytest.mark.parametrize("kind", KINDS)
def test_equals_transformers(kind):
    read = ours(KINDS[kind])
    rotation = rope_scaling.rotation(read.rope, DIM, stream([5]))
    inv_freq, factor = peer(KINDS[kind])
    torch.testing.assert_close(rotation.inv_freq.expand(5, -1), inv_freq.expand(5, -1), rtol=2e-6, atol=0)
    assert rotation.scale == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("kind", ["default", "linear", "yarn"])
def test_part_of_a_head(kind):
    read = ours(KINDS[kind], part=0.5)
    torch.testing.assert_close(rope_scaling.inv_freq(read.rope, int(DIM * read.part), torch.device("cpu")), peer(KINDS[kind], 0.5)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_config_round_trip(kind):
    read = ours(KINDS[kind], part=1.0)
    again = hf_rope.read(fields.mapping({"rope_parameters": hf_rope.to_hf(*read[::2])}, "config.json"), MAX, DIM, Options())
    assert again == read


def test_long_documents_turn_by_the_long_factors_alone():
    read = ours(KINDS["longrope"])
    rotation = rope_scaling.rotation(read.rope, DIM, stream([10, 65, 64]))
    short, long = (peer(KINDS["longrope"], seq_len=size)[0] for size in (64, 65))
    for rows, expected in ((slice(0, 10), short), (slice(10, 75), long), (slice(75, 139), short)):
        torch.testing.assert_close(rotation.inv_freq[rows], expected.expand(rows.stop - rows.start, -1), rtol=2e-6, atol=0)


def test_a_tree_is_as_long_as_its_longest_path():
    read = ours(KINDS["longrope"])
    batch = {"positions": torch.cat([torch.arange(40), torch.arange(40, 60), torch.arange(40, 60)]), "cu_docs": torch.tensor([0, 80])}
    short = peer(KINDS["longrope"])[0]
    torch.testing.assert_close(rope_scaling.rotation(read.rope, DIM, batch).inv_freq[7], short, rtol=2e-6, atol=0)
    assert rope_scaling.shared_positions(read.rope, MAX) == 64 and rope_scaling.shared_positions(ours(YARN).rope, MAX) == MAX


def test_dynamic_scales_nothing_up_to_the_positions_of_the_model():
    assert torch.equal(peer(KINDS["dynamic"], seq_len=MAX)[0], peer(KINDS["default"])[0])
    assert not torch.allclose(peer(KINDS["dynamic"], seq_len=MAX + 1)[0], peer(KINDS["default"])[0], rtol=1e-4)


REFUSED = [
    ({"rope_type": "proportional"}, "the type"), ({"rope_type": "linear"}, "factor"), ({"rope_type": "linear", "factor": 0}, "factor"),
    (YARN | {"mrope_section": [1, 1]}, "mrope_section"), ({"rope_type": "longrope"}, "short_factor"),
    ({"rope_type": "longrope"} | FACTORS | {"long_factor": [1.0]}, "long_factor"),
    ({"rope_type": "longrope"} | FACTORS | {"short_factor": [1.0] * 7 + ["x"]}, "short_factor"),
    (KINDS["longrope"] | {"short_mscale": 1.2}, "short_mscale"), (YARN | {"truncate": None}, "truncate"),
    (YARN | {"rope_theta": 1.0}, "rope_theta"),
    ({"rope_type": "linear", "factor": math.inf}, "factor"), (KINDS["linear"] | {"attention_factor": 2.0}, "attention_factor"),
    ({"partial_rotary_factor": 1.5}, "partial_rotary_factor"), ({"partial_rotary_factor": 0.2}, "partial_rotary_factor"),
]  # fmt: skip


@pytest.mark.parametrize("parameters,name", REFUSED)
def test_refused_by_name(parameters, name):
    with pytest.raises(ValueError, match=name) as caught:
        ours(parameters)
    assert "config.json: rope_parameters" in str(caught.value) and "\n" not in str(caught.value)


def test_a_part_is_refused_where_the_family_turns_whole_heads():
    values = {"rope_parameters": {"partial_rotary_factor": 0.5}}
    with pytest.raises(ValueError, match="not computed by this family"):
        hf_rope.read(fields.mapping(values, "config.json"), MAX, DIM, Options())


def test_samplers_keep_to_what_turns_alike():
    from treetune.models import decode, dense, hf

    sizes = dict(vocab_size=40, hidden_size=32, mlp_size=32, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=DIM, max_positions=MAX)
    rope = ours(KINDS["longrope"]).rope
    model = hf.random("llama", dense.Config(**sizes, rope_theta=rope.theta, rope_scaling=rope.scaling), seed=0)
    assert decode.sample(model, [[1] * 60], max_new_tokens=4, seed=0).tokens.shape == (1, 4)
    with pytest.raises(ValueError, match="need 65 positions; the model has 64"):
        decode.sample(model, [[1] * 60], max_new_tokens=5, seed=0)


def test_branches_beyond_what_turns_alike_are_refused():
    from treetune.models import decoder_attention, dense

    rope = ours(KINDS["longrope"]).rope
    sizes = dict(vocab_size=40, hidden_size=32, mlp_size=32, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=DIM, max_positions=MAX)
    cfg = dense.Config(**sizes, rope_theta=rope.theta, rope_scaling=rope.scaling)
    trunk, branch = torch.arange(60), torch.arange(60, 64)
    batch = {"tokens": torch.zeros(68, dtype=torch.int64), "cu_docs": torch.tensor([0, 68])} | {
        "positions": torch.cat([trunk, branch, branch]), "start": torch.full((68,), 60),
        "branch": torch.tensor([0] * 60 + [1] * 4 + [2] * 4),
    }  # fmt: skip
    assert decoder_attention.plan(batch, cfg).tokens == 68
    with pytest.raises(ValueError, match="has 65 positions; answers that share a prompt have at most 64"):
        decoder_attention.plan(batch | {"positions": batch["positions"] + 1}, cfg)
