"""The engine of a run on a stand-in for the server: which weights it samples from, when they are synced, what it leaves behind."""

import importlib.util
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from treetune.core.rollout import engine, sampler, vllm
from treetune.core.run.errors import RunFailed
from treetune.core.run.ranks import ALONE, Ranks
from treetune.core.state import TrainState

spec = importlib.util.spec_from_file_location("fake_vllm", Path(__file__).with_name("fake_vllm.py"))
fake_vllm = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fake_vllm)
STEP = 0.1  # the adapter's number grows by this in a step
IDS, NUMBERS = [[3, 1], [4]], [0, 1]


class Words:
    def decode(self, ids, skip_special_tokens=True):
        return " ".join(map(str, ids))


def state(step: int) -> TrainState:
    return TrainState({"lora": {"A": torch.full((1,), STEP * step)}}, {}, {}, {}, torch.tensor(step))


def asked(fake, path: str) -> list[dict]:
    return [ask for place, ask in fake.asked if place == path]


def number(at: TrainState) -> float:
    return float(at.params["lora"]["A"].double())


def save(at: TrainState, trained: dict, folder: Path) -> None:
    assert trained["lora"]["A"] is not None
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"number": number(at), "r": 8}))


@pytest.fixture
def start(client, tmp_path):
    """start(...) -> an engine on the stand-in, with these settings."""
    made = []

    def begin(ranks=ALONE, **settings):
        plain = {"folder": tmp_path / "engine", "seeds": (5, 6), "dtype": "float32", "timeout_s": 5.0, "longest": 64}
        plain |= {"url": client.url, "model": "tiny", "model_paths": ("models/tiny",), "vocab_size": fake_vllm.VOCAB}
        calls = {"prompt_logprobs": lambda at, tokens: fake_vllm.logps(tokens, number(at)), "base_logprobs": fake_vllm.logps, "save": save}
        made.append(
            engine.VllmEngine(engine.EngineSettings(**plain | settings), vllm.SamplingParams(stop_ids=[2]), Words(), **calls, ranks=ranks)
        )
        return made[-1]

    yield begin
    for one in made:
        one.close()


def logp(prompt: list[int], tokens: list[int], at: TrainState) -> np.ndarray:
    return fake_vllm.logps([*prompt, *tokens], number(at))[len(prompt) - 1 :]


def check(sampled, at: TrainState) -> None:
    """The log-probs of all completions are those of the state's weights."""
    for prompt, group in zip(IDS, sampled.completions, strict=True):
        for one in group:
            np.testing.assert_allclose(one.logp, logp(prompt, one.tokens.tolist(), at), atol=1e-5)
            assert one.stopped == (one.tokens[-1] == 2) and one.text == " ".join(map(str, one.tokens.tolist()))


def test_training_samples_from_the_last_sync_and_evaluation_from_the_weights_it_is_given(start):
    made = start(sync_interval=2)
    made.start(state(0))
    sampled = made.draw(None, IDS, NUMBERS, n=3, max_tokens=6)
    assert sampled.version == 0 and [len(group) for group in sampled.completions] == [3, 3]
    check(sampled, state(0))
    assert made.after_step(state(1), {}, 1).step == 1 and made.version == 0, "not yet"
    made.after_step(state(2), {}, 2)
    sampled = made.draw(None, IDS, NUMBERS, n=2, max_tokens=6)
    assert sampled.version == 2
    check(sampled, state(2))
    made.refresh(state(3))
    sampled = made.draw_evaluation(state(3), IDS, NUMBERS, n=1, max_tokens=6)
    assert sampled.version == 3
    check(sampled, state(3))
    assert made.metrics()["sync/version"] == 3 and made.metrics()["sync/logp_difference_max"] < 1e-5


def test_training_and_evaluation_have_seeds_of_their_own(start, fake):
    made = start()
    made.start(state(0))
    made.draw(None, IDS, NUMBERS, n=1, max_tokens=2)
    made.draw_evaluation(state(0), IDS, NUMBERS, n=1, max_tokens=2)
    seeds = [ask["seed"] for path, ask in fake.asked if path == "/v1/completions" and ask.get("return_token_ids")]
    expected = [vllm.request_seed(seed, one) for seed in (5, 6) for one in NUMBERS]
    assert sorted(seeds) == sorted(expected) and len(set(seeds)) == 4


