"""Groups of options that commands share: typed, frozen, with their defaults and help. Importing this imports no torch.

Field names are the YAML keys; flags are the same with dashes. Text under a field is its help.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from tyro.conf import Fixed, Suppress

from treetune.cli import samples


@dataclass(frozen=True)
class ModelName:
    """Model."""

    model: str = "smollm2-135m-instruct"
    """Folder, .gguf file, known name or Hugging Face id of the model to start from."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face id."""


@dataclass(frozen=True)
class ModelOptions(ModelName):
    """Model."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the model computes in; auto is bfloat16 on CUDA and float32 on CPU. Trained weights are kept in float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes CUDA when there is one."""


# A list of mappings: written in a config file, never as flags.
Listed = Annotated[tuple[dict[str, Any], ...], Suppress, Fixed]


SAMPLES = {
    "sft": samples.path("gsm8k_train_sample.jsonl"),
    "dpo": samples.path("gsm8k_preference_sample.jsonl"),
    "kto": samples.path("gsm8k_binary_sample.jsonl"),
    "reward": samples.path("gsm8k_preference_sample.jsonl"),
    "prm": samples.path("gsm8k_steps_sample.jsonl"),
}


@dataclass(frozen=True)
class AnyRows:
    """What rows of every kind take."""

    datasets: Listed = ()
    """Data sets with options of their own."""
    data: tuple[str, ...] = (SAMPLES["sft"],)
    """Files (.jsonl, .json, .parquet, .csv) or Hugging Face data set ids."""
    format: str = "auto"
    """Row format: chat, alpaca, completion, input_output, pretokenised, jeopardy, ...; auto goes by the columns and prints it."""
    split: str = "train"
    """Split of a Hugging Face data set."""
    max_rows: int | None = None
    """Use only the first rows of each data set."""
    sequence_len: int = 512
    """Longest document in tokens; with packing, a micro-batch holds up to micro_batch_size * sequence_len tokens."""
    overlong: Literal["drop", "truncate", "error"] = "drop"
    """What to do with a row longer than sequence_len."""
    sample_packing: bool = True
    """Fill each micro-batch with whole documents; off: micro_batch_size documents each."""
    chat_template: str | None = None
    """Instead of the tokenizer's own: a built-in name (chatml, llama3, qwen3, ...), tokenizer_default_fallback_NAME, or Jinja."""
    dataset_exact_deduplication: bool = False
    """Leave out rows that repeat an earlier row, and held-out rows that are trained on; counted."""
    dataset_prepared_path: str | None = None
    """Folder to keep encoded rows in; a later run with the same data, tokenizer, template and options reads them from there."""


@dataclass(frozen=True)
class RowOptions(AnyRows):
    """Data. A config file may have `datasets`, a list of mappings with `path`, `type` and the options of that format, instead of `data`."""

    overlong: Literal["drop", "truncate", "split", "error"] = "drop"
    """What to do with a row longer than sequence_len. Raw text is always split."""
    default_system_message: str | None = None
    """System message of the chats that have none."""
    roles_to_train: tuple[str, ...] = ("assistant",)
    """Roles whose turns are supervised."""
    train_on_eos: Literal["turn", "all", "last"] = "turn"
    """Which end-of-turn tokens are supervised: of trained turns, of all turns, or of the last turn only."""
    train_on_inputs: bool = False
    """Supervise every token, prompts included."""


@dataclass(frozen=True)
class HeldOut:
    """What is held out of the rows, and their order."""

    test_datasets: Listed = ()
    """Data sets to evaluate on, with options of their own."""
    val_data: tuple[str, ...] = ()
    """Files or data sets to evaluate on, instead of a part of the training rows."""
    val_set_size: float = 0.1
    """Part of the rows (below 1) or number of rows (1 and up) held out for evaluation; 0 for none."""
    shuffle: bool = True
    """Shuffle the rows anew every epoch."""


@dataclass(frozen=True)
class DataOptions(HeldOut, RowOptions):
    """Data. A config file may have `datasets` (and `test_datasets` to evaluate on), lists of mappings with `path`, `type` and options."""


@dataclass(frozen=True)
class PairData(HeldOut, AnyRows):
    """Data. A config file may have `datasets` (and `test_datasets` to evaluate on), lists of mappings with `path`, `type` and options."""

    data: tuple[str, ...] = (SAMPLES["dpo"],)
    format: str = "auto"
    """Row format: passthrough, chat_template.default, chatml.intel, llama3.ultra, ...; auto goes by the columns and prints it."""
    sequence_len: int = 512
    """Longest prompt with one completion, in tokens; with packing, a micro-batch holds up to micro_batch_size * sequence_len tokens."""


