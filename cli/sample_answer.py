"""The answer to one prompt, before and after training: what a person looks at first."""

from collections.abc import Callable

from treetune.cli.run import Run
from treetune.core.data import prompt_ids, sample_prompt
from treetune.core.data.dataset import Dataset
from treetune.core.state import TrainState
from treetune.models import decode, policy
from treetune.models.policy import Policy


def prepare(run: Run, start: Policy, data: Dataset, stop_ids: list[int]) -> Callable[[TrainState], None]:
    """A function that answers the sample prompt with the weights of a state and tells the observers; nothing for reward models.

    Errors: ValueError for a prompt that the model cannot read.
    """
    head = "head" in start.params
    column = getattr(run.config.data, "text_column", "text")
    asked = run.config.run.sample_prompt
    text, ids = ("", []) if head else sample_prompt.choose(data, start.tokenizer, asked=asked, text_column=column)
    prompt_ids.check_ids(ids, start.cfg.vocab_size, "the sample prompt")
    tokens = min(run.config.run.sample_tokens, start.cfg.max_positions - len(ids))
    sizes = policy.bare(start)

    def answer(state: TrainState) -> None:
        if not ids or tokens < 1:
            return
        model, lora = policy.current(sizes, state.params, state.frozen)  # on every rank: sharded leaves are gathered
        with run.observers.busy("answering the sample prompt"):
            samples = decode.sample(model, [ids], lora=lora, max_new_tokens=tokens, temperature=0.0, stop=stop_ids, seed=0)
        completion = prompt_ids.decode_samples(start.tokenizer, samples)[0]
        run.observers.samples([{"step": int(state.step), "prompt": text, "answer": completion}])

    return answer
