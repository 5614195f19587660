"""The memory table against what torch allocates in training steps of a random model, and its terms against the trees themselves."""

import dataclasses

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from treetune.core import grad, layer_offload, lora, optim, optim_blocks, param, quant, registry, tree
from treetune.core.lora import Lora
from treetune.core.quant import Scheme
from treetune.models import MODELS, Model, decode, decoder_attention, dense, families, memory, quantised
from treetune.models.memory import Setup, Table

CFG = dense.Config(
    vocab_size=2048, hidden_size=192, mlp_size=512, num_layers=5, num_heads=6, num_kv_heads=2, head_dim=32, tied=True, dtype=torch.float32
)
TOKENS, DOCUMENTS = 768, 3


def stream():
    """Documents of equal length, every token read."""
    size = TOKENS // DOCUMENTS
    tokens = torch.randint(0, CFG.vocab_size, (TOKENS,), generator=torch.Generator().manual_seed(0))
    return {
        "tokens": tokens, "positions": torch.arange(size).repeat(DOCUMENTS), "at": torch.arange(TOKENS), "targets": tokens,
        "cu_docs": torch.arange(0, TOKENS + 1, size, dtype=torch.int32), "seq": torch.arange(DOCUMENTS).repeat_interleave(size),
        "seq_lens": torch.full((DOCUMENTS,), size), "doc_of_seq": torch.arange(DOCUMENTS), "row": torch.arange(DOCUMENTS),
    }  # fmt: skip


def loaded(cfg, setup):
    """Random weights as a run has them: what trains, and what does not."""
    abstract = MODELS["llama"].abstract(cfg, dtype=cfg.dtype if setup.rank else torch.float32)
    if setup.master == 2:
        abstract = tree.map(lambda leaf: leaf._replace(dtype=torch.bfloat16) if len(leaf.shape) > 1 else leaf, abstract)
    model = param.init(abstract, seed=0)
    if not setup.rank:
        return {"model": model}, {}
    keep = quantised.keeping(abstract, setup.scheme, cfg.dtype)._replace(home=layer_offload.home(setup.layers, torch.device("cpu")))
    model = tree.from_items([(path, keep(path, leaf)) for path, leaf in tree.items(model)])
    return {"lora": lora.init(abstract, lora.linears(abstract), rank=setup.rank, seed=0)}, {"model": model}


def measured(cfg, setup, optimizer=None):
    """The most bytes that torch holds at once while a model trains one step of two micro-batches, its weights included."""
    batch, optimizer = stream(), optimizer or optim.adamw()

    params, frozen = loaded(cfg, setup)
    weights = memory.size(params) + memory.frozen(frozen, torch.device("cpu"))[0]

    def run():
        state, total = optimizer.init(params), None

        def loss(params):
            weights = tree.merge(frozen.get("model", {}), params.get("model", {}))
            low = Lora(params["lora"], 2.0) if setup.rank else None
            return families.logprobs("llama", cfg, weights, batch, lora=low, remat=setup.remat).logp.sum(), None

        for _ in range(2):
            _, total = grad.value_and_grad(loss)(params, into=total)
        optimizer.update(total, state, params, torch.tensor(1e-3))

    return weights + most(run)