@dataclass(frozen=True)
class TokenOptions:
    """Vocabulary."""

    special_tokens: tuple[str, ...] = ()
    """NAME=TEXT pairs that set bos_token, eos_token, unk_token, pad_token and so on; in a file also a mapping."""
    tokens: tuple[str, ...] = ()
    """Texts to add as tokens. New tokens get rows that train: with an adapter, embed_tokens (and lm_head) train whole beside it."""


@dataclass(frozen=True)
class VocabularyOptions(TokenOptions):
    """Vocabulary."""

    embedding_multiple: int | None = None
    """Grow the embeddings to a multiple of this many rows; 32 or 64 suit tensor cores."""


@dataclass(frozen=True)
class AdapterOptions:
    """Adapter."""

    adapter: Literal["lora", "none"] = "lora"
    """lora trains a small second tree beside the frozen model; none trains the model itself."""
    lora_r: int = 16
    """Rank."""
    lora_alpha: float = 32.0
    """Scale numerator: updates are multiplied by lora_alpha / lora_r."""
    lora_rslora: bool = False
    """Multiply by lora_alpha / sqrt(lora_r) instead."""
    lora_dropout: float = 0.0
    """Dropout on the adapter's input; a function of seed, step and row, so packing does not change it."""
    lora_target_modules: tuple[str, ...] = ("all-linear",)
    """Which weights to adapt: all-linear, or regular expressions over paths such as layers.0.q_proj."""
    lora_layers: tuple[int, ...] = ()
    """Adapt only these layers; empty for all."""
    lora_modules_to_save: tuple[str, ...] = ()
    """Whole weights to train and save beside the adapter, by regular expression: embed_tokens, lm_head."""
    lora_model_dir: str | None = None
    """Start from this adapter (a folder in PEFT format) instead of a fresh one."""
    loraplus_lr_ratio: float | None = None
    """LoRA+: learning rate of B over that of A; 16 is the authors' advice."""


@dataclass(frozen=True)
class LossOptions:
    """Loss."""

    loss: Literal["nll", "dft", "eaft"] = "nll"
    """Token loss: likelihood; dft weighs tokens by their own probability; eaft by the entropy of the top 20."""
    label_smoothing: float = 0.0
    """Share of the target spread evenly over the vocabulary (nll only)."""
    z_loss_coef: float = 0.0
    """Weight of the squared log-normaliser; 1e-4 is usual."""
    neftune_noise_alpha: float = 0.0
    """Noise on the embeddings while training; 5 is usual, 0 is off."""


@dataclass(frozen=True)
class OptimOptions:
    """Optimisation."""

    optimizer: Literal["adamw", "lion", "sgd"] = "adamw"
    """Update rule; all work in place."""
    learning_rate: float | None = None
    """Peak learning rate; if not given, 2e-4 with an adapter and 2e-5 without."""
    lr_scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    cosine_min_lr_ratio: float = 0.0
    """Where the cosine ends, as a part of the peak."""
    warmup_steps: int | None = None
    """Steps of linear warm-up."""
    warmup_ratio: float | None = None
    """Warm-up as a part of all steps, instead of warmup_steps; neither: 0.03."""
    weight_decay: float = 0.0
    """Decoupled decay of matrices; vectors (norms, biases) do not decay."""
    weight_decay_rules: tuple[str, ...] = ()
    """REGEX=VALUE over paths, first match wins: decay of the leaves that match."""
    lr_rules: tuple[str, ...] = ()
    """REGEX=FACTOR over paths, first match wins: multiplies the learning rate of the leaves that match."""
    adam_beta1: float = 0.9
    """First moment's decay (adamw, lion)."""
    adam_beta2: float | None = None
    """Second moment's decay (adamw, lion); if not given, 0.999 for adamw and 0.99 for lion."""
    adam_epsilon: float = 1e-8
    """Added to the root of the second moment (adamw)."""
    momentum: float = 0.0
    """Heavy-ball momentum (sgd)."""
    max_grad_norm: float = 1.0
    """Gradients longer than this are scaled down to it; 0 turns clipping off."""
    num_epochs: int = 1
    """Passes over the training rows, unless max_steps is given."""
    max_steps: int | None = None
    """Optimiser steps of the run, whatever num_epochs says."""
    micro_batch_size: int = 2
    """Documents (or, packed, sequence_len's worth of tokens) in one forward pass on one device."""
    gradient_accumulation_steps: int = 2
    """Micro-batches in one optimiser step on one device; the split never changes the gradient."""
    gradient_checkpointing: bool = False
    """Recompute each layer in the backward pass: about 1.4 times the time for about half the memory."""
    seed: int = 42
    """The only source of randomness."""


