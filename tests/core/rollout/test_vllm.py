"""The client of a vLLM server, against a stand-in that speaks its endpoints: ids in and out, log-probs, bad answers, faults."""

import importlib.util
import threading
from pathlib import Path

import numpy as np
import pytest

from treetune.core.rollout import vllm

spec = importlib.util.spec_from_file_location("fake_vllm", Path(__file__).with_name("fake_vllm.py"))
fake_vllm = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fake_vllm)
PROMPTS = [[1, 2, 3], [4, 5], [6]]
SEEDS = [vllm.request_seed(7, number) for number in range(3)]
Params = vllm.SamplingParams
WIDE = dict(max_tokens=20, n=4)


def test_completions_are_the_ids_that_the_server_drew_in_order(fake, client):
    drawn = client.sample(PROMPTS, SEEDS, Params(temperature=0.7), **WIDE)
    assert [len(group) for group in drawn] == [4, 4, 4]
    asked = {tuple(ask["prompt"]): ask for path, ask in fake.asked if path == "/v1/completions" and ask.get("n") == 4}
    for prompt, seed, group in zip(PROMPTS, SEEDS, drawn, strict=True):
        ask = asked[tuple(prompt)]
        assert ask["seed"] == seed and ask["return_token_ids"] and ask["ignore_eos"]
        for index, one in enumerate(group):
            expected = fake._choice(ask, fake_vllm.BASE, index)
            assert one.tokens.tolist() == expected["token_ids"] and one.tokens.dtype == np.int32
            assert one.finish_reason == "length" and len(one.tokens) == 20


def test_the_same_seed_draws_the_same_and_another_does_not(client):
    first, again = (client.sample(PROMPTS, SEEDS, **WIDE) for _ in range(2))
    other = client.sample(PROMPTS, SEEDS[::-1], **WIDE)
    ids = [[[one.tokens.tolist() for one in group] for group in found] for found in (first, again, other)]
    assert ids[0] == ids[1] != ids[2]


def test_seeds_of_neighbouring_prompts_are_far_apart():
    seeds = [vllm.request_seed(seed, number) for seed in range(3) for number in range(1000)]
    assert len(set(seeds)) == 3000 and 0 <= min(seeds) and max(seeds) < 2**62
    assert min(np.diff(sorted(seeds))) > 10_000  # the engine counts up from each


def test_log_probs_are_those_of_the_trainer_at_its_temperature(client):
    for temperature in (0.6, 1.0, 1.7):
        for prompt, group in zip(PROMPTS, client.sample(PROMPTS, SEEDS, Params(temperature=temperature), **WIDE), strict=True):
            for one in group:
                np.testing.assert_allclose(one.logp, trainer(prompt, one.tokens, temperature), atol=1e-6)


def trainer(prompt, tokens, temperature):
    ids = [*prompt, *tokens.tolist()]
    rows = fake_vllm.log_softmax(fake_vllm.BASE / temperature)
    return [rows[last, token] for last, token in zip(ids[len(prompt) - 1 : -1], ids[len(prompt) :], strict=True)]


@pytest.mark.parametrize(
    "mode, options, known",
    [
        ("processed_logprobs", dict(temperature=0.6), True),
        ("processed_logprobs", dict(temperature=1.0, top_p=0.8), False),
        ("processed_logprobs", dict(temperature=0.6, top_k=3), False),
        ("raw_logprobs", dict(temperature=1.0), True),
        ("raw_logprobs", dict(temperature=1.0, top_p=0.8), True),
        ("raw_logprobs", dict(temperature=0.6), False),
    ],
)
def test_log_probs_of_another_distribution_come_back_unknown(mode, options, known, start):
    fake, client = start(mode=mode)
    assert client.mode == mode
    drawn = client.sample(PROMPTS, SEEDS, Params(**options), **WIDE)
    for prompt, group in zip(PROMPTS, drawn, strict=True):
        for one in group:
            if known:
                np.testing.assert_allclose(one.logp, trainer(prompt, one.tokens, options["temperature"]), atol=1e-6)
            else:
                assert np.isnan(one.logp).all()


