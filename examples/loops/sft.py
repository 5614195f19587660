"""Supervised fine-tuning in one loop: `python examples/loops/sft.py MODEL ROWS.jsonl OUTPUT`.

The numbers are those of `treetune sft` with the same seed, rows and options, bit for bit. What the command adds: checks of its input, a
run folder, checkpoints and resuming, health rules, several devices, many row formats and options.
"""

import sys

import torch

from treetune.core import optim, step
from treetune.core.data import formats, loader, pack, sources
from treetune.core.state import TrainState
from treetune.losses import sft_objective
from treetune.models import policy

RANK, SEED = 16, 42


def train(
    model: str,
    rows: str,
    output: str,
    *,
    steps: int = 50,
    learning_rate: float = 2e-4,
    sequence_len: int = 512,
) -> list[dict[str, float]]:
    """Fine-tune a LoRA adapter on chats and save it; the metrics of every step, and of an evaluation before and after."""
    start = policy.load(model, adapter=policy.AdapterSpec(rank=RANK), seed=SEED)

    # Rows -> documents: token ids with a weight for each, 1 where it is supervised.
    training, held_out = sources.split_validation(sources.read(rows), 0.1, SEED)
    docs, _ = formats.encode_rows(training, start.tokenizer, sequence_len=sequence_len, overlong="drop")
    held_docs, _ = formats.encode_rows(held_out, start.tokenizer, sequence_len=sequence_len, overlong="drop")
    lengths = [len(doc.tokens) for doc in docs]
    packing = {"budget": 2 * sequence_len}  # whole documents, up to this many tokens, in one micro-batch

    # The objective divides by the supervised tokens of all micro-batches of a step, so the split into micro-batches changes nothing.
    objective = sft_objective.objective(policy.logprob(start))
    optimizer = optim.adamw()
    warmup = round(0.03 * steps)
    schedule = optim.warmup(optim.cosine(learning_rate, max(steps - warmup, 1)), warmup)
    take_step = step.make_step(objective, optimizer, schedule=schedule, clip=1.0)
    evaluate = step.make_eval(objective)

    state = TrainState(start.params, start.frozen, optimizer.init(start.params), {}, torch.tensor(0))
    plan = loader.epoch_plan([len(doc.tokens) for doc in held_docs], shuffle=False, **packing)
    held_batches = [pack.collate([held_docs[i] for i in group]) for group in plan]
    history = [report(0, evaluate(state, held_batches), "eval/")]

    for number, (groups, _) in enumerate(loader.epoch_steps(lengths, accum=2, seed=SEED, **packing), start=1):
        micro_batches = [pack.collate([docs[i] for i in group]) for group in groups]
        state, metrics = take_step(state, micro_batches)
        history.append(report(number, metrics))
        if number == steps:
            break

    history.append(report(steps, evaluate(state, held_batches), "eval/"))
    policy.save(start, output, params=state.params)
    return history


def report(number: int, metrics: dict[str, torch.Tensor], prefix: str = "") -> dict[str, float]:
    """Print a step's loss; all of its metrics as floats."""
    record = {"step": number} | {prefix + name: float(value) for name, value in metrics.items()}
    print(f"step {number}: {prefix}loss {record[f'{prefix}loss']:.4f}")
    return record


if __name__ == "__main__":
    train(*sys.argv[1:])
