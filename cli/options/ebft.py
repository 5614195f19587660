"""Options of `treetune ebft`, in both modes. Importing this imports no torch."""

from dataclasses import dataclass
from typing import Annotated, Literal

from treetune.cli.options.data import SAMPLES, AnyRows, HeldOut
from treetune.cli.options.hub import HubOptions
from treetune.cli.options.model import AdapterOptions, ModelOptions, VocabularyOptions
from treetune.cli.options.optim import SCHEDULE, OptimOptions, peak
from treetune.cli.options.pipeline import CorrectionOptions, EngineOptions, PipelineOptions
from treetune.cli.options.policy_loss import POLICY_LOSS, PolicyLoss
from treetune.cli.options.reference import RlReference
from treetune.cli.options.rollout import RolloutOptions
from treetune.cli.options.run import RunOptions
from treetune.cli.options.trackers import TrackerOptions
from treetune.core.config.marks import (
    COMPLETIONS,
    FUNCTION_PATH,
    MACHINE,
    NAMED_VALUES,
    OBJECTIVE,
    ROW_FILES,
    ROWS_AND_ORDER,
    ROWS_READ,
    SAMPLED_FROM,
    STEP_ROWS,
    STEP_SIZE,
    Unused,
    Values,
    refused,
    unused_if,
    unused_unless,
)
from treetune.core.config.ranges import NOT_NEGATIVE, PART, POSITIVE, SMALL, TEMPERATURE, TOKENS, TOKENS_MAX, Range, whole
from treetune.core.config.table import group

RATES = (1e-5, 1e-6)
FEATURES = refused("decides what features are, and so what a reward is")
DEPTHS = PART._replace(words="depths from 0 to 1, such as 0.25 0.5 0.75")
WHITENED = unused_unless("use_whitening", reason="use_whitening is off")
ADAPTIVE = unused_unless("adaptive_max_tokens", reason="adaptive_max_tokens is off")
Estimator = Literal["rloo", "group_norm", "reinforce", "rloo_paired"]
ANCHORS = refused("decides where rollouts start and how long they are")


def only_in(mode: str, twin: str | None = None) -> Unused:
    """An option of one mode, with its twin in the other."""
    instead = f"; the option is --{twin.replace('_', '-')}" if twin else ""
    return unused_unless("mode", mode, reason=f"mode is {{mode}}{instead}")


def norm(values: Values) -> str:
    """How hidden states are scaled at each token."""
    return values["feature_norm"] or ("per_layer" if values["mode"] == "strided" else "raw")


def one_rollout(values: Values) -> str:
    """Why diversity is 0, where it is."""
    count = values["n_samples_per_prompt" if values["mode"] == "strided" else "num_generations"]
    return "there is one rollout, which has nothing to be like" if count == 1 else ""


@dataclass(frozen=True)
class EbftData(HeldOut, AnyRows):
    """Data. A config file may have `datasets`, a list of mappings with `path`, `type` and options, instead of `data`."""

    data: Annotated[tuple[str, ...], ROW_FILES, ROWS_READ, unused_if("datasets", reason="datasets is given")] = (SAMPLES["sft"],)
    format: Annotated[str, FUNCTION_PATH, ROWS_READ] = "auto"
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
    feature_layers: Annotated[tuple[float, ...], DEPTHS, FEATURES] = (0.25, 0.5, 0.75)
    """Depths of the hidden states that are compared, from 0 (embeddings) to 1 (after the last norm)."""
    embed_method: Annotated[Literal["last_token", "mean_pooling", "completion_mean", "concat"], FEATURES] = "last_token"
    """How the tokens of a text become one vector: the last; the mean; the mean of the completion (in strided mode there is no other part);
    those at a quarter, half and three quarters side by side."""
    feature_norm: Annotated[Literal["per_layer", "joint", "raw"] | None, FEATURES] = None
    """Length 1 at each token for each layer, for all together, or neither; if not given, per_layer in strided mode, and in structured mode
    raw (where pooled vectors get length 1 unless whitened)."""
    use_whitening: Annotated[bool, FEATURES] = False
    """Whiten the features of the rollouts of a prompt or anchor; diversity then only counts duplicates. The paper advises it."""
    whitening_space: Annotated[Literal["features", "rows"], FEATURES, WHITENED] = "features"
    """features: the truth is projected onto the span of the rollouts, alignment compares siblings; rows: alignment is absolute."""
    alignment_coef: Annotated[float, NOT_NEGATIVE, FEATURES] = 1.0
    """Weight of alignment, 2 cos(rollout, truth)."""
    diversity_coef: Annotated[float, NOT_NEGATIVE, FEATURES, Unused(one_rollout)] = 1.0
    """Weight of diversity, twice the mean product with the other rollouts, which is subtracted."""
    ce_coef: Annotated[float, NOT_NEGATIVE, OBJECTIVE] = 0.0
    """Weight of the cross-entropy of the true tokens; 0.03 is balanced, 0.1 dominates."""
    feature_device: Annotated[Literal["auto", "cpu"], MACHINE] = "auto"
    """Where the frozen network is: beside the model (free with an adapter, whose base it is), or a copy in main memory."""
    adaptive_max_tokens: Annotated[bool, COMPLETIONS, only_in("structured")] = True
    """Structured: sample at most gt_length_multiplier times the longest true reply of a batch (at least 64 tokens), and never more than
    max_completion_length."""
    gt_length_multiplier: Annotated[float, Range(0.1, 1e6), COMPLETIONS, only_in("structured"), ADAPTIVE] = 1.5
    """Structured: that factor; at least 0.1."""
    stride: Annotated[int, TOKENS, ANCHORS, only_in("strided")] = 8
    """Strided: tokens from one anchor to the next."""
    context_length: Annotated[int, TOKENS, ANCHORS, only_in("strided")] = 8
    """Strided: tokens before the first anchor; a rollout sees all of its document up to its anchor."""
    generate_max_len: Annotated[int, TOKENS, ANCHORS, only_in("strided", "max_completion_length")] = 8
    """Strided: tokens of a rollout, and of the true block that it is compared with."""
    n_samples_per_prompt: Annotated[int, SMALL, ANCHORS, only_in("strided", "num_generations")] = 4
    """Strided: rollouts from each anchor."""
    rl_coef: Annotated[float, NOT_NEGATIVE, OBJECTIVE, only_in("strided")] = 1.0
    """Strided: weight of the policy-gradient loss."""
    advantage_estimator: Annotated[Estimator, OBJECTIVE, only_in("strided", "advantage")] = "rloo"
    """Strided: reward less the mean of the other rollouts; less the mean and divided by the deviation; as it is; as rloo, with a baseline
    that leaves out the pairs that a rollout is part of."""
    min_completion_prefix: Annotated[int, whole(0, TOKENS_MAX), ANCHORS, only_in("strided")] = 0
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
    tracking: TrackerOptions = group(TrackerOptions)
    hub: HubOptions = group(HubOptions)
