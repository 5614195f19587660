"""Preference learning (DPO) in one loop: `python examples/loops/dpo.py MODEL PAIRS.jsonl OUTPUT`.

The numbers are those of `treetune dpo` with the same seed, rows and options, bit for bit.
"""

import sys
from collections.abc import Callable
from functools import partial

import torch

from treetune.core import optim, step
from treetune.core.data import kinds, loader, pack, sources, trees
from treetune.core.data.preference import passthrough
from treetune.core.state import TrainState
from treetune.losses import preference, preference_objective
from treetune.models import logprobs, policy

RANK, SEED = 16, 42


def train(
    model: str,
    rows: str,
    output: str,
    *,
    steps: int = 50,
    learning_rate: float = 5e-5,
    loss: Callable[..., torch.Tensor] = preference.dpo,
    beta: float = 0.1,
    sequence_len: int = 512,
) -> list[dict[str, float]]:
    """Train a LoRA adapter on rows with prompt, chosen and rejected, and save it; the metrics of steps and evaluations."""
    start = policy.load(model, adapter=policy.AdapterSpec(rank=RANK), seed=SEED)
    family, cfg = start.family, start.cfg

    # Rows -> token trees: the prompt is the trunk, the chosen and the rejected completion are its branches.
    training, held_out = sources.split_validation(sources.read(rows), 0.1, SEED, key=kinds.prompt_key)
    encode = partial(trees.encode_rows, read=passthrough, tokenizer=start.tokenizer, sequence_len=sequence_len, overlong="drop")
    docs, held_docs = (encode(some)[0] for some in (training, held_out))
    lengths, held_lengths = ([len(doc.tokens) for doc in some] for some in (docs, held_docs))
    packing = {"budget": max(2 * sequence_len, *lengths, *held_lengths)}

    def add_reference(state: TrainState, micro_batches: list) -> list:
        """The base model under the adapter is the reference: its log-probs [N] beside each batch."""
        return [batch | {"ref_logp": logprobs(family, cfg, state.frozen["model"], batch).logp} for batch in micro_batches]

    objective = preference_objective.objective(
        policy.logprob(start), partial(loss, beta=beta), rewards=preference_objective.implicit_rewards(beta)
    )
    optimizer = optim.adamw()
    warmup = round(0.03 * steps)
    schedule = optim.warmup(optim.cosine(learning_rate, max(steps - warmup, 1)), warmup)
    take_step = step.make_step(objective, optimizer, schedule=schedule, clip=1.0, prepare=add_reference)
    evaluate = step.make_eval(objective, prepare=add_reference)

    state = TrainState(start.params, start.frozen, optimizer.init(start.params), {}, torch.tensor(0))
    held_plan = loader.epoch_plan(held_lengths, shuffle=False, **packing)
    held_batches = [pack.collate_trees([held_docs[i] for i in group]) for group in held_plan]
    history = [report(0, evaluate(state, held_batches), "eval/")]

    for number, (groups, _) in enumerate(loader.epoch_steps(lengths, accum=2, seed=SEED, **packing), start=1):
        micro_batches = [pack.collate_trees([docs[i] for i in group]) for group in groups]
        state, metrics = take_step(state, micro_batches)
        history.append(report(number, metrics))
        if number == steps:
            break

    history.append(report(steps, evaluate(state, held_batches), "eval/"))
    policy.save(start, output, params=state.params)
    return history


def report(number: int, metrics: dict[str, torch.Tensor], prefix: str = "") -> dict[str, float]:
    """Print a step's loss and margin; all of its metrics as floats."""
    record = {"step": number} | {prefix + name: float(value) for name, value in metrics.items()}
    print(f"step {number}: {prefix}loss {record[f'{prefix}loss']:.4f}, margin {record[f'{prefix}rewards/margins']:.4f}")
    return record


if __name__ == "__main__":
    train(*sys.argv[1:])
