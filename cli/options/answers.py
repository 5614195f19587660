"""Options of answers to held-out prompts, of a run and of `treetune eval`. Importing this imports no torch."""

from dataclasses import dataclass
from typing import Annotated

from treetune.cli.options.data import HELD_OUT
from treetune.core.config.marks import ANSWER, FUNCTION_PATH, Unused, Values, unused_if, unused_unless
from treetune.core.config.ranges import COUNT, COUNT_OR_NONE, SECONDS, TOKENS
from treetune.core.run import answer_metrics


def _unmeasured(values: Values) -> str:
    if values["eval_reward_funcs"] or set(values["eval_causal_lm_metrics"]) - {answer_metrics.PERPLEXITY}:
        return ""
    return "neither eval_causal_lm_metrics nor eval_reward_funcs need answers"


def unanswered(values: Values) -> str:
    """Why no option asks for an answer; empty where one does."""
    return _unmeasured(values) and ("" if values["eval_table_size"] else f"eval_table_size is 0, and {_unmeasured(values)}")


@dataclass(frozen=True)
class AnswerOptions:
    """Answers."""

    eval_table_size: Annotated[int, COUNT_OR_NONE, ANSWER, HELD_OUT, unused_if("evals_per_epoch", 0, reason="evals_per_epoch is 0")] = 0
    """Held-out prompts that are answered at each evaluation, beside the answer of their row; 0 for none."""
    eval_max_new_tokens: Annotated[int, TOKENS, ANSWER, Unused(unanswered)] = 128
    """Longest answer to a held-out prompt, in tokens."""
    eval_causal_lm_metrics: Annotated[
        tuple[str, ...], ANSWER, HELD_OUT, unused_if("evals_per_epoch", 0, reason="evals_per_epoch is 0")
    ] = ()
    """Metrics of answers to held-out prompts, compared with those of their rows: sacrebleu, chrf, ter, exact_match; perplexity is of the
    rows themselves."""
    eval_reward_funcs: Annotated[
        tuple[str, ...], FUNCTION_PATH, ANSWER, HELD_OUT, unused_if("evals_per_epoch", 0, reason="evals_per_epoch is 0")
    ] = ()
    """Rewards of answers to held-out prompts: functions, reward models and judges, named as in reward_funcs of treetune grpo; the answer
    of a row is in the columns answer, ground_truth, solution and reference."""
    eval_reward_timeout: Annotated[float, SECONDS, ANSWER, unused_unless("eval_reward_funcs", reason="eval_reward_funcs names none")] = 60.0
    """Seconds for a call of a function in eval_reward_funcs, on up to 64 answers; after that they are tried one by one."""
    eval_answers: Annotated[int | None, COUNT, ANSWER, Unused(_unmeasured)] = None
    """Held-out prompts whose answers are measured, the first of them; all if not given."""


def conflicts(options: AnswerOptions) -> None:
    """Raise ValueError for a reward or a metric that comes twice, and for a metric that is not known or not installed."""
    if len(set(options.eval_reward_funcs)) != len(options.eval_reward_funcs):
        raise ValueError(f"eval_reward_funcs is {', '.join(options.eval_reward_funcs)}: expected none twice")
    answer_metrics.check(options.eval_causal_lm_metrics, "eval_causal_lm_metrics")