def most(run):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events = sorted((event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"), key=lambda e: e.start_ns())
    held = top = 0
    for event in events:
        held += event.nbytes()
        top = max(top, held)
    return top


def check(dtype, rank, scheme, master=4):
    """Peaks within 7 % of the table, and what a policy saves within 10 % of what the table says."""
    cfg = dataclasses.replace(CFG, dtype=dtype)
    abstract, peaks, tables = MODELS["llama"].abstract(cfg), {}, {}
    for policy in (None, "selective", "full", "full+disk"):
        setup = Setup(TOKENS, rank, scheme, memory.state_bytes(optim.adamw()), policy, master=master)
        peaks[policy], tables[policy] = measured(cfg, setup), memory.table(abstract, cfg, setup)
        assert tables[policy].peak == pytest.approx(peaks[policy], rel=0.07), (policy, peaks[policy], tables[policy])
    for policy in ("selective", "full", "full+disk"):
        fall = tables[None].peak - tables[policy].peak
        assert fall == pytest.approx(peaks[None] - peaks[policy], rel=0.1), policy
    assert peaks["full+disk"] < peaks["full"] < peaks["selective"] < peaks[None]


@pytest.mark.more
def test_peaks_of_an_adapter_are_those_of_the_table():
    check(torch.float32, 8, None)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rank", "scheme"), [(8, None), (0, None), (8, Scheme("nf4")), (8, Scheme("int8"))])
def test_peaks_are_those_of_the_table(dtype, rank, scheme):
    check(dtype, rank, scheme)


@pytest.mark.slow
def test_peaks_of_bfloat16_weights_are_those_of_the_table():
    check(torch.bfloat16, 0, None, master=2)


def falls(setups, cfg=CFG, optimizers=None):
    """Peaks within 7 % of the table, and what each setup saves against the first within 10 % of what the table says."""
    abstract, optimizers = MODELS["llama"].abstract(cfg), optimizers or [None] * len(setups)
    tables = [memory.table(abstract, cfg, setup) for setup in setups]
    peaks = [measured(cfg, setup, optimizer) for setup, optimizer in zip(setups, optimizers, strict=True)]
    for setup, said, seen in zip(setups, tables, peaks, strict=True):
        assert said.peak == pytest.approx(seen, rel=0.07), (setup, seen, said)
        assert tables[0].peak - said.peak == pytest.approx(peaks[0] - seen, rel=0.1), (setup, seen, said)
    return peaks, tables


# Mostly weights: wide layers, and a short stream.
HEAVY = dataclasses.replace(CFG, hidden_size=384, mlp_size=1280, num_heads=12, num_layers=4)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [None, Scheme("nf4")])
def test_peaks_fall_by_the_layers_that_are_away(scheme, monkeypatch):
    """On a CPU by all of them; on a device, here one that is in the memory of this one, two stay."""
    base = Setup(TOKENS, 8, scheme, remat="full")
    _, (_, away) = falls([base, base._replace(layers="disk")], HEAVY)
    assert away.away > 0
    monkeypatch.setattr(layer_offload, "way", lambda device: Copies())
    card = base._replace(layers="disk")
    window = memory.travelling(MODELS["llama"].abstract(HEAVY), HEAVY, card._replace(device="cuda"))[1]
    assert window == pytest.approx(2 / HEAVY.num_layers * away.away, rel=0.01)
    said = memory.table(MODELS["llama"].abstract(HEAVY), HEAVY, card)
    assert said.peak + window == pytest.approx(measured(HEAVY, card), rel=0.07)


class Copies:
    """A lane to a device in the memory of this one."""

    def send(self, parts):
        return [part.clone() for part in parts], None

    def wait(self, mark):
        pass

    def drop(self, parts):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peaks_fall_by_what_schemes_save(dtype):
    schemes = [None, Scheme("nf4"), Scheme("nf4", double=False), Scheme("fp4"), Scheme("int8"), Scheme("fp8")]
    falls([Setup(TOKENS, 8, scheme, remat="full") for scheme in schemes], dataclasses.replace(HEAVY, dtype=dtype, num_layers=10))


@pytest.mark.slow
def test_peaks_fall_by_what_optimizers_save():
    makes = [optim.adamw(), optim.sgd(), optim_blocks.adamw_8bit()]
    setups = [Setup(TOKENS, 0, None, memory.state_bytes(make), "full") for make in makes]
    falls(setups, HEAVY, makes)


@pytest.mark.more
def test_the_peak_of_a_sampler_is_that_of_the_table():
    """Keys, values and distributions, over the weights that are there."""
    cfg = dataclasses.replace(CFG, vocab_size=4096)
    model = Model("llama", cfg, param.init(MODELS["llama"].abstract(cfg), seed=0))
    for n, new, top_p in ((4, 40, 1.0), (4, 8, 0.9), (12, 8, 1.0)):
        seen = most(lambda: decode.sample(model, [[1, 2, 3, 4] * 8] * 3, n=n, max_new_tokens=new, seed=0, top_p=top_p))  # noqa: B023
        said = memory.table(MODELS["llama"].abstract(cfg), cfg, Setup(rows=3 * n, slots=32 + new, nucleus=top_p < 1))
        assert said.cache + said.draws == pytest.approx(seen, rel=0.07), (n, new, top_p)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("scheme", [None, Scheme("nf4"), Scheme("fp4", double=False), Scheme("int4"), Scheme("int8"), Scheme("fp8")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_those_of_a_loaded_tree(scheme, dtype):
    cfg = dataclasses.replace(CFG, dtype=dtype, num_layers=2)
    abstract = MODELS["llama"].abstract(cfg)
    params, frozen = loaded(cfg, Setup(rank=4, scheme=scheme))
    origins = sum(leaf.origin.numbers.nbytes for leaf in tree.leaves(frozen) if isinstance(leaf, quantised.quant.Quantised))
    said = memory.table(abstract, cfg, Setup(rank=4, scheme=scheme))
    assert said.weights == memory.size(frozen) - origins and said.adapter == memory.size(params)


@pytest.mark.parametrize(
    ("name", "size"),
    [("adamw", 8), ("lion", 4), ("sgd", 0), ("adamw_8bit", 2.03), ("adamw_4bit", 1.06), ("muon", 4), ("apollo_mini", 0.008)],
)
def test_states_of_an_optimizer_are_measured_on_a_matrix(name, size):
    optimizer = registry.bind(registry.choose(registry.OPTIMIZERS, name))()
    assert memory.state_bytes(optimizer) == pytest.approx(size, abs=0.02)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", "fp8"])
def test_a_leaf_is_quantised_in_little_more_than_what_it_becomes(kind):
    """Some numbers at a time, so that what is computed on the way does not grow with the leaf."""
    weight = torch.randn(1024, 4096, generator=torch.Generator().manual_seed(0))
    leaf = quant.quantise(weight, Scheme(kind))
    assert most(lambda: quant.quantise(weight, Scheme(kind))) < leaf.nbytes + 24 * quant.CHUNK
    if kind in quant.FOUR_BITS:
        assert most(lambda: quant.dense(leaf, torch.bfloat16)) < 2 * weight.numel() + 12 * quant.CHUNK


def test_the_cache_is_that_of_the_sampler():
    keys, values = decoder_attention.buffers(CFG, 6, 40, torch.device("cpu"))
    assert memory.cache(CFG, 6, 40) == sum(one.nbytes for one in (*keys, *values))


def test_a_sampler_on_a_cpu_has_quantised_leaves_dense():
    abstract, setup = MODELS["llama"].abstract(CFG), Setup(TOKENS, rank=4, scheme=Scheme("nf4"), rows=6, slots=40)
    linears = sum(param.count(leaf) for leaf in tree.leaves(abstract) if leaf.op == "linear")
    said, card, idle = (memory.table(abstract, CFG, one) for one in (setup, setup._replace(device="cuda"), setup._replace(rows=0)))
    assert said.cache == memory.cache(CFG, 6, 40) + 4 * linears
    assert card.cache == memory.cache(CFG, 6, 40) and idle.cache == 0


def test_a_run_that_samples_needs_the_larger_of_cache_and_activations():
    small, large = Table(10, activations=5, layer=3, head=2, cache=4), Table(10, activations=5, layer=3, head=2, cache=40, draws=7)
    assert (small.peak, large.peak) == (18, 57)


def test_on_a_cpu_host_memory_is_memory_and_files_are_not():
    abstract = MODELS["llama"].abstract(CFG)
    plain, host, files = (memory.table(abstract, CFG, Setup(TOKENS, remat=policy)) for policy in (None, "none+cpu", "none+disk"))
    card = memory.table(abstract, CFG, Setup(TOKENS, remat="none+cpu", device="cuda"))
    assert plain == host and host.elsewhere == 0
    assert files.elsewhere == plain.activations and files.peak < plain.peak and card.elsewhere > 0


def test_rows_leave_out_what_there_is_not():
    rows = memory.lines(Table(3 * memory.GIB, adapter=memory.GIB // 2, paged=2**20), "cpu, adamw")
    assert rows == {
        "memory": "3.50 GiB at the peak of a run: cpu, adamw", "  weights": "3.00 GiB", "  adapter": "512.00 MiB",
        "  elsewhere: states": "1.00 MiB",
    }  # fmt: skip
    assert memory.line(Table(3 * memory.GIB)) == "about 3.00 GiB of tensors at the peak: weights 3.00 GiB"


def test_paged_states_are_in_the_memory_of_the_host():
    abstract, setup = MODELS["llama"].abstract(CFG), Setup(TOKENS, state_bytes=8.0, paged=True)
    here, card = (memory.table(abstract, CFG, setup._replace(device=device)) for device in ("cpu", "cuda"))
    assert (here.paged, card.optimiser) == (0, 0) and here.optimiser == card.paged == 2 * here.adapter