def test_a_resumed_run_gives_its_weights_before_it_samples(start):
    made = start()
    made.start(state(4))
    assert made.version == 4
    check(made.draw(None, IDS, NUMBERS, n=2, max_tokens=4), state(4))
    fresh = start(sync_at_start=True)
    fresh.start(state(0))
    assert fresh.sync.kept == [0], "an adapter to start from is pushed though no step was made"


def test_a_sync_that_is_lost_ends_the_run(start, fake):
    made = start()
    made.start(state(0))
    fake.forgets = True
    with pytest.raises(RunFailed, match="other weights|was lost|still has|has version"):
        made.after_step(state(5), {}, 5)


def test_a_server_of_another_model_or_none_is_refused_and_nothing_stays_open(start, monkeypatch):
    closed, plain = [], vllm.Client.close
    monkeypatch.setattr(vllm.Client, "close", lambda self: closed.append(self.url) or plain(self))
    with pytest.raises(ValueError, match="takes sequences of 64 tokens"):
        start(longest=65)
    with pytest.raises(ValueError, match="expected other"):
        start(model="other", model_paths=("models/other",))
    monkeypatch.setattr(engine, "START_RETRY_S", 0.1)
    with pytest.raises(ValueError, match="start one with treetune serve, or give --vllm-mode managed"):
        start(url="http://127.0.0.1:9")
    assert len(closed) == 3


def test_whole_weights_need_a_server_of_the_run(start):
    with pytest.raises(ValueError, match="--vllm-mode managed"):
        start(adapter_versions=None)


def test_adapters_of_generations_under_way_stay_loaded():
    assert engine.adapter_versions(steps_per_generation=1, sync_interval=1) == 3
    assert engine.adapter_versions(steps_per_generation=4, sync_interval=3, prefetch_depth=2) == 2 + 4


def test_fatal_errors_become_the_failure_of_a_run_and_others_pass():
    with pytest.raises(RunFailed, match="no answer; once that is repaired, --resume auto goes on"), sampler.fatal_errors():
        raise vllm.Unreachable("no answer")
    with pytest.raises(KeyError), sampler.fatal_errors():
        raise KeyError("a bug")


def test_the_trainers_own_weights_are_copied_for_a_thread_and_never_synced():
    rows = []

    def sample(at, ids, numbers, *, n, max_tokens):
        rows.append(len(ids))
        count = n * len(ids)
        return Samples(torch.ones(count, 2, dtype=torch.int64), torch.zeros(count, 2), count)

    draw = sampler.local(sample, stop_ids=[1], tokenizer=Words())
    made = sampler.build(sampler.LocalEngine(draw, draw), sampler.single_turn, n=40, evaluation_n=1, max_tokens=2)
    before, live = made.engine.snapshot(state(1)), state(1)
    assert before.params["lora"]["A"] is not live.params["lora"]["A"] and made.engine.after_step(live, {}, 1) is live
    sampled = draw(state(7), [[1], [2], [3]], [0, 1, 2], n=40, max_tokens=2)
    assert sampled.version == 7 and [len(group) for group in sampled.completions] == [40] * 3 and rows == [1, 1, 1], "64 rows at most"


class Samples:
    def __init__(self, tokens, logp, count):
        self.tokens, self.logp, self.lens = tokens, logp, torch.full((count,), 2)


class Shared:
    """The processes of ranks that are threads here."""

    def __init__(self, world: int = 2):
        self.meet, self.said = threading.Barrier(world, timeout=20), [None] * world

    def barrier(self, ranks):
        self.meet.wait()

    def each(self, ranks, function):
        try:
            self.said[ranks.rank] = function()
        except Exception as error:
            self.said[ranks.rank] = error
        self.meet.wait()
        said = list(self.said)
        self.meet.wait()
        for error in said:
            if isinstance(error, Exception):
                raise error
        return said

    def of_same_rows(self, ranks, function, also=()):
        return function


def on_ranks(world: int, call) -> list:
    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(call, range(world)))


