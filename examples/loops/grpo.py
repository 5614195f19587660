"""Reinforcement learning (DAPO's loss, group-scaled advantages) in one loop: `python examples/loops/grpo.py MODEL PROMPTS.jsonl OUTPUT`.

The numbers are those of `treetune grpo --no-skip-zero-advantage-batches` with the same seed, rows and options, bit for bit.
"""

import sys
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from treetune.core import optim, step
from treetune.core.data import kinds, pack, prompts, sources
from treetune.core.rollout import builtin, documents, feed_state, prompt_order
from treetune.core.rollout.group import Group
from treetune.core.state import TrainState
from treetune.losses import advantage, policy_gradient
from treetune.losses import policy as terms
from treetune.models import decode, hf, policy
from treetune.ops import noise

Reward = Callable[[list[str]], list[float]]  # completions -> a number for each
RANK, SEED, HELD_OUT = 16, 42, 4
ADVANTAGE, TERM = advantage.group_scaled, partial(terms.ppo_clip, epsilon=0.2, epsilon_high=0.28)


def train(
    model: str,
    rows: str,
    output: str,
    reward: Reward = builtin.digits,
    *,
    steps: int = 50,
    learning_rate: float = 2e-5,
    generations: int = 8,
    max_tokens: int = 256,
) -> list[dict[str, float]]:
    """Train a LoRA adapter on rows with a prompt, 4 of them a step, and save it; the metrics of steps and evaluations."""
    start = policy.load(model, adapter=policy.AdapterSpec(rank=RANK), seed=SEED)
    split = sources.split_validation(sources.read(rows), HELD_OUT, SEED, key=kinds.prompt_key)
    asked, held = (prompts.read_prompts(some, start.tokenizer)[0] for some in split)
    stop_ids = set(hf.stop_ids(model, start.tokenizer))
    training_key, evaluation_key = noise.keys(SEED, 11).item(), noise.keys(SEED, 12).item()

    def rollout(state: TrainState, some: list[prompts.Prompt], numbers: list[int], *, n: int, key: int) -> list[Group]:
        """n completions of each prompt under the weights of this step, their rewards, and advantages within each group."""
        now, lora = policy.current(start, state.params, state.frozen)
        how = {"n": n, "lora": lora, "max_new_tokens": max_tokens, "stop": sorted(stop_ids), "seed": key, "ids": numbers}
        samples = decode.sample(now, [prompt.tokens.tolist() for prompt in some], **how)
        completions = documents.completions(samples, n=n, stop_ids=stop_ids, tokenizer=start.tokenizer)
        rewards = np.array([reward([one.text for one in group]) for group in completions], np.float64)  # [P, G]
        scaled = ADVANTAGE(torch.from_numpy(rewards)).numpy()
        parts = zip(some, numbers, completions, rewards[:, :, None], scaled, strict=True)
        return [Group(prompt, number, tuple(group), int(state.step), *values) for prompt, number, group, *values in parts]

    def evaluate(state: TrainState) -> dict[str, float]:
        groups = rollout(state, held, list(range(len(held))), n=1, key=evaluation_key)
        return {"step": int(state.step), "eval/reward": float(np.mean([group.rewards for group in groups]))}

    # Sampled by the policy that trains, one step for each generation: ratios are 1, with a gradient, and no old log-probs are needed.
    objective = policy_gradient.objective(policy.logprob(start), policy_gradient.Surrogate(TERM))
    optimizer = optim.adamw()
    schedule = optim.warmup(optim.constant(learning_rate), round(0.03 * steps))
    take_step = step.make_step(objective, optimizer, schedule=schedule, clip=1.0)

    state = TrainState(start.params, start.frozen, optimizer.init(start.params), {}, torch.tensor(0))
    prompt_stream, cursor = prompt_order.PromptOrder(len(asked), SEED), prompt_order.PromptCursor()
    history = [evaluate(state)]
    for number in range(1, steps + 1):
        draws, cursor = prompt_order.draw(cursor, prompt_stream, 4)
        groups = rollout(state, [asked[one.index] for one in draws], [one.number for one in draws], n=generations, key=training_key)
        groups = [groups[i] for i in feed_state.mixed(len(groups), SEED, number, 0)]
        docs = [documents.document(group) for group in groups]  # the prompt is the trunk, completions are its branches
        state, metrics = take_step(state, [pack.collate_trees(docs[:2]), pack.collate_trees(docs[2:])])
        mean = float(np.mean([group.rewards for group in groups]))
        history.append({"step": number, "reward": mean} | {name: float(value) for name, value in metrics.items()})
        print(f"step {number}: reward {mean:.4f}")

    history.append(evaluate(state))
    policy.save(start, output, params=state.params)
    return history


if __name__ == "__main__":
    train(*sys.argv[1:])
