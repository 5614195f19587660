"""Lines about a run, for a screen: the metrics of a step or an evaluation, a sampled answer, a duration."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from treetune.core.records import JsonRecord as Record
from treetune.core.run import answer_metrics, health


class Metrics(NamedTuple):
    """What a run shows: metrics besides the usual ones, the one that evaluations compare, and completions of a step to print."""

    shown: tuple[str, ...] = ()
    goal: str = "loss"
    perplexity: bool = False
    completions: int = 0


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def step_items(record: Record, metrics: Metrics) -> list[str]:
    """The metrics of a step, without the loss of sampled completions: it is near 0 and says nothing."""
    loss = [] if health.sampled(record) else [f"loss {record['train/loss']:.4f}"]
    rates = [f"lr {record['learning_rate']:.1e}"]
    rates += [f"{record['supervised_tokens_per_second']:.0f} tok/s"] if "supervised_tokens_per_second" in record else []
    items = [*loss, *_chosen(record, metrics), f"grad {record['grad_norm']:.2f}", *rates]
    return items if math.isnan(record["memory_gib"]) else [*items, f"{record['memory_gib']:.1f} GiB"]


def evaluation(record: Record, metrics: Metrics) -> str:
    """The metric that evaluations compare, and the method's own."""
    value = record.get(f"eval/{metrics.goal}", math.nan)  # where no reward was known
    if metrics.perplexity:
        rest = [f"perplexity {record['eval/perplexity']:.2f}"]
        rest += [f"accuracy {record['eval/mean_token_accuracy']:.3f}"] if "eval/mean_token_accuracy" in record else []
    else:
        rest = _chosen(record, metrics, "eval/", without=f"eval/{metrics.goal}")
    return "  ".join([f"held out, step {int(record['step'])}: {metrics.goal} {value:.4f}", *rest, *_of_answers(record)])


def _of_answers(record: Record) -> list[str]:
    """The metrics and rewards of answers to held-out prompts."""
    names = [name for name in record if name.removeprefix("eval/") in answer_metrics.METRICS or answer_metrics.is_reward(name)]
    return [f"{name.removeprefix('eval/').removeprefix('reward_')} {record[name]:.3f}" for name in names]


def _chosen(record: Record, metrics: Metrics, prefix: str = "", without: str = "") -> list[str]:
    """The method's own metrics of a record."""
    keys = {name: prefix + name for name in metrics.shown}
    return [f"{name.split('/')[-1]} {record[key]:.3f}" for name, key in keys.items() if key in record and key != without]


def completion(answer: Mapping[str, Any]) -> str:
    """A sampled completion with its rewards."""
    rewards = ", ".join(f"{name} {value:g}" for name, value in answer["rewards"].items() if value is not None)
    return f"  {answer['answer'].strip()!r:.200}  ({rewards}; advantage {answer['advantage']:.2f})"


def answer(answer: Mapping[str, Any], count: int) -> str:
    """An answer to a held-out prompt, the first of so many."""
    return f"  held-out row {answer['row']} (of {count} answered): {answer['answer'].strip()!r:.200}"
