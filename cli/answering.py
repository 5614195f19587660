"""What a run answers: the sample prompt before and after training, and held-out prompts at each evaluation."""

from collections.abc import Callable, Sequence
from functools import partial

from treetune.cli.assembly import Assembly
from treetune.cli.options.run import RunOptions
from treetune.cli.run import TrainRun
from treetune.core.data import prompt_ids, questions, sample_prompt
from treetune.core.data.questions import Question
from treetune.core.run import answer_metrics, answers, loop
from treetune.core.run.answers import Answerer
from treetune.core.state import TrainState
from treetune.models import sampling


def of_sample_prompt(this: TrainRun, parts: Assembly) -> Callable[[TrainState], object]:
    """A function that answers the sample prompt with the weights of a state; nothing for reward models.

    Errors: ValueError for a prompt that the model cannot read.
    """
    start, options = parts.policy, this.config.run
    if "head" in start.params:
        return lambda state: None
    column = getattr(this.config.data, "text_column", "text")
    text, ids = sample_prompt.choose(parts.data, start.tokenizer, asked=options.sample_prompt, text_column=column)
    _check_ids(parts, ids, "the sample prompt")
    if not ids or len(ids) >= start.cfg.shared_positions:
        return lambda state: None
    return answers.told(_answerer(parts, options.sample_tokens, [Question(text, ids)]), this.observers, "answering the sample prompt")


def evaluation(this: TrainRun, parts: Assembly) -> loop.Evaluate | None:
    """The evaluation of the run, in which it answers held-out prompts: as many as eval_table_size says, and as metrics are asked of.

    Errors: ValueError where there is none to answer.
    """
    evaluate, options = parts.supply.evaluate, this.config.run
    metrics = [name for name in options.eval_causal_lm_metrics if name != answer_metrics.PERPLEXITY]
    measured = (len(parts.data.val) if options.eval_answers is None else options.eval_answers) if metrics else 0
    if not options.eval_table_size and not measured:
        return evaluate
    asked = _held_out(this, parts, max(options.eval_table_size, measured))
    _check_answers(asked, options, metrics)
    if evaluate is None:
        return None
    for question in asked:
        _check_ids(parts, question.ids, f"the prompt of held-out row {question.row}")
    make = partial(_answerer, parts, options.eval_max_new_tokens)
    answer = answers.shared(asked, make, sampling.joiner(parts.policy), this.ranks)
    told = answers.told(answer, this.observers, "answering held-out prompts", options.eval_table_size)

    def measure(found: list[answers.Answer]) -> dict[str, float]:
        return answer_metrics.measure(metrics, [(one.completion, one.reference) for one in found[:measured]])

    return answers.evaluating(evaluate, lambda state: told(parts.shown(state)), measure)


def _check_answers(asked: Sequence[Question], options: RunOptions, metrics: Sequence[str]) -> None:
    """Raise ValueError where nothing can be asked, or where no answer has another to be compared with."""
    option = "eval_causal_lm_metrics" if metrics else "eval_table_size"
    if not asked:
        value = ", ".join(metrics) or options.eval_table_size
        raise ValueError(f"{option} is {value}, and no held-out row has a prompt and an answer: hold such rows out, or leave {option} out")
    if metrics and all(question.reference is None for question in asked[: options.eval_answers]):
        columns = ", ".join(questions.REFERENCES)
        raise ValueError(f"{option} is {', '.join(metrics)}, and no held-out row has an answer in one of the columns {columns}: add one")


def _held_out(this: TrainRun, parts: Assembly, size: int) -> list[Question]:
    """The first questions of the held-out rows that leave room for an answer."""
    positions = parts.policy.cfg.shared_positions
    asked = questions.held_out(parts.data.val, size, parts.policy.tokenizer, parts.stop_ids, this.config.run.eval_max_new_tokens)
    return [question for question in asked if len(question.ids) < positions]


def _answerer(parts: Assembly, length: int, asked: Sequence[Question]) -> Answerer:
    """The likeliest answers of the policy."""
    sample = sampling.sampler(parts.policy, temperature=0.0, stop=parts.stop_ids, seed=0)
    limits = answers.Limits(length, parts.policy.cfg.shared_positions, parts.stop_ids)
    return answers.answerer(asked, sample, parts.policy.tokenizer, limits)


def _check_ids(parts: Assembly, ids: Sequence[int], name: str) -> None:
    prompt_ids.check_ids(ids, parts.policy.cfg.vocab_size, name)