@dataclass(frozen=True)
class RunOptions:
    """Run."""

    output_dir: str | None = None
    """Run folder; if not given, the first free runs/COMMAND-NNN."""
    resume: str | None = None
    """auto: the newest checkpoint of output_dir (or of the newest run); or a checkpoint folder."""
    overwrite: bool = False
    """Start anew in an output_dir that holds a run and nothing else; the old run is deleted after the first step of the new one."""
    eval_steps: int | None = None
    """Evaluate every so many steps, besides before and after; if not given, at the ends of epochs, up to 10 of them."""
    save_steps: int | None = None
    """Save a checkpoint every so many steps, besides at the end; if not given, at the ends of epochs, up to 10 of them."""
    save_total_limit: int = 2
    """Newest checkpoints to keep; the best one by eval loss is kept besides."""
    logging_steps: int = 1
    """Steps between lines on a plain screen; metrics.jsonl has every step."""
    early_stopping_patience: int | None = None
    """Stop after this many evaluations in a row without a new best loss."""
    loss_watchdog_threshold: float | None = None
    """Stop when train/loss stays above this for loss_watchdog_patience steps."""
    loss_watchdog_patience: int = 3
    """Steps above the threshold before the watchdog stops the run."""
    sharding: Literal["none", "full"] = "none"
    """Under torchrun: none keeps whole weights on every rank, full shards weights, gradients and moments."""
    sample_prompt: str | None = None
    """Prompt answered before and after training; if not given, the first held-out chat row. Empty: none."""
    sample_tokens: int = 160
    """Longest sample answer."""


@dataclass(frozen=True)
class PretrainModel(ModelOptions):
    """Model."""

    from_config: str | None = None
    """A config.json (or a folder with one): start from random weights of that shape. The tokenizer comes from model."""


@dataclass(frozen=True)
class PretrainData:
    """Data."""

    data: tuple[str, ...] = (samples.path("text.jsonl"),)
    """Files (.jsonl, .json, .parquet, .csv) or Hugging Face data set ids with a text column."""
    split: str = "train"
    """Split of a Hugging Face data set."""
    text_column: str = "text"
    """Column that holds the text."""
    val_data: tuple[str, ...] = ()
    """Files or data sets to evaluate on, instead of a part of the training rows."""
    val_set_size: float = 0.1
    """Part of the rows (below 1) or number of rows (1 and up) held out for evaluation; 0 for none. Streaming, only a number of rows, the
    first of each data set; without one nothing is held out."""
    max_rows: int | None = None
    """Use only the first rows of each data set."""
    streaming: bool = False
    """Read rows as they are needed, for corpora that do not fit in memory; needs max_steps."""
    streaming_multipack_buffer_size: int = 10_000
    """Streaming: rows that are held at a time, and shuffled and packed together."""
    sequence_len: int = 512
    """Texts longer than this many tokens are split; a micro-batch holds micro_batch_size * sequence_len tokens."""
    sample_packing: bool = True
    """Fill each micro-batch with whole documents; off: micro_batch_size documents each."""
    shuffle: bool = True
    """Shuffle the rows anew every epoch."""


@dataclass(frozen=True)
class AdapterPath:
    """Adapter."""

    adapter: str | None = None
    """Adapter folder in PEFT format, or a run folder with one; its own base model is used unless --model names another."""


@dataclass(frozen=True)
class SampleOptions:
    """Sampling."""

    max_new_tokens: int = 200
    """Longest answer in tokens."""
    temperature: float = 0.7
    """0 takes the likeliest token every time."""
    top_p: float = 0.95
    """Sample among the likeliest tokens that together have this probability."""
    top_k: int = 0
    """Sample among this many likeliest tokens; 0 for all."""
    min_p: float = 0.0
    """Leave out tokens with less than this part of the likeliest one's probability."""
    seed: int = 0
    """Same seed, same answer."""
