"""A real vLLM server on the loopback interface with SmolLM2: ids in and out, log-probs, adapter and weight syncs, the canary.

Measured with vLLM 0.32 on a CPU in float32: log-probs of server and trainer differ by at most 4e-5 and 1e-5 on average.
"""

import os
import shutil
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from treetune.core import lora, tree
from treetune.core.lora import Lora
from treetune.core.rollout import server as servers
from treetune.core.rollout import sync, vllm
from treetune.models import adapter, fetch, hf, logprobs, serving

pytestmark = pytest.mark.vllm
RANK, ALPHA = 8, 16.0
LATER = 0.02 * (1 + 2e-4)  # size of an adapter one small step after one of size 0.02
MAX_DIFF, MEAN_DIFF = 2e-4, 2e-5  # float32; measured 4e-5 and 1e-5
TEXTS = (
    "Tell me a short story about a fox.",
    "What is 17 + 25?",
    "Name three rivers in Europe and say which of them is the longest.",
    "Write a haiku about the sea.",
)


@pytest.fixture(scope="module")
def trainer():
    """SmolLM2 in float32 with its tokenizer, chat prompts, and its log-probs of a continuation."""
    place = fetch.resolve("smollm2-135m-instruct", say=print)
    model, tokenizer = hf.load(place), hf.tokenizer(place)
    chats = [[{"role": "user", "content": text}] for text in TEXTS]
    prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for chat in chats]
    canary = prompts[0] + tokenizer("Once upon a time there was a fox who lived near a river.")["input_ids"]
    return SimpleNamespace(place=place, model=model, tokenizer=tokenizer, prompts=prompts, canary=canary)


@torch.no_grad()
def scored(model, prompt, tokens, *, used: Lora | None = None, temperature: float = 1.0) -> np.ndarray:
    """The trainer's log-probs of `tokens` after `prompt`."""
    ids = torch.tensor([*prompt, *tokens])
    at = torch.arange(len(prompt) - 1, len(ids) - 1)
    batch = {
        "tokens": ids, "positions": torch.arange(len(ids)), "cu_docs": torch.tensor([0, len(ids)], dtype=torch.int32), "at": at,
        "targets": ids[at + 1], "seq": torch.zeros_like(at), "seq_lens": torch.tensor([len(at)]), "doc_of_seq": torch.tensor([0]),
        "row": torch.tensor([0]),
    }  # fmt: skip
    return logprobs(model.family, model.cfg, model.params, batch, lora=used, temperature=temperature).logp.numpy()


def command(place: Path, port: int) -> list[str]:
    options = servers.ServerOptions("smol", port, dtype="float32", max_model_len=256, enforce_eager=True, max_lora_rank=RANK)
    return servers.command(servers.find_python(None), place, options)


@pytest.fixture(scope="module")
def engine(trainer, tmp_path_factory):
    """The server and a client that has checked it; the last test restarts it on other weights."""
    root, port = tmp_path_factory.mktemp("engine"), servers.free_port()
    server = servers.Server(command(trainer.place, port), port=port, log=root / "vllm.log", deadline_s=300.0)
    client = vllm.Client(server.url, model="smol", vocab_size=trainer.model.cfg.vocab_size, retry_s=60.0, alive=server.alive)
    client.check(accepted=[trainer.place], needed_len=256)
    yield SimpleNamespace(server=server, client=client, root=root, port=port)
    client.close()
    server.stop()


def drawn(engine, trainer, *, model=None, **params):
    seeds = [vllm.request_seed(3, number) for number in range(len(trainer.prompts))]
    return engine.client.sample(trainer.prompts, seeds, vllm.SamplingParams(**params), max_tokens=16, n=2, model=model)


def gaps(groups, trainer, *, used=None, temperature=1.0) -> np.ndarray:
    """|log-prob of the server - of the trainer| over all sampled tokens."""
    found = [
        np.abs(one.logp - scored(trainer.model, prompt, one.tokens.tolist(), used=used, temperature=temperature))
        for prompt, group in zip(trainer.prompts, groups, strict=True)
        for one in group
    ]
    return np.concatenate(found)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_are_the_trainers_at_its_temperature(engine, trainer, temperature):
    assert engine.client.mode == "processed_logprobs"
    gap = gaps(drawn(engine, trainer, temperature=temperature), trainer, temperature=temperature)
    assert len(gap) == 4 * 2 * 16 and gap.max() < MAX_DIFF and gap.mean() < MEAN_DIFF, (gap.max(), gap.mean())


