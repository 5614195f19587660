"""Starts by the covariance of inputs (CorDA). PEFT is the oracle, in float64; a run of the command orients itself by its own rows."""

import copy
import dataclasses
import importlib.util
import sys
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from treetune.core import lora, quant, tree
from treetune.core.quant import Scheme
from treetune.models import adapter, decoder_attention, dense, families, hf, input_covariances, plain_model, policy
from treetune.models.adapter import Base
from treetune.models.adapter_starts import Given
from treetune.models.policy import AdapterSpec
from treetune.ops import lora_linear

METHODS = {"corda": "kpm", "corda_ipm": "ipm"}
TARGETS: dict[str, tuple[str, ...]] = {"llama": ("q_proj", "up_proj", "down_proj"), "gpt_neox": ("query_key_value", "dense_4h_to_h")}


@pytest.fixture
def of_family(oracle, folder):
    """of_family(name) -> (a model of transformers, its folder): one of ours, and one that runs transformers' own modules."""
    return lambda name: oracle(name) if name == "llama" else (plain_model.load(folder(name)), folder(name))


def batches(documents, cfg):
    singles = [dense.single(torch.tensor(ids)) for ids in documents[:3]]
    return [(one, decoder_attention.plan(one, cfg)) for one in singles]


def adapted(model, documents, **options: Any):
    inputs = partial(input_covariances.measure, model, batches(documents, model.cfg))
    spec = AdapterSpec(rank=4, alpha=12.0)._replace(**options)
    return policy.adapt(model, spec, base=Base("x", ""), seed=3, given=Given(inputs=inputs))


def in_peft(model, documents, targets, method, monkeypatch) -> Any:
    """The model that PEFT starts, of decompositions in float64: PEFT's own are in float32, whose inverses are far from exact."""
    import peft

    if importlib.util.find_spec("attr") is None:  # which PEFT imports for one record, and does not install
        monkeypatch.setitem(sys.modules, "attr", SimpleNamespace(dataclass=dataclasses.dataclass))
    from peft.tuners.lora import corda
    from peft.tuners.lora.config import CordaConfig

    config = peft.LoraConfig(
        r=4, lora_alpha=12, target_modules=list(targets), init_lora_weights="corda", corda_config=CordaConfig(corda_method=method)
    )
    wide, narrow = copy.deepcopy(model).double(), copy.deepcopy(model)
    targeted: Any = corda.target_modules

    def run() -> None:
        for ids in documents[:3]:
            wide(torch.tensor([ids]))

    with monkeypatch.context() as patched, torch.no_grad():
        patched.setattr(torch.Tensor, "float", torch.Tensor.double)
        corda.preprocess_corda(wide, config, run_model=run)
    for (_, source), (_, module) in zip(targeted(wide, config), targeted(narrow, config), strict=True):
        module.eigens = source.eigens
    return peft.get_peft_model(narrow, config)


