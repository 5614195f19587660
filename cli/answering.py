"""What is answered: by a run the sample prompt before and after training, by it and `treetune eval` held-out prompts."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

from treetune.cli.assembly import Assembly
from treetune.cli.methods import rewarding
from treetune.cli.methods.rewarding import Place
from treetune.cli.options import meshes
from treetune.cli.options.answers import AnswerOptions
from treetune.cli.options.model import ModelOptions
from treetune.cli.options.rollout import RewardFunctions
from treetune.cli.run import TrainRun
from treetune.core.data import prompt_ids, questions, sample_prompt
from treetune.core.data.questions import Question
from treetune.core.run import answer_metrics, answer_rewards, answers, loop
from treetune.core.run.answers import Answer, Answerer
from treetune.core.run.observers import Observers
from treetune.core.state import TrainState
from treetune.models import sampling, tensor_rules
from treetune.models.policy import Policy

MEASURES = ("eval_causal_lm_metrics", "eval_reward_funcs")


def of_sample_prompt(this: TrainRun, parts: Assembly) -> Callable[[TrainState], object]:
    """A function that answers the sample prompt with the weights of a state; nothing for reward models.

    Errors: ValueError for a prompt that the model cannot read.
    """
    start, options = parts.policy, this.config.run
    if "head" in start.params:
        return lambda state: None
    column = getattr(this.config.data, "text_column", "text")
    text, ids = sample_prompt.choose(parts.data, start.tokenizer, asked=options.sample_prompt, text_column=column)
    _check_ids(start, ids, "the sample prompt")
    if not ids or len(ids) >= start.cfg.shared_positions:
        return lambda state: None
    answer = _answerer(start, parts.stop_ids, options.sample_tokens, [Question(text, ids)])
    return answers.told(answer, this.observers, "answering the sample prompt")


class Interview(NamedTuple):
    """Held-out rows that ask, the policy that answers, and where what scores its answers is loaded.

    most: answers that the observers are told of, the first ones; all where it is None.
    """

    options: AnswerOptions
    model: ModelOptions
    policy: Policy
    rows: Sequence[Any]
    stop_ids: Sequence[int]
    place: Place
    observers: Observers
    most: int | None = None


def evaluation(this: TrainRun, parts: Assembly, stack: ExitStack) -> loop.Evaluate | None:
    """The evaluation of the run, in which it answers held-out prompts: as many as eval_table_size says, and as are measured.

    What scores answers ends with the stack. Errors: ValueError where there is none to answer, or what is to score cannot be loaded.
    """
    options, split = this.config.run, tensor_rules.home(this.ranks.mesh, meshes.sharding(this.config.run))
    place = Place(this.device, this.ranks, split)
    sources = (parts.policy, parts.data.val, parts.stop_ids, place, this.observers)
    asking = asked(Interview(options, this.config.model, *sources, most=options.eval_table_size), stack)
    if asking is None or parts.supply.evaluate is None:
        return parts.supply.evaluate
    answer, measure = asking
    return answers.evaluating(parts.supply.evaluate, lambda state: answer(parts.shown(state)), measure)


def asked(this: Interview, stack: ExitStack) -> tuple[Answerer, answers.Measure] | None:
    """The function that has a policy answer, and the one that measures its answers; None where no option asks for answers.

    What scores answers ends with the stack. Errors: ValueError where there is none to answer, or what is to score cannot be loaded.
    """
    options = this.options
    measures = {name: ", ".join(getattr(options, name)) for name in MEASURES if set(getattr(options, name)) - {answer_metrics.PERPLEXITY}}
    measured = (len(this.rows) if options.eval_answers is None else options.eval_answers) if measures else 0
    if not options.eval_table_size and not measures:
        return None
    found = _held_out(this, max(options.eval_table_size, measured))
    _check_answers(found, measures or {"eval_table_size": options.eval_table_size})
    for question in found:
        _check_ids(this.policy, question.ids, f"the prompt of held-out row {question.row}")
    make = partial(_answerer, this.policy, this.stop_ids, options.eval_max_new_tokens)
    answer = answers.shared(found, make, sampling.joiner(this.policy), this.place.ranks)
    told = answers.told(answer, this.observers, "answering held-out prompts", this.most)
    return told, _measure(this, found[:measured], stack)


def _check_answers(found: Sequence[Question], wanted: Mapping[str, object]) -> None:
    """Raise ValueError where nothing can be asked, or where no answer has another to be compared with. wanted: options that ask."""
    option, value = next(iter(wanted.items()))
    if not found:
        raise ValueError(f"{option} is {value}, and no held-out row has a prompt and an answer: hold such rows out, or leave {option} out")
    if (names := wanted.get(MEASURES[0])) and all(question.reference is None for question in found):
        columns = ", ".join(questions.REFERENCES)
        raise ValueError(f"{MEASURES[0]} is {names}, and no held-out row has an answer in one of the columns {columns}: add one")


def _measure(this: Interview, found: Sequence[Question], stack: ExitStack) -> answers.Measure:
    """The metrics and rewards of the first answers, which are those to `found`."""
    metrics = [name for name in this.options.eval_causal_lm_metrics if name != answer_metrics.PERPLEXITY]
    score = _scorer(this, found, stack) if this.options.eval_reward_funcs else None

    def measure(all_: list[Answer]) -> dict[str, float]:
        first = all_[: len(found)]
        values = answer_metrics.measure(metrics, [(one.completion, one.reference) for one in first])
        return values if score is None else values | score(first)

    return measure


def _scorer(this: Interview, found: Sequence[Question], stack: ExitStack) -> answer_rewards.Scorer:
    """What scores answers, loaded as the rewards of online training are, and warned of prompts that it cannot score."""
    functions = RewardFunctions(this.options.eval_reward_funcs, reward_timeout=this.options.eval_reward_timeout)
    rewards = rewarding.start(functions, this.model, this.place, say=this.observers.message, warn=this.observers.warn)
    stack.callback(rewards.close)
    prompts = answer_rewards.prompts(found, this.policy.tokenizer)
    rewards.check(prompts)
    return answer_rewards.Scorer(rewards, prompts, this.observers.warn, this.place.ranks)


def _held_out(this: Interview, size: int) -> list[Question]:
    """The first questions of the held-out rows that leave room for an answer."""
    positions = this.policy.cfg.shared_positions
    found = questions.held_out(this.rows, size, this.policy.tokenizer, this.stop_ids, this.options.eval_max_new_tokens)
    return [question for question in found if len(question.ids) < positions]


def _answerer(policy: Policy, stop_ids: Sequence[int], length: int, found: Sequence[Question]) -> Answerer:
    """The likeliest answers of the policy."""
    sample = sampling.sampler(policy, temperature=0.0, stop=stop_ids, seed=0)
    return answers.answerer(found, sample, policy.tokenizer, answers.Limits(length, policy.cfg.shared_positions, stop_ids))


def _check_ids(policy: Policy, ids: Sequence[int], name: str) -> None:
    prompt_ids.check_ids(ids, policy.cfg.vocab_size, name)