def test_a_cut_distribution_is_reported_as_unknown_and_differs_indeed(engine, trainer):
    groups = drawn(engine, trainer, temperature=1.0, top_p=0.8)
    assert all(np.isnan(one.logp).all() for group in groups for one in group)
    engine.client.mode = "raw_logprobs"  # which this server is not: what would have come through
    try:
        gap = gaps(drawn(engine, trainer, temperature=1.0, top_p=0.8), trainer)
    finally:
        engine.client.mode = "processed_logprobs"
    assert 0.05 < gap.mean() < -np.log(0.8) + 1e-3 and gap.max() < -np.log(0.8) + 1e-3  # the log of the mass that was kept


def test_the_same_seeds_draw_the_same_ids_and_neighbours_differ(engine, trainer):
    first, again = ([[one.tokens.tolist() for one in group] for group in drawn(engine, trainer)] for _ in range(2))
    assert first == again
    assert all(group[0] != group[1] for group in first)
    same = engine.client.sample([trainer.prompts[0]] * 2, [vllm.request_seed(3, number) for number in (0, 1)], max_tokens=24)
    assert same[0][0].tokens.tolist() != same[1][0].tokens.tolist()


def test_only_the_given_tokens_end_a_completion_and_a_regex_is_kept(engine, trainer):
    end = trainer.tokenizer.eos_token_id
    (((stopped,),), ((free,),)) = (
        engine.client.sample([trainer.prompts[1]], [1], vllm.SamplingParams(0.0, stop_ids=ids), max_tokens=60) for ids in ([end], [])
    )
    assert stopped.finish_reason == "stop" and stopped.tokens[-1] == end and len(stopped.tokens) < 60
    assert free.finish_reason == "length" and free.tokens[: len(stopped.tokens)].tolist() == stopped.tokens.tolist()
    params = vllm.SamplingParams(regex="[0-9]{3}", stop_ids=[end])
    ((digits,),) = engine.client.sample([trainer.prompts[1]], [1], params, max_tokens=8)
    text = trainer.tokenizer.decode(digits.tokens, skip_special_tokens=True)
    assert len(text) == 3 and text.isdigit() and np.isnan(digits.logp).all()


def test_what_does_not_fit_is_refused_with_its_reason(engine, trainer):
    with pytest.raises(ValueError, match="more than the 256 of the server"):
        engine.client.sample([trainer.prompts[0]], [1], max_tokens=250)
    with pytest.raises(ValueError, match="need 257"):
        engine.client.check(needed_len=257)
    with pytest.raises(ValueError, match="out of vocabulary"):
        engine.client.sample([[999_999]], [1], max_tokens=2)
    with pytest.raises(vllm.Lost, match="`gone` does not exist"):
        engine.client.sample([[1]], [1], max_tokens=2, model="gone")


def made(trainer, size: float) -> Lora:
    """An adapter on every projection whose B has entries of this size."""
    paths = [path for path in dict(tree.items(trainer.model.params)) if "_proj" in path]
    fresh = lora.init(trainer.model.params, paths, rank=RANK, seed=5)
    generator = torch.Generator().manual_seed(5)
    leaves = [
        (path, size * torch.randn(leaf.shape, generator=generator) if path.endswith(".B") else leaf) for path, leaf in tree.items(fresh)
    ]
    return Lora(tree.from_items(leaves), lora.scale(rank=RANK, alpha=ALPHA))


def saving(trainer, used: Lora, rank: int = RANK):
    paths = [path.removesuffix(".A") for path, _ in tree.items(used.tree) if path.endswith(".A")]
    info = adapter.Info(rank, ALPHA, base="smol", paths=paths)
    return partial(adapter.save, adapter=used.tree, family=trainer.model.family, info=info)


def on_canary(trainer, used: Lora | None = None) -> np.ndarray:
    return scored(trainer.model, trainer.canary[:1], trainer.canary[1:], used=used)