@pytest.mark.parametrize("init", METHODS)
@pytest.mark.parametrize("family", TARGETS)
def test_pairs_and_residual_weights_are_those_of_peft(of_family, documents, monkeypatch, family, init):
    model, folder = of_family(family)
    ours = hf.load(folder, dtype=torch.float64)
    start = adapted(ours, documents, init=init, targets=TARGETS[family])
    theirs = in_peft(model, documents, TARGETS[family], METHODS[init], monkeypatch)
    pairs, leaves = lora.pairs(start.params["lora"]), dict(tree.items(ours.params))
    assert len(pairs) == sum(hasattr(module, "lora_A") for module in theirs.modules()) > 0
    for path, (a, b) in pairs.items():
        module = theirs.get_submodule(f"base_model.model.{adapter.module(family, path)}")
        their_a, their_b = (part["default"].weight.double() for part in (module.lora_A, module.lora_B))
        torch.testing.assert_close(b.double() @ a.double(), their_b @ their_a, atol=1e-5, rtol=0)
        residual = leaves[path] - 3.0 * b.double() @ a.double()
        torch.testing.assert_close(residual, module.base_layer.weight.double(), atol=1e-5, rtol=0)
        sign = (a.double() * their_a).sum(1).sign()  # each direction is known up to its sign
        torch.testing.assert_close(a.double(), sign[:, None] * their_a, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(b.double(), sign * their_b, atol=1e-4, rtol=1e-3)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("options", [{}, dict(dora=True)], ids=str)
@pytest.mark.parametrize("scheme", [None, Scheme("nf4")], ids=str)
def test_it_starts_as_its_base_and_is_saved_as_a_plain_adapter(oracle, documents, tmp_path, options, scheme):
    model, ids = hf.load(oracle("llama")[1], scheme=scheme), torch.tensor(documents[1])
    start = adapted(model, documents, init="corda_ipm", ranks=(("q_proj", 2),), **options)
    logits = families.document_logits
    current, low = policy.current(start)
    assert torch.equal(logits(current, ids, lora=low), logits(model, ids))
    gen = torch.Generator().manual_seed(1)
    params = tree.map(lambda leaf: leaf + 0.02 * torch.randn(leaf.shape, generator=gen), start.params)
    current, low = policy.current(start, params)
    expected = logits(current, ids, lora=low)
    assert (expected - logits(model, ids)).abs().max() > 1e-3
    policy.save(start, tmp_path, params=params)
    low, _, info = adapter.load(tmp_path, model)
    assert info.rank == 8 and {a.shape[0] for a, _ in lora.pairs(low.tree).values()} == {4, 8}
    assert (logits(model, ids, lora=low) - expected).abs().max() < 1e-4
    if scheme is not None:
        assert quant.quantised(dict(tree.items(model.params))["layers.0.q_proj"])


def test_layers_are_measured_in_turns(oracle, documents, monkeypatch):
    """Of inputs that the layers before them make, whatever is measured together; the inputs of q, k and v are the same."""
    model = hf.load(oracle("llama")[1])
    paths, read = lora.linears(hf.abstract_of(model)), batches(documents, model.cfg)
    once = dict(input_covariances.measure(model, read, paths))
    monkeypatch.setattr(input_covariances, "AT_ONCE", 1)
    turns = dict(input_covariances.measure(model, read, paths))
    assert list(once) == list(turns) == paths
    assert all(torch.equal(once[path], turns[path]) for path in paths)
    assert torch.equal(once["layers.1.q_proj"], once["layers.1.v_proj"])
    assert not torch.equal(once["layers.0.q_proj"], once["layers.1.q_proj"])


def test_seeing_inputs_changes_no_output():
    gen = torch.Generator().manual_seed(0)
    x, w, v, a, b = (torch.randn(shape, generator=gen) for shape in ((7, 5), (6, 5), (4, 5), (2, 5), (4, 2)))
    seen = lora_linear.unseen(5, torch.float64, x.device)
    one, two = lora_linear.lora_linears(x, [w, v], [seen, {"A": a, "B": b}], scale=2.0)
    plain, _ = lora_linear.lora_linears(x, [w, v], [None, {"A": a, "B": b}], scale=2.0)
    assert torch.equal(one, plain)
    torch.testing.assert_close(one, x @ w.T)
    torch.testing.assert_close(two, x @ v.T + 2 * x @ a.T @ b.T)
    lora_linear.lora_linears(3 * x, [w], [seen], scale=1.0)
    wide = x.double() / x.max()
    torch.testing.assert_close(seen["C"], 2 * wide.T @ wide)
    assert seen["N"] == 2


def test_refused_by_name(oracle, documents):
    model = hf.load(oracle("llama")[1])
    with pytest.raises(ValueError, match="lora_init corda starts from rows of the training data"):
        policy.adapt(model, AdapterSpec(init="corda"), base=Base("x", ""), seed=0)
    with pytest.raises(ValueError, match="lora_init corda_ipm needs lora_dropout 0"):
        adapted(model, documents, init="corda_ipm", dropout=0.1)
    with pytest.raises(ValueError, match="lora_init corda: rank 4096 on layers.0.q_proj"):
        adapted(model, documents, init="corda", rank=4096)
    with pytest.raises(ValueError, match="lora_init corda is computed on linear layers only, and layers.0.experts"):
        adapted(hf.load(oracle("mixtral")[1]), documents, init="corda", targets=("q_proj", "experts"))
    broken = model._replace(params=tree.map(torch.clone, model.params))
    broken.params["embed_tokens"].zero_()
    with pytest.raises(ValueError, match="inputs of layers.0.q_proj are not finite, or all 0"):
        adapted(broken, documents, init="corda", targets=("q_proj",))
