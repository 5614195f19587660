"""`treetune ebft`: energy-based fine-tuning towards the features of true texts, in one of two modes."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from treetune.cli.errors import BadInput
from treetune.cli.methods.method import Method, Parts, Setting
from treetune.cli.options import online
from treetune.cli.options.data import SAMPLES, AnyRows, HeldOut
from treetune.cli.options.model import AdapterOptions, ModelOptions, VocabularyOptions
from treetune.cli.options.optim import SCHEDULE, OptimOptions, peak
from treetune.cli.options.pipeline import CorrectionOptions, EngineOptions, PipelineOptions
from treetune.cli.options.policy_loss import POLICY_LOSS, PolicyLoss
from treetune.cli.options.reference import RlReference
from treetune.cli.options.rollout import RolloutOptions
from treetune.cli.options.run import RunOptions
from treetune.core.config import table
from treetune.core.config.marks import (
    COMPLETIONS,
    NAMED_VALUES,
    OBJECTIVE,
    PLACE,
    ROWS_AND_ORDER,
    ROWS_READ,
    SAMPLED_FROM,
    STEP_ROWS,
    STEP_SIZE,
    Unused,
    Values,
    refused,
    unused_unless,
)
from treetune.core.config.ranges import NOT_NEGATIVE, PART, POSITIVE, SMALL, TEMPERATURE, TOKENS, TOKENS_MAX, Range, whole
from treetune.core.config.table import group

if TYPE_CHECKING:
    from treetune.models.policy import Policy


RATES = (1e-5, 1e-6)
TEMPERATURES = {"structured": 1.0, "strided": 0.6}
FEATURES = refused("decides what features are, and so what a reward is")
ANCHORS = refused("decides where rollouts start and how long they are")


def _only(mode: str, twin: str | None = None) -> Unused:
    """An option of one mode, with its twin in the other."""
    instead = f"; the option is --{twin.replace('_', '-')}" if twin else ""
    return unused_unless("mode", mode, reason=f"mode is {{mode}}{instead}")


def _one_rollout(values: Values) -> str:
    count = values["n_samples_per_prompt" if values["mode"] == "strided" else "num_generations"]
    return "there is one rollout, which has nothing to be like" if count == 1 else ""


@dataclass(frozen=True)
class EbftData(HeldOut, AnyRows):
    """Data. A config file may have `datasets`, a list of mappings with `path`, `type` and options, instead of `data`."""

    data: Annotated[tuple[str, ...], ROWS_READ] = (SAMPLES["sft"],)
    format: Annotated[str, ROWS_READ] = "auto"
    """Transform of the rows: ebft_opencode.transform, ebft_chat_multiturn.transform, ebft_pretrain.transform, ..., or an import path of
    your own; auto goes by mode and columns and prints it. docs/ebft.md lists them."""
    sequence_len: Annotated[int, TOKENS, ROWS_AND_ORDER] = 512
    """Longest document (strided) or prompt with its true reply (structured), in tokens; a longer prompt with reply is dropped."""
    overlong: Annotated[Literal["drop", "truncate", "error"], ROWS_READ] = "truncate"
    """What to do with a longer strided document that has a prompt; raw text is always split."""
    chat_template_kwargs: Annotated[tuple[str, ...], NAMED_VALUES, ROWS_READ] = ()
    """NAME=VALUE for the chat template, such as enable_thinking=false; in a file also a mapping."""


@dataclass(frozen=True)
class EbftOptions:
    """Feature matching. alignment and diversity hold their factor 2, in rewards and in metrics."""

    mode: Annotated[Literal["structured", "strided"], FEATURES] = "structured"
    """structured: prompts with a true reply, whole replies are sampled. strided: documents, short rollouts from every stride-th token."""
    feature_layers: Annotated[tuple[float, ...], PART._replace(words="depths from 0 to 1, such as 0.25 0.5 0.75"), FEATURES] = (
        0.25,
        0.5,
        0.75,
    )
    """Depths of the hidden states that are compared, from 0 (embeddings) to 1 (after the last norm)."""
    embed_method: Annotated[Literal["last_token", "mean_pooling", "completion_mean", "concat"], FEATURES] = "last_token"
    """How the tokens of a text become one vector: the last; the mean; the mean of the completion (in strided mode there is no other part);
    those at a quarter, half and three quarters side by side."""
    feature_norm: Annotated[Literal["per_layer", "joint", "raw"] | None, FEATURES] = None
    """Length 1 at each token for each layer, for all together, or neither; if not given, per_layer in strided mode, and in structured mode
    raw (where pooled vectors get length 1 unless whitened)."""
    use_whitening: Annotated[bool, FEATURES] = False
    """Whiten the features of the rollouts of a prompt or anchor; diversity then only counts duplicates. The paper advises it."""
    whitening_space: Annotated[Literal["features", "rows"], FEATURES, unused_unless("use_whitening", reason="use_whitening is off")] = (
        "features"
    )
    """features: the truth is projected onto the span of the rollouts, alignment compares siblings; rows: alignment is absolute."""
    alignment_coef: Annotated[float, NOT_NEGATIVE, FEATURES] = 1.0
    """Weight of alignment, 2 cos(rollout, truth)."""
    diversity_coef: Annotated[float, NOT_NEGATIVE, FEATURES, Unused(_one_rollout)] = 1.0
    """Weight of diversity, twice the mean product with the other rollouts, which is subtracted."""
    ce_coef: Annotated[float, NOT_NEGATIVE, OBJECTIVE] = 0.0
    """Weight of the cross-entropy of the true tokens; 0.03 is balanced, 0.1 dominates."""
    feature_device: Annotated[Literal["auto", "cpu"], PLACE] = "auto"
    """Where the frozen network is: beside the model (free with an adapter, whose base it is), or a copy in main memory."""
    adaptive_max_tokens: Annotated[bool, COMPLETIONS, _only("structured")] = True
    """Structured: sample at most gt_length_multiplier times the longest true reply of a batch (at least 64 tokens), and never more than
    max_completion_length."""
    gt_length_multiplier: Annotated[
        float, Range(0.1, 1e6), COMPLETIONS, _only("structured"), unused_unless("adaptive_max_tokens", reason="adaptive_max_tokens is off")
    ] = 1.5
    """Structured: that factor; at least 0.1."""
    stride: Annotated[int, TOKENS, ANCHORS, _only("strided")] = 8
    """Strided: tokens from one anchor to the next."""
    context_length: Annotated[int, TOKENS, ANCHORS, _only("strided")] = 8
    """Strided: tokens before the first anchor; a rollout sees all of its document up to its anchor."""
    generate_max_len: Annotated[int, TOKENS, ANCHORS, _only("strided", "max_completion_length")] = 8
    """Strided: tokens of a rollout, and of the true block that it is compared with."""
    n_samples_per_prompt: Annotated[int, SMALL, ANCHORS, _only("strided", "num_generations")] = 4
    """Strided: rollouts from each anchor."""
    rl_coef: Annotated[float, NOT_NEGATIVE, OBJECTIVE, _only("strided")] = 1.0
    """Strided: weight of the policy-gradient loss."""
    advantage_estimator: Annotated[Literal["rloo", "group_norm", "reinforce", "rloo_paired"], OBJECTIVE, _only("strided", "advantage")] = (
        "rloo"
    )
    """Strided: reward less the mean of the other rollouts; less the mean and divided by the deviation; as it is; as rloo, with a baseline
    that leaves out the pairs that a rollout is part of."""
    min_completion_prefix: Annotated[int, whole(0, TOKENS_MAX), ANCHORS, _only("strided")] = 0
    """Strided: tokens of a completion before its first anchor."""


@dataclass(frozen=True)
class EbftRollout(RolloutOptions):
    """Sampling. Strided mode takes temperature and top_p."""

    num_generations: Annotated[int, SMALL, refused("stored groups hold this many completions")] = 4
    """Structured: completions of each prompt."""
    temperature: Annotated[float | None, TEMPERATURE, SAMPLED_FROM] = None
    """Divides the logits, while sampling and while training alike; if not given 1 in structured mode and 0.6 in strided."""


@dataclass(frozen=True)
class EbftLoss(PolicyLoss):
    """Loss of structured mode. The start of a run prints what a name stands for."""

    loss: Annotated[str, POLICY_LOSS, OBJECTIVE] = "grpo"
    """Method: what is clipped, what the loss is a mean over, and how rewards become advantages; docs/online.md has a table.
    Or a function of your own, as the term of a token."""


@dataclass(frozen=True)
class EbftOptim(OptimOptions):
    """Optimisation."""

    learning_rate: Annotated[float | None, POSITIVE, STEP_SIZE, peak(RATES)] = None
    lr_scheduler: Annotated[str, SCHEDULE, STEP_SIZE] = "constant"
    """Shape of the learning rate after the warm-up, or a function of your own."""
    micro_batch_size: Annotated[int, SMALL, STEP_ROWS] = 2
    """Prompts with their completions (structured), or documents or, packed, sequence_len's worth of their tokens (strided), in one pass."""


