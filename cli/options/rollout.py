"""Options of sampling completions and of their rewards. Importing this imports no torch."""

from dataclasses import dataclass
from typing import Annotated

from treetune.core.config.marks import (
    COMPLETIONS,
    FUNCTION_PATH,
    NAMED_VALUES,
    REWARD,
    SAMPLED_FROM,
    function,
    listed,
    refused,
    unused_unless,
)
from treetune.core.config.ranges import (
    ANY,
    BELOW_ONE,
    COUNT_OR_NONE,
    POSITIVE,
    PROCESSES,
    SECONDS,
    SHARE,
    SMALL,
    TEMPERATURE,
    TOKENS,
    whole,
)

VLLM = unused_unless("use_vllm", reason="use_vllm is off")
VLLM_ONLY = ("repetition_penalty", "vllm_guided_decoding_regex", "generation_kwargs")


@dataclass(frozen=True)
class RolloutOptions:
    """Sampling."""

    num_generations: Annotated[int, SMALL, refused("stored groups hold this many completions")] = 8
    """Completions of each prompt."""
    max_completion_length: Annotated[int, TOKENS, COMPLETIONS] = 256
    """Longest completion in tokens."""
    temperature: Annotated[float, TEMPERATURE, SAMPLED_FROM] = 1.0
    """Divides the logits, while sampling and while training alike."""
    top_p: Annotated[float, SHARE, SAMPLED_FROM] = 1.0
    """Nucleus sampling: sample among the likeliest tokens whose probabilities add up to this."""
    top_k: Annotated[int, COUNT_OR_NONE, SAMPLED_FROM] = 0
    """Sample among this many likeliest tokens; 0 for all."""
    min_p: Annotated[float, BELOW_ONE, SAMPLED_FROM] = 0.0
    """Leave out tokens whose probability is below this fraction of the likeliest token's."""
    stop_token_ids: Annotated[tuple[int, ...], whole(0, 2**31 - 1), SAMPLED_FROM] = ()
    """Tokens that end a completion besides the model's own."""
    repetition_penalty: Annotated[float, POSITIVE, SAMPLED_FROM, VLLM] = 1.0
    """Penalty on tokens that occurred (vLLM only); 1 is none."""
    vllm_guided_decoding_regex: Annotated[str | None, SAMPLED_FROM, VLLM] = None
    """Completions must match this regular expression (vLLM only)."""
    generation_kwargs: Annotated[tuple[str, ...], NAMED_VALUES, SAMPLED_FROM, VLLM] = ()
    """NAME=VALUE, further sampling parameters (vLLM only), values as JSON: min_tokens=8; in a file also a mapping."""
    rollout_func: Annotated[str | None, FUNCTION_PATH, function(SAMPLED_FROM.reason, "rollout_func")] = None
    """module.function or file.py:function that plays the completions (several turns, tools, environments), instead of plain sampling; see
    docs/online.md."""


@dataclass(frozen=True)
class RewardFunctions:
    """Rewards."""

    reward_funcs: Annotated[tuple[str, ...], FUNCTION_PATH, function(REWARD.reason, "reward_funcs")] = ("gsm8k",)
    """Rewards: built in (gsm8k, math_equal, math_verify, format_tags, length, repetition, digits, llm_judge), an import path
    (rewards.accuracy), file.py:function, or a reward model's folder or Hugging Face id. Options follow a question mark:
    length?max=512,cache=128. A function takes completions and the columns that its parameters name, and gives a number for each
    completion, or None to abstain."""
    reward_weights: Annotated[tuple[float, ...], ANY._replace(words="finite numbers, at most 3e+38"), REWARD] = ()
    """A weight for each reward; 1 each if not given. A completion gets the weighted sum of the rewards that have an opinion."""
    reward_num_workers: Annotated[int, PROCESSES, listed("says how rewards are run, not what they are")] = 1
    """Processes that reward functions run in; one that hangs or crashes costs its own completion, not the run."""
    reward_timeout: Annotated[float, SECONDS, listed("says how rewards are run, not what they are")] = 30.0
    """Seconds for a call of a reward function, on a worker's share of the completions; after that they are tried one by one."""