@pytest.mark.parametrize(
    "shape", [dict(min_p=0.1), dict(repetition_penalty=1.1), dict(regex="[0-9]+"), dict(extra={"logit_bias": {"3": 1.0}})]
)
def test_what_reshapes_the_distribution_is_not_comparable_in_processed_mode(shape):
    assert vllm.comparable("processed_logprobs", Params(temperature=0.6))
    assert not vllm.comparable("processed_logprobs", Params(temperature=1.0, **shape))
    assert vllm.comparable("raw_logprobs", Params(temperature=1.0, **shape))
    assert not vllm.comparable("", Params(temperature=1.0))
    assert vllm.comparable("processed_logprobs", Params(temperature=1.0, extra={"stop": ["x"]}))


def test_log_probs_are_unknown_before_the_server_was_asked_for_its_mode(client):
    client = vllm.Client(client.url, model="tiny", vocab_size=12)
    assert np.isnan(client.sample([[1]], [3], max_tokens=2)[0][0].logp).all()


def test_every_option_reaches_the_server(fake, client):
    options = dict(temperature=0.5, top_p=0.9, top_k=7, min_p=0.05, repetition_penalty=1.2)
    params = Params(**options, stop_ids=[3], regex="a+", extra={"min_tokens": 2, "stop": ["x"]})
    client.sample([[1]], [5], params, max_tokens=9, n=2)
    asked, options = fake.asked[-1][1], options | {"stop_token_ids": [3], "max_tokens": 9, "n": 2}
    assert {name: asked[name] for name in options} == options
    assert asked["structured_outputs"] == {"regex": "a+"} and asked["min_tokens"] == 2 and asked["stop"] == ["x"]


def test_a_stop_token_ends_a_completion_and_belongs_to_it(client):
    groups = client.sample(PROMPTS, SEEDS, Params(stop_ids=[2, 9]), **WIDE)
    stopped = [one for group in groups for one in group if one.finish_reason == "stop"]
    assert len(stopped) > 5
    assert all(one.tokens[-1] in (2, 9) and not set(one.tokens[:-1].tolist()) & {2, 9} for one in stopped)


def test_log_probs_of_a_prompt(client):
    np.testing.assert_allclose(client.prompt_logps([3, 1, 4, 1, 5]), fake_vllm.logps([3, 1, 4, 1, 5]), atol=1e-12)


def test_another_model_or_too_short_a_window_is_refused(fake, client):
    assert client.check(accepted=["nowhere", "models/tiny"], needed_len=64).max_len == 64
    with pytest.raises(ValueError, match="takes sequences of 64 tokens; .* need 65: .*max_model_len"):
        client.check(needed_len=65)
    with pytest.raises(ValueError, match="serves models/tiny as tiny; expected models/other"):
        client.check(accepted=["models/other"])
    client.model = "other"
    assert client.check(accepted=["models/tiny"]).name == client.model == "tiny"
    client.model = "other"
    with pytest.raises(ValueError, match="serves tiny; expected other"):
        client.check()


def test_a_prompt_that_does_not_fit_names_itself(client):
    with pytest.raises(ValueError, match="prompt 1 has 60 tokens, with max_tokens 5 more than the 64"):
        client.sample([[1], [1] * 60], [1, 2], max_tokens=5)
    with pytest.raises(ValueError, match="prompt 0 has no tokens"):
        client.sample([[]], [1], max_tokens=5)


@pytest.mark.parametrize(
    "params, size, message",
    [
        (dict(), dict(max_tokens=0), "max_tokens 0"),
        (dict(), dict(n=0), "n is 0"),
        (dict(temperature=0.0), dict(n=2), "temperature is 0.0 for n 2"),
        (dict(temperature=float("nan")), dict(), "temperature is nan"),
        (dict(extra={"best_of": 3}), dict(), "'best_of' is unknown"),
        (dict(extra={"temperature": 0.3}), dict(), "'temperature' is unknown"),
    ],
)
def test_options_that_the_engine_would_ignore_or_refuse_are_errors(client, params, size, message):
    with pytest.raises(ValueError, match=message):
        client.sample([[1]], [1], Params(**params), **({"max_tokens": 2} | size))