@dataclass(frozen=True)
class Ebft:
    """Energy-based fine-tuning: rewards are features of a frozen network that sampled and true texts share; no reward function."""

    model: ModelOptions = group(ModelOptions)
    data: EbftData = group(EbftData)
    vocabulary: VocabularyOptions = group(VocabularyOptions)
    adapter: AdapterOptions = group(AdapterOptions)
    ebft: EbftOptions = group(EbftOptions)
    rollout: EbftRollout = group(EbftRollout)
    loss: EbftLoss = group(EbftLoss)
    correction: CorrectionOptions = group(CorrectionOptions)
    pipeline: PipelineOptions = group(PipelineOptions)
    engine: EngineOptions = group(EngineOptions)
    reference: RlReference = group(RlReference)
    optim: EbftOptim = group(EbftOptim)
    run: RunOptions = group(RunOptions)


SAMPLED = ("loss", "correction", "pipeline", "engine", "reference")  # groups of options of the run that structured mode shares with grpo
BOTH = ("temperature", "top_p")  # options of sampling that strided mode takes
TWINS = {"num_generations": "n_samples_per_prompt", "max_completion_length": "generate_max_len", "advantage": "advantage_estimator"}
STRUCTURED = {
    "sample_packing": "structured mode takes micro_batch_size prompts in a forward pass, always packed",
    "overlong": "structured mode drops a prompt that is longer than sequence_len with its true reply: a truth that is cut is none",
    "dataset_prepared_path": "structured mode reads its prompts anew in each run",
} | dict.fromkeys(("reroll_start_fraction", "reroll_max_groups"), "features are never all 0, so no prompt counts as failed")


