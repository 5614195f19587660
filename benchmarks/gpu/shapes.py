"""The models and tokens of the parts: real shapes with random weights made on the device, the same in every process; tiny in a dry run."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import device
import numpy as np
import torch

from treetune.core import optim, step, tree
from treetune.core.data import pack, spans, trees
from treetune.core.state import TrainState
from treetune.losses import policy as terms
from treetune.losses import policy_gradient, sft_objective
from treetune.models import MODELS, Model, adapter, batches, policy
from treetune.models.dense import Config

TOKENS, DOCUMENT = (64, 16) if device.DRY else (8192, 2048)  # of a micro-batch, of each of its documents
RANK, ALPHA, RATE, SEED = 16, 32, 2e-4, 0
TINY = {"vocab_size": 150, "hidden_size": 32, "mlp_size": 48, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
QWEN = Config(
    vocab_size=151936, hidden_size=896, mlp_size=4864, num_layers=24, num_heads=14, num_kv_heads=2, head_dim=64,
    norm_eps=1e-6, rope_theta=1e6, max_positions=32768, tied=True, qkv_bias=True,
)  # fmt: skip
LLAMA = Config(
    vocab_size=128256, hidden_size=4096, mlp_size=14336, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128,
    norm_eps=1e-5, rope_theta=5e5, max_positions=131072,
)  # fmt: skip
SHAPES = {"qwen2.5-0.5b": ("qwen2", QWEN), "llama-8b": ("llama", LLAMA)}


def model(name: str, **changes: Any) -> Model:
    """An untrained model of a shape, in the dtype that it computes in."""
    family, sizes = SHAPES[name]
    cfg = replace(sizes, dtype=device.DTYPE, **(changes | (TINY if device.DRY else {})))
    generator = torch.Generator(device.DEVICE).manual_seed(SEED)

    def leaf(param: Any) -> torch.Tensor:
        kind, _, std = param.init.partition(":")
        out = torch.empty(param.shape, dtype=param.dtype, device=device.DEVICE)
        return out.normal_(0, float(std), generator=generator) if kind == "normal" else out.fill_(float(kind == "ones"))

    return Model(family, cfg, tree.map(leaf, MODELS[family].abstract(cfg, dtype=cfg.dtype)))


def ids(number: int, count: int = TOKENS) -> np.ndarray:
    """Token ids of a micro-batch by its number, below those of the smaller vocabulary."""
    return np.random.default_rng([SEED, number]).integers(0, 100 if device.DRY else 100_000, count, dtype=np.int32)


def documents(number: int) -> list[spans.Doc]:
    """Documents of equal length, all of their tokens but the first supervised."""
    weight = np.ones(DOCUMENT, np.float32)
    weight[0] = 0
    return [spans.Doc(part, weight, number) for part in ids(number).reshape(-1, DOCUMENT)]


def groups(number: int) -> list[trees.TreeDoc]:
    """Prompts with 8 completions each, as a rollout leaves them."""
    prompt, branch, completions = (8, 3, 8) if device.DRY else (256, 224, 8)
    size = prompt + branch * completions
    docs = []
    for i, tokens in enumerate(ids(number, size * (TOKENS // size or 1)).reshape(-1, size)):
        numbers = np.concatenate([np.zeros(prompt, np.int32), np.repeat(np.arange(1, completions + 1, dtype=np.int32), branch)])
        start = np.where(numbers > 0, prompt, 0).astype(np.int32)
        weight = (numbers > 0).astype(np.float32)
        advantages = tuple(float(x) for x in np.linspace(-1, 1, completions))
        docs.append(trees.TreeDoc(tokens, numbers, start, weight, number * 100 + i, {"advantage": advantages}))
    return docs


class Training(NamedTuple):
    """step(state, micro_batches), batch(number) -> the micro-batch of a step, and the first state."""

    step: Callable[..., Any]
    batch: Callable[[int], Any]
    state: TrainState
    policy: policy.Policy


def training(start: Model, *, lora: bool, method: str = "sft") -> Training:
    """The training of a model, with an adapter on all linear layers or whole in float32, as the command line builds it."""
    if lora:
        spec = policy.AdapterSpec(rank=RANK, alpha=ALPHA)
        trained = policy.adapt(start, spec, base=adapter.Base("random", ""), seed=SEED)
    else:
        trained = policy.full(start)
    logprob = policy.logprob(trained)
    if method == "sft":
        objective, collate, docs = sft_objective.named(logprob), pack.collate, documents
    else:
        term = partial(terms.ppo_clip, epsilon=0.2, epsilon_high=0.28)
        objective, collate, docs = policy_gradient.objective(logprob, policy_gradient.Surrogate(term)), pack.collate_trees, groups
    optimizer = optim.adamw()
    stepper = step.make_step(objective, optimizer, schedule=optim.constant(RATE))
    batcher = batches.batcher(start.cfg, device.DEVICE, (collate,), budget=TOKENS)
    zero = torch.tensor(0, device=device.DEVICE)
    state = TrainState(trained.params, trained.frozen, optimizer.init(trained.params), {}, zero)
    return Training(stepper, lambda number: batcher(docs(number)), state, policy.bare(trained))
