"""The local sampler on the real model: with the same weights its log-probs are the trainer's (pain 36).

Measured over the five ways of cutting: at most 4.4e-5 on a token and 8e-6 on average.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from treetune.core.data import pack, prompts
from treetune.core.data.prompts import Prompt
from treetune.models import decode, fetch, hf, logprobs

SAMPLE = Path(__file__).parents[2] / "examples" / "data" / "gsm8k_train_sample.jsonl"
WAYS = [{}, {"temperature": 0.6}, {"top_p": 0.8}, {"top_k": 20, "temperature": 0.6}, {"min_p": 0.1, "top_p": 0.9}]


@pytest.fixture(scope="module")
def smollm2():
    path = fetch.resolve("smollm2-135m-instruct", say=print)
    rows = [json.loads(line)["messages"][:1] for line in SAMPLE.read_text().splitlines()[:3]]
    tokenizer = hf.tokenizer(path)
    return hf.load(path), [tokenizer.apply_chat_template(one, add_generation_prompt=True, return_dict=False) for one in rows]


@torch.no_grad()
def trainers(model, ids, samples, n, temperature) -> np.ndarray:
    """The trainer's log-probs of all sampled tokens, each prompt shared by its completions, all packed into one stream."""
    docs = []
    for p, prompt in enumerate(ids):
        rows = range(p * n, (p + 1) * n)
        drawn = [(samples.tokens[r, : samples.lens[r]].numpy(), np.ones(int(samples.lens[r]), np.float32)) for r in rows]
        docs.append(prompts.completion_tree(Prompt(np.array(prompt, np.int32), "", None, {}, p), drawn))
    return logprobs(model.family, model.cfg, model.params, pack.collate_trees(docs), temperature=temperature).logp.numpy()


@pytest.mark.slow
@pytest.mark.parametrize("options", WAYS, ids=lambda o: "-".join(f"{k}{v}" for k, v in o.items()) or "plain")
def test_log_ratios_are_rounding(smollm2, options):
    model, ids = smollm2
    samples = decode.sample(model, ids, n=4, max_new_tokens=48, stop=[2], seed=1, **options)
    ours = np.concatenate([samples.logp[r, : samples.lens[r]].numpy() for r in range(len(samples.lens))])
    gap = np.abs(trainers(model, ids, samples, 4, options.get("temperature", 1.0)) - ours)
    print(f"largest {gap.max():.2e}, mean {gap.mean():.2e} over {gap.size} tokens")
    assert gap.max() <= 5e-5
    assert gap.mean() <= 1e-5