def conflicts(config: Ebft) -> None:
    """Raise BadInput for options that contradict each other."""
    options, strided = config.ebft, config.ebft.mode == "strided"
    if not options.feature_layers or not all(0 <= depth <= 1 for depth in options.feature_layers):
        raise BadInput(
            f"feature_layers must be depths from 0 to 1, at least one, such as 0.25 0.5 0.75, got {list(options.feature_layers)}"
        )
    if options.alignment_coef == 0 and options.diversity_coef == 0:
        raise BadInput("alignment_coef and diversity_coef are both 0, so nothing is rewarded: give one of them a value")
    if config.rollout.temperature == 0:
        raise BadInput(
            "temperature 0 is greedy decoding, so all rollouts of a group would be identical: give a number above 0, usually 1 "
            "(structured) or 0.6 (strided)"
        )
    if strided and options.rl_coef == 0 and options.ce_coef == 0:
        raise BadInput("rl_coef and ce_coef are both 0, so nothing would train: give one of them a value")
    if options.use_whitening and _one_rollout(table.flatten(config)):
        raise BadInput("use_whitening compares rollouts with each other, and there is one: sample more, or leave out use_whitening")
    if strided:
        return
    if config.run.sharding == "full" and config.pipeline.streaming_partial_batch:
        raise BadInput(
            "streaming_partial_batch does not go with --sharding full: ranks would gather the feature network at different times"
        )
    online.conflicts(config)


def unused(config: Ebft) -> dict[str, str]:
    """Strided mode samples and scores in its own way; structured mode reads whole texts."""
    if config.ebft.mode == "structured":
        return STRUCTURED
    names = [name for group in SAMPLED for name in vars(getattr(config, group))]
    names += [name for name in vars(config.rollout) if name not in BOTH]
    return {name: _only("structured", TWINS.get(name)).reason({"mode": "strided"}) for name in names}


def variant(config: Ebft) -> dict[str, Any]:
    """Strided mode reads documents and is judged by its features' distance; what its loss is a mean over depends on its terms."""
    if config.ebft.mode == "structured":
        return {}
    unit = "generated tokens" if config.ebft.ce_coef == 0 else "generated tokens, and over all tokens of documents,"
    shown = ("ebft/mean_reward", *METHOD.shown[1:])
    return {"data": "strided", "unit": unit, "shown": shown, "goal": "ebft/cfm_loss"}


def complete(config: Ebft) -> Ebft:
    """The config with the temperature of its mode, where none is given."""
    if config.rollout.temperature is not None:
        return config
    return dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, temperature=TEMPERATURES[config.ebft.mode]))


def parts(config: Ebft, policy: "Policy", setting: Setting) -> Parts:
    """Features of sampled texts compared with those of true ones."""
    from treetune.cli.methods import ebft_strided, ebft_structured

    modes: dict[str, Callable[..., Parts]] = {"strided": ebft_strided.parts, "structured": ebft_structured.parts}
    return modes[config.ebft.mode](config, policy, setting)


METHOD = Method(
    "ebft",
    "learn from true texts by their features, without a reward function",
    Ebft,
    RATES,
    "truths",
    parts,
    ("reward", "ebft/alignment", "ebft/diversity", "ebft/cfm_loss"),
    "completions",
    goal="reward",
    conflicts=conflicts,
    unused=unused,
    variant=variant,
    complete=complete,
)