def spoiled(change):
    return lambda choices: [choice | change(choice) for choice in choices]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda choices: choices[1:], "gave 1 completions of a prompt; asked were 2"),
        (spoiled(lambda choice: {"token_ids": [99] * 5}), "holds token 99, and the vocabulary has 12"),
        (spoiled(lambda choice: {"token_ids": [-1] * 5}), "holds token -1"),
        (spoiled(lambda choice: {"token_ids": choice["token_ids"][:-1]}), "4 ids and 5 log-probs"),
        (spoiled(lambda choice: {"token_ids": [], "logprobs": {"token_logprobs": []}}), "0 ids"),
        (spoiled(lambda choice: {"token_ids": None}), "no token ids"),
        (spoiled(lambda choice: {"prompt_token_ids": [1, 1, 2]}), "another prompt"),
        (spoiled(lambda choice: {"finish_reason": None}), "ended with None"),
    ],
)
def test_an_answer_that_is_not_what_was_asked_is_an_error(fake, client, spoil, message):
    fake.spoil = spoil
    with pytest.raises(ValueError, match=message) as caught:
        client.sample([[1, 2]], [1], max_tokens=5, n=2)
    assert "\n" not in str(caught.value)


def test_passing_failures_are_tried_again(fake, client):
    expected = client.sample(PROMPTS, SEEDS, **WIDE)
    fake.failures = [503, 500, 429]
    found = client.sample(PROMPTS, SEEDS, **WIDE)
    assert fake.failures == []
    for one, other in zip(sum(expected, []), sum(found, []), strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)


def test_a_completion_given_up_by_the_engine_is_drawn_again(fake, client):
    answers = [spoiled(lambda choice: {"finish_reason": "abort"}), lambda choices: choices]
    fake.spoil = lambda choices: answers.pop(0)(choices)
    (group,) = client.sample([[1, 2]], [1], max_tokens=5, n=2)
    assert len(group) == 2 and not answers


def test_a_server_that_is_away_for_a_moment_is_waited_for(fake, client):
    fake.drops = True
    threading.Timer(0.4, lambda: setattr(fake, "drops", False)).start()
    assert len(client.sample(PROMPTS, SEEDS, **WIDE)) == 3


def test_a_server_that_stays_away_is_one_clear_line(fake, start):
    fake, client = start(retry_s=0.3)
    fake.drops = True
    with pytest.raises(
        vllm.Unreachable, match=f"no answer from the vLLM server at {client.url}/v1/completions .*tried for 0.3 s"
    ) as caught:
        client.sample(PROMPTS, SEEDS, **WIDE)
    assert "\n" not in str(caught.value)


def test_nobody_waits_for_a_process_that_has_ended(start):
    fake, client = start(retry_s=60.0)
    fake.drops, client.alive = True, lambda: False
    with pytest.raises(vllm.Unreachable, match="its process has ended"):
        client.sample(PROMPTS, SEEDS, **WIDE)
    assert len([path for path, ask in fake.asked if ask.get("n") == 4]) <= 3  # once each


def test_one_bad_request_ends_the_rest_quickly(fake, client):
    with pytest.raises(vllm.Lost, match="The model `gone` does not exist"):
        client.sample([[1]] * 500, list(range(500)), max_tokens=2, model="gone")
    assert len(fake.asked) < 300


def test_in_place_reloading_is_for_this_machine_only(client):
    remote = vllm.Client("http://192.0.2.1:8000", model="tiny", vocab_size=12)
    with pytest.raises(ValueError, match="on 127.0.0.1 only"):
        remote.reload_weights("folder")
