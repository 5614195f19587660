"""The answer to one prompt, before and after training: what a person looks at first."""

from collections.abc import Callable

from treetune.core.data import prompt_ids
from treetune.core.data.prompt_ids import Samples
from treetune.core.protocols import Tokenizer
from treetune.core.run.observers import Observers
from treetune.core.state import TrainState


def answerer(
    prompt: str, sample: Callable[[TrainState], Samples], tokenizer: Tokenizer, observers: Observers
) -> Callable[[TrainState], None]:
    """A function that answers the prompt with the weights of a state and tells the observers; sample(state) -> the ids of the answer."""

    def answer(state: TrainState) -> None:
        with observers.busy("answering the sample prompt"):
            samples = sample(state)
        completion = prompt_ids.decode_samples(tokenizer, samples)[0]
        observers.samples([{"step": int(state.step), "prompt": prompt, "answer": completion}])

    return answer
