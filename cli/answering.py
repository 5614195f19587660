"""What a run answers: the sample prompt before and after training, and held-out prompts at each evaluation."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

from treetune.cli.assembly import Assembly
from treetune.cli.methods import rewarding
from treetune.cli.options import meshes
from treetune.cli.options.rollout import RewardFunctions
from treetune.cli.run import TrainRun
from treetune.core.data import prompt_ids, questions, sample_prompt
from treetune.core.data.questions import Question
from treetune.core.run import answer_metrics, answer_rewards, answers, loop
from treetune.core.run.answers import Answer, Answerer
from treetune.core.state import TrainState
from treetune.models import sampling, tensor_rules

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
    _check_ids(parts, ids, "the sample prompt")
    if not ids or len(ids) >= start.cfg.shared_positions:
        return lambda state: None
    return answers.told(_answerer(parts, options.sample_tokens, [Question(text, ids)]), this.observers, "answering the sample prompt")


def evaluation(this: TrainRun, parts: Assembly, stack: ExitStack) -> loop.Evaluate | None:
    """The evaluation of the run, in which it answers held-out prompts: as many as eval_table_size says, and as are measured.

    What scores answers ends with the stack. Errors: ValueError where there is none to answer, or what is to score cannot be loaded.
    """
    evaluate, options = parts.supply.evaluate, this.config.run
    measures = {name: ", ".join(getattr(options, name)) for name in MEASURES if set(getattr(options, name)) - {answer_metrics.PERPLEXITY}}
    measured = (len(parts.data.val) if options.eval_answers is None else options.eval_answers) if measures else 0
    if not options.eval_table_size and not measures:
        return evaluate
    asked = _held_out(this, parts, max(options.eval_table_size, measured))
    _check_answers(asked, measures or {"eval_table_size": options.eval_table_size})
    if evaluate is None:
        return None
    for question in asked:
        _check_ids(parts, question.ids, f"the prompt of held-out row {question.row}")
    make = partial(_answerer, parts, options.eval_max_new_tokens)
    answer = answers.shared(asked, make, sampling.joiner(parts.policy), this.ranks)
    told = answers.told(answer, this.observers, "answering held-out prompts", options.eval_table_size)
    return answers.evaluating(evaluate, lambda state: told(parts.shown(state)), _measure(this, parts, asked[:measured], stack))


def _check_answers(asked: Sequence[Question], wanted: Mapping[str, object]) -> None:
    """Raise ValueError where nothing can be asked, or where no answer has another to be compared with. wanted: options that ask."""
    option, value = next(iter(wanted.items()))
    if not asked:
        raise ValueError(f"{option} is {value}, and no held-out row has a prompt and an answer: hold such rows out, or leave {option} out")
    if (names := wanted.get(MEASURES[0])) and all(question.reference is None for question in asked):
        columns = ", ".join(questions.REFERENCES)
        raise ValueError(f"{MEASURES[0]} is {names}, and no held-out row has an answer in one of the columns {columns}: add one")


def _measure(this: TrainRun, parts: Assembly, asked: Sequence[Question], stack: ExitStack) -> answers.Measure:
    """The metrics and rewards of the first answers, which are those to `asked`."""
    options = this.config.run
    metrics = [name for name in options.eval_causal_lm_metrics if name != answer_metrics.PERPLEXITY]
    score = _scorer(this, parts, asked, stack) if options.eval_reward_funcs else None

    def measure(found: list[Answer]) -> dict[str, float]:
        first = found[: len(asked)]
        values = answer_metrics.measure(metrics, [(one.completion, one.reference) for one in first])
        return values if score is None else values | score(first)

    return measure


def _scorer(this: TrainRun, parts: Assembly, asked: Sequence[Question], stack: ExitStack) -> answer_rewards.Scorer:
    """What scores answers, loaded as the rewards of online training are, and warned of prompts that it cannot score."""
    options, split = this.config.run, tensor_rules.home(this.ranks.mesh, meshes.sharding(this.config.run))
    functions = RewardFunctions(options.eval_reward_funcs, reward_timeout=options.eval_reward_timeout)
    place = rewarding.Place(this.device, this.ranks, split)
    rewards = rewarding.start(functions, this.config.model, place, say=this.say, warn=this.observers.warn)
    stack.callback(rewards.close)
    prompts = answer_rewards.prompts(asked, parts.policy.tokenizer)
    rewards.check(prompts)
    return answer_rewards.Scorer(rewards, prompts, this.observers.warn, this.ranks)


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
