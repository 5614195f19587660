import pytest
import torch

from treetune.core import lora, tree
from treetune.core.param import Param

LAYER = {
    "norm": Param((4,), axes=("embed",)),
    "q_proj": Param((6, 4), axes=("heads", "embed"), op="linear"),
    "o_proj": Param((4, 6), op="linear"),
}
SIZES = {
    "embed_tokens": Param((11, 4), axes=("vocab", "embed"), op="embedding"),
    "layers": [LAYER] * 3,
    "norm": Param((4,)),
    "lm_head": Param((11, 4), axes=("vocab", "embed"), op="head"),
}
ALL = [f"layers.{i}.{name}" for i in range(3) for name in ("q_proj", "o_proj")]


def test_scale():
    assert lora.scale(rank=16, alpha=32) == 2.0
    assert lora.scale(rank=16, alpha=32, rslora=True) == 8.0


def test_match_takes_all_linears_regexes_and_layers():
    assert lora.match(SIZES, "all-linear") == ALL
    assert lora.match(SIZES, ["o_proj", r"layers\.1\.q"]) == ["layers.0.o_proj", "layers.1.q_proj", "layers.1.o_proj", "layers.2.o_proj"]
    assert lora.match(SIZES, "q_proj$", layers=[2, 0]) == ["layers.0.q_proj", "layers.2.q_proj"]
    assert lora.match(SIZES, ["q_proj", "lm_head"], layers=[1]) == ["layers.1.q_proj", "lm_head"]


@pytest.mark.parametrize(
    "targets, layers, words",
    [
        ("q_porj", None, r"'q_porj' matches no parameter; the nearest are q_proj,.*; the model has embed_tokens, q_proj, o_proj, lm_head"),
        (["q_proj", "v_proj"], None, "'v_proj' matches no parameter"),
        (r"layers\.0\.norm", None, r"matches layers\.0\.norm, which is no linear layer"),  # a vector cannot be adapted
        ("q_(proj", None, r"'q_\(proj' is not a regular expression"),
        ("all-linear", [0, 3], r"layers \[3\] do not exist: the model has layers 0 to 2"),
        (r"layers\.0\.q_proj", [1, 2], r"none of the targets is in layers \[1, 2\]; they are layers\.0\.q_proj"),
    ],
)
def test_targets_that_match_nothing_are_refused(targets, layers, words):
    with pytest.raises(ValueError, match=words):
        lora.match(SIZES, targets, layers=layers)


def test_abstract_shapes_axes_and_start():
    found = lora.abstract(SIZES, ["layers.1.q_proj", "embed_tokens"], rank=2)
    assert found["layers"][0] == {} and len(found["layers"]) == 2
    assert found["layers"][1]["q_proj"] == {
        "A": Param((2, 4), axes=("rank", "embed"), init="kaiming"),
        "B": Param((6, 2), axes=("heads", "rank"), init="zeros"),
    }
    # PEFT's embedding pair: A [r, V] zero, B [D, r] normal.
    assert found["embed_tokens"]["A"] == Param((2, 11), axes=("rank", "vocab"), init="zeros")
    assert found["embed_tokens"]["B"] == Param((4, 2), axes=("embed", "rank"), init="normal:1.0")


def test_merge_adds_the_scaled_product_rounded_once():
    gen = torch.Generator().manual_seed(0)
    model = tree.map(lambda leaf: torch.randn(leaf.shape, generator=gen).bfloat16(), SIZES)
    found = tree.map(lambda p: torch.randn(p.shape, generator=gen), lora.abstract(SIZES, ["layers.1.q_proj", "embed_tokens"], rank=2))
    merged = lora.merge(model, found, 0.5)
    q, e = found["layers"][1]["q_proj"], found["embed_tokens"]
    want = (model["layers"][1]["q_proj"].double() + 0.5 * q["B"].double() @ q["A"].double()).bfloat16()
    assert torch.equal(merged["layers"][1]["q_proj"], want)
    assert torch.equal(merged["embed_tokens"], (model["embed_tokens"].double() + 0.5 * (e["B"].double() @ e["A"].double()).T).bfloat16())
    changed = {path for path, leaf in tree.items(merged) if not torch.equal(leaf, dict(tree.items(model))[path])}
    assert changed == {"layers.1.q_proj", "embed_tokens"}