def test_each_rank_draws_from_what_the_first_one_gave_the_server(start, fake, monkeypatch):
    monkeypatch.setattr(engine, "processes", Shared())
    pair = on_ranks(2, lambda rank: start(ranks=Ranks(rank, 2, None), sync_interval=2))

    def play(rank):
        made = pair[rank]
        made.start(state(0))
        for step in (1, 2):
            made.after_step(state(step), {}, step)
        drawn = made.draw(None, IDS, NUMBERS, n=2, max_tokens=6)
        made.refresh(state(3))
        return drawn, made.draw_evaluation(state(3), IDS, NUMBERS, n=1, max_tokens=6), made.metrics()

    pair.sort(key=lambda made: made.ranks.rank)
    (drawn, evaluated, told), other = on_ranks(2, play)
    assert drawn.version == other[0].version == 2 and evaluated.version == other[1].version == 3 and told == other[2]
    for one, again, at in ((drawn, other[0], 2), (evaluated, other[1], 3)):
        check(one, state(at))
        check(again, state(at))
    assert sum(path == "/v1/load_lora_adapter" for path, _ in fake.asked) == 2, "one for each version, by the first rank"
    with pytest.raises(RunFailed, match="lacks the adapter of this run"):
        pair[1].sync.recover()


@pytest.fixture
def several(start_server, start, monkeypatch):
    """several(ranks) -> (two servers, the engine of each rank)."""

    def begin(world: int):
        servers = [start_server() for _ in range(2)]
        monkeypatch.setattr(engine, "processes", Shared(world))

        def engine_of(rank: int):
            url = servers[rank % 2][1].url
            return start(ranks=Ranks(rank, world, None), url=url, servers=2, server=rank % 2)

        return [fake for fake, _ in servers], on_ranks(world, engine_of)

    return begin


def test_ranks_ask_servers_in_turn_which_all_get_the_weights(several, tmp_path):
    fakes, engines = several(3)

    def play(rank):
        made = engines[rank]
        made.start(state(0))
        for step in (1, 2):
            made.after_step(state(step), {}, step)
        return made.draw(None, IDS, [2 * rank, 2 * rank + 1], n=2, max_tokens=6), made.metrics()

    drawn, told = zip(*on_ranks(3, play), strict=True)
    for sampled in drawn:
        assert sampled.version == 2
        check(sampled, state(2))
    assert told[0] == told[1] == told[2] and told[0]["sync/version"] == 2
    seeds = [{ask["seed"] for ask in asked(fake, "/v1/completions") if ask.get("return_token_ids")} for fake in fakes]
    assert seeds == [{vllm.request_seed(5, one) for one in numbers} for numbers in ((0, 1, 4, 5), (2, 3))]
    assert [len(asked(fake, "/v1/load_lora_adapter")) for fake in fakes] == [2, 2], "by the first rank of each"
    files = [path for path in (tmp_path / "engine").rglob("adapter_config.json") if "v000002" in str(path)]
    assert len(files) == 2 and len({os.stat(path).st_ino for path in files}) == 1, "weights are written once"
    assert not (tmp_path / "engine" / "sent").exists()


def test_a_server_among_several_that_lost_the_weights_is_named_on_all_ranks(several):
    fakes, engines = several(2)
    on_ranks(2, lambda rank: engines[rank].start(state(0)))
    fakes[1].forgets = True

    def fail(rank):
        with pytest.raises(RunFailed) as caught:
            engines[rank].after_step(state(5), {}, 5)
        return str(caught.value)

    one, other = on_ranks(2, fail)
    assert one == other and one.startswith(f"{engines[1].settings.url}: the ")


def test_weights_that_are_not_finite_go_to_no_server(several, tmp_path):
    fakes, engines = several(2)
    on_ranks(2, lambda rank: engines[rank].start(state(0)))
    wrong = state(1)._replace(params={"lora": {"A": torch.full((1,), float("nan"))}})

    def fail(rank):
        with pytest.raises(RunFailed, match="lora.A not finite"):
            engines[rank].push(wrong)

    on_ranks(2, fail)
    assert not any(asked(fake, "/v1/load_lora_adapter") for fake in fakes) and not (tmp_path / "engine" / "sent").exists()


def test_an_error_of_one_server_among_several_ends_all_ranks(start_server, start, monkeypatch):
    monkeypatch.setattr(engine, "processes", Shared(2))
    monkeypatch.setattr(engine, "START_RETRY_S", 0.1)
    urls = [start_server()[1].url, "http://127.0.0.1:9"]

    def fail(rank):
        with pytest.raises(ValueError, match="at http://127.0.0.1:9.*start one with treetune serve"):
            start(ranks=Ranks(rank, 2, None), url=urls[rank], servers=2, server=rank)

    on_ranks(2, fail)
