"""What a run answers: the sample prompt before and after training, and held-out prompts at each evaluation."""

from collections.abc import Callable, Sequence
from functools import partial

from treetune.cli.assembly import Assembly
from treetune.cli.run import TrainRun
from treetune.core.data import prompt_ids, questions, sample_prompt
from treetune.core.data.questions import Question
from treetune.core.run import answers, loop
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
    """The evaluation of the run, in which it answers as many held-out prompts as eval_table_size says.

    Errors: ValueError where there is none to answer.
    """
    evaluate, size, length = parts.supply.evaluate, this.config.run.eval_table_size, this.config.run.eval_max_new_tokens
    if not size:
        return evaluate
    asked = _held_out(this, parts, size, length)
    if evaluate is None or not asked:
        raise ValueError(f"eval_table_size is {size}, and no held-out row has a prompt and an answer: hold such rows out, or leave it at 0")
    for question in asked:
        _check_ids(parts, question.ids, f"the prompt of held-out row {question.row}")
    answer = answers.shared(asked, partial(_answerer, parts, length), sampling.joiner(parts.policy), this.ranks)
    told = answers.told(answer, this.observers, "answering held-out prompts")
    return answers.evaluating(evaluate, lambda state: told(parts.shown(state)))


def _held_out(this: TrainRun, parts: Assembly, size: int, length: int) -> list[Question]:
    """The first questions of the held-out rows that leave room for an answer."""
    positions = parts.policy.cfg.shared_positions
    asked = questions.held_out(parts.data.val, size, parts.policy.tokenizer, parts.stop_ids, length)
    return [question for question in asked if len(question.ids) < positions]


def _answerer(parts: Assembly, length: int, asked: Sequence[Question]) -> Answerer:
    """The likeliest answers of the policy."""
    sample = sampling.sampler(parts.policy, temperature=0.0, stop=parts.stop_ids, seed=0)
    limits = answers.Limits(length, parts.policy.cfg.shared_positions, parts.stop_ids)
    return answers.answerer(asked, sample, parts.policy.tokenizer, limits)


def _check_ids(parts: Assembly, ids: Sequence[int], name: str) -> None:
    prompt_ids.check_ids(ids, parts.policy.cfg.vocab_size, name)