@pytest.mark.parametrize("path, other", [("lm_head", "embed_tokens"), ("embed_tokens", "lm_head")])
def test_merging_one_side_of_a_tied_pair_unties_it(path, other):
    gen = torch.Generator().manual_seed(0)
    model = tree.map(lambda leaf: torch.randn(leaf.shape, generator=gen), {k: v for k, v in SIZES.items() if k != "lm_head"})
    found = tree.map(lambda p: torch.randn(p.shape, generator=gen), lora.abstract(SIZES, [path], rank=2))
    merged = lora.merge(model, found, 1.0)
    assert torch.equal(merged[other], model["embed_tokens"]) and not torch.equal(merged[path], model["embed_tokens"])


def _key(path: str) -> str:
    return f"model.{path}.weight"


def test_peft_names_go_out_and_come_back():
    paths = ["layers.2.o_proj", "embed_tokens"]
    found = lora.init(SIZES, paths, rank=2, seed=1)
    file = lora.to_peft(found, _key)
    assert set(file) == {
        "base_model.model.model.layers.2.o_proj.lora_A.weight", "base_model.model.model.layers.2.o_proj.lora_B.weight",
        "base_model.model.model.embed_tokens.lora_embedding_A", "base_model.model.model.embed_tokens.lora_embedding_B",
    }  # fmt: skip
    back = lora.from_peft(file, [*ALL, "embed_tokens", "lm_head"], _key)
    assert all(torch.equal(back_leaf, dict(tree.items(found))[path]) for path, back_leaf in tree.items(back))
    assert {path for path, _ in tree.items(back)} == {path for path, _ in tree.items(found)}


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda file: file | {"base_model.model.model.layers.9.o_proj.lora_A.weight": torch.zeros(1)}, "1 tensors that this model cannot"),
        (lambda file: {key: leaf for key, leaf in file.items() if "lora_B" not in key}, "layers.2.o_proj.A but not layers.2.o_proj.B"),
        (lambda file: {key: leaf for key, leaf in file.items() if "lora_A" not in key}, "layers.2.o_proj.B but not layers.2.o_proj.A"),
        (lambda file: {}, "holds no LoRA tensors"),
    ],
)
def test_an_adapter_file_must_be_used_whole(change, words):
    file = lora.to_peft(lora.init(SIZES, ["layers.2.o_proj"], rank=2, seed=1), _key)
    with pytest.raises(ValueError, match=words):
        lora.from_peft(change(file), ALL, _key)


def _logp(base, used, stream):
    from treetune.models import logprobs

    return logprobs(base.family, base.cfg, base.params, stream, lora=used).logp


@pytest.mark.parametrize("targets", ["all-linear", ["embed_tokens", "lm_head", "q_proj"]])
def test_a_fresh_adapter_is_the_identity(model, batch, documents, targets):
    from treetune.models import hf

    base, stream = model(), batch(documents())
    sizes = hf.abstract_of(base, head=True)
    fresh = lora.Lora(lora.init(sizes, lora.match(sizes, targets), rank=3, seed=0), 2.0)
    torch.testing.assert_close(_logp(base, fresh, stream), _logp(base, None, stream), rtol=0, atol=1e-6)


@pytest.mark.parametrize("targets", ["all-linear", ["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head", "gate_proj"]])
def test_merging_is_the_adapter(model, adapter, batch, documents, targets):
    base, stream = model(torch.float64), batch(documents())
    used = adapter(base, targets=targets)
    merged = base._replace(params=lora.merge(tree.map(torch.Tensor.float, base.params), used.tree, used.scale))
    merged = merged._replace(params=tree.map(torch.Tensor.double, merged.params))
    torch.testing.assert_close(_logp(merged, None, stream), _logp(base, used, stream), rtol=0, atol=2e-5)
    assert (_logp(base, used, stream) - _logp(base, None, stream)).abs().max() > 0.01


def test_dropout_is_a_function_of_seed_and_row_and_not_of_packing(model, adapter, batch, documents):
    base, docs = model(torch.float64), documents()
    used = adapter(base, dropout=0.4, targets=["q_proj", "down_proj", "lm_head"])._replace(seed=torch.tensor(3))
    together = _logp(base, used, batch(docs))
    alone = torch.cat([_logp(base, used, batch([doc])) for doc in docs])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
    backwards = _logp(base, used, batch(docs[::-1]))
    counts = batch(docs[::-1])["seq_lens"].tolist()
    torch.testing.assert_close(together, torch.cat(backwards.split(counts)[::-1]), rtol=0, atol=1e-12)
    other = _logp(base, used._replace(seed=torch.tensor(4)), batch(docs))
    assert (other - together).abs().max() > 1e-3 and (together - _logp(base, used._replace(dropout=0.0), batch(docs))).abs().max() > 1e-3