@pytest.fixture(scope="module")
def adapters(engine, trainer):
    """Adapter syncs of a run; the server has been found to have the trainer's base model."""
    found = sync.Adapters(engine.client, engine.root / "sync", sync.Canary(engine.client, trainer.canary, dtype="float32"))
    verdict = found.start(0, on_canary(trainer))
    assert verdict.mean_diff < MEAN_DIFF and verdict.max_diff < MAX_DIFF
    return found


def test_a_synced_adapter_is_the_trainers_and_a_later_version_too(engine, trainer, adapters):
    for version, size in enumerate((0.005, 0.03), start=1):
        used = made(trainer, size)
        verdict = adapters.sync(version, saving(trainer, used), used.tree, on_canary(trainer, used))
        assert verdict.conclusive and verdict.moved > 0.05 and verdict.max_diff < MAX_DIFF and verdict.mean_diff < MEAN_DIFF, verdict
        # The prompts are those of before: keys and values kept of another version would show.
        gap = gaps(drawn(engine, trainer, model=adapters.model), trainer, used=used)
        assert gap.max() < MAX_DIFF and gap.mean() < MEAN_DIFF, (gap.max(), gap.mean())


@pytest.mark.parametrize("size", [0.02, LATER])
def test_a_lost_sync_is_caught_however_small_the_step(engine, trainer, adapters, size, monkeypatch):
    used, current = made(trainer, size), adapters.folder(adapters.kept[-1])
    load = engine.client.load_adapter
    monkeypatch.setattr(engine.client, "load_adapter", lambda name, path: load(name, current))  # the old weights under the new name
    version = adapters.kept[-1] + 1
    with pytest.raises(sync.SyncError, match=f"sync of version {version} was lost"):
        adapters.sync(version, saving(trainer, used), used.tree, on_canary(trainer, used))
    monkeypatch.undo()
    assert adapters.sync(version, saving(trainer, used), used.tree, on_canary(trainer, used)).conclusive


def test_an_adapter_above_the_servers_rank_is_refused(trainer, adapters):
    used = made(trainer, 0.01)
    wide = tree.from_items((path, torch.cat([leaf, leaf], 0 if path.endswith(".A") else 1)) for path, leaf in tree.items(used.tree))
    save = saving(trainer, Lora(wide, used.scale), rank=2 * RANK)
    with pytest.raises(ValueError, match=r"refuses /v1/load_lora_adapter: .*rank"):
        adapters.sync(90, save, wide, on_canary(trainer, used))


def test_a_killed_server_is_restarted_with_whole_weights_and_gets_its_adapter_again(engine, trainer, adapters):
    generator = torch.Generator().manual_seed(1)
    moved = tree.map(lambda leaf: leaf * (1 + 0.02 * torch.randn(leaf.shape, generator=generator)), trainer.model.params)
    other, used = trainer.model._replace(params=moved), made(trainer, LATER)
    weights = sync.Weights(engine.client, engine.root / "weights", sync.Canary(engine.client, trainer.canary, dtype="float32"),
                           server=engine.server, command=partial(command, port=engine.port))  # fmt: skip
    weights.start(0, on_canary(trainer))
    os.killpg(engine.server.process.pid, signal.SIGKILL)
    engine.server.process.wait()
    expected = scored(other, trainer.canary[:1], trainer.canary[1:])
    verdict = weights.sync(1, partial(hf.save, model=other, tokenizer=trainer.tokenizer), moved, expected)
    assert verdict.conclusive and verdict.moved > 0.05 and verdict.mean_diff < MEAN_DIFF, verdict
    draw = partial(engine.client.sample, [trainer.prompts[1]], [7], max_tokens=8)
    with pytest.raises(sync.SyncError, match="other weights"):  # the adapter comes back, over another base than it was made for
        sync.steady(lambda name: draw(model=name), adapters)
    expected = scored(other, trainer.canary[:1], trainer.canary[1:], used=used)
    adapters.canary.last = adapters.canary.last._replace(expected=expected)
    assert adapters.recover().mean_diff < MEAN_DIFF
    ((one,),) = sync.steady(lambda name: draw(model=name), adapters)
    np.testing.assert_allclose(one.logp, scored(other, trainer.prompts[1], one.tokens.tolist(), used=used), atol=MAX_DIFF)
    shutil.rmtree(engine.root / "weights")


def test_the_default_model_is_served_as_the_folder_that_training_reads():
    assert serving.model_folder("smollm2-135m-instruct", say=print) == fetch.resolve("smollm2-135m-instruct")
