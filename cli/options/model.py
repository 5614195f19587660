"""Options of the model, its vocabulary and its adapter. Importing this imports no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from treetune.core import option_pairs, registry
from treetune.core.config import marks
from treetune.core.config.doors import unused_unless_taken
from treetune.core.config.ranges import BELOW_ONE, COUNT_OR_NONE, PART, POSITIVE, ROWS_MAX, SMALL, whole

LORA = marks.unused_if("adapter", "none", reason="adapter is none")
SCALED = unused_unless_taken("optimizer", registry.OPTIMIZERS, "lr_scale")
MERGED = marks.refused("decides when the adapter is merged into the weights that the checkpoint holds")
RESTARTED = marks.unused_unless("relora_steps", reason="relora_steps is not given")
BROUGHT = marks.unused_if("lora_model_dir", reason="lora_model_dir brings its own")
ROWS = marks.unused_unless("lora_init", "qera", "corda", "corda_ipm", reason="lora_init is {lora_init}")
MOST = 65536  # of a rank or an alpha


def _local(values: marks.Values) -> str:
    local = values["model"] is not None and Path(values["model"]).expanduser().exists()
    return f"{values['model']} is on this machine" if local else ""


def _nothing_frozen(values: marks.Values) -> str:
    if values["quant"] in ("auto", "none"):
        return ""
    if values.get("from_config"):
        return "from_config starts from random weights"
    whole = values.get("adapter") == "none" and not values.get("unfrozen_parameters")
    return "adapter is none, and weights that train are not quantised" if whole else ""


LOCAL = marks.Unused(_local)
QUANTISED = marks.refused("the frozen weights are other numbers when they are quantised otherwise")
START = marks.refused("decides where the adapter starts, and what it is added to")
QUANT = marks.unused_if("quant", "auto", "none", reason="quant is {quant}")
FP8 = marks.unused_unless("quant", "fp8", reason="quant is {quant}")
FOUR_BITS = marks.unused_unless("quant", "nf4", "fp4", reason="quant is {quant}")


@dataclass(frozen=True)
class ModelName:
    """Model."""

    model: Annotated[str, marks.MODEL, marks.MODEL_WEIGHTS] = "smollm2-135m-instruct"
    """Folder, .gguf file, known name or Hugging Face id of the model to start from."""
    revision: Annotated[str | None, marks.MODEL_WEIGHTS, LOCAL] = None
    """Branch, tag or commit of a Hugging Face id."""


@dataclass(frozen=True)
class ModelOptions(ModelName):
    """Model."""

    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], marks.refused("the model computes other numbers in another dtype")
    ] = "auto"
    """Compute dtype; auto is bfloat16 on CUDA and float32 on CPU. Weights that train have master_dtype. float16 has loss scaling."""
    device: Annotated[Literal["auto", "cpu", "cuda"], marks.MACHINE] = "auto"
    """Device; auto takes CUDA when there is one."""
    quant: Annotated[Literal["auto", "none", "nf4", "fp4", "int4", "int8", "fp8"], QUANTISED, marks.Unused(_nothing_frozen)] = "auto"
    """Keep frozen linear layers in 4 bits (nf4, fp4, int4) or 8 (int8, fp8); auto does as the adapter was trained, and none without one."""
    quant_double: Annotated[bool, QUANTISED, FOUR_BITS] = True
    """Keep the maxima of 4-bit blocks in 8 bits, too: 0.4 bits less for each weight."""
    quantize_moe_experts: Annotated[bool, QUANTISED, QUANT] = True
    """Quantise stacks of experts, too."""


@dataclass(frozen=True)
class TokenOptions:
    """Vocabulary."""

    tokenizer_config: Annotated[str | None, marks.MODEL, marks.TOKEN_IDS, BROUGHT] = None
    """Folder, .gguf file or Hugging Face id of another tokenizer than the model's; what trained is saved with it."""
    special_tokens: Annotated[tuple[str, ...], marks.NAMED_TEXTS, marks.TOKEN_IDS] = ()
    """NAME=TEXT pairs that set bos_token, eos_token, unk_token, pad_token and so on; in a file also a mapping."""
    tokens: Annotated[tuple[str, ...], marks.TOKEN_IDS] = ()
    """Texts to add as tokens. New tokens get rows that train: with an adapter, embed_tokens (and lm_head) train whole beside it."""


@dataclass(frozen=True)
class VocabularyOptions(TokenOptions):
    """Vocabulary."""

    embedding_multiple: Annotated[int | None, SMALL, marks.TOKEN_IDS] = None
    """Grow the embeddings to a multiple of this many rows; 32 or 64 suit tensor cores."""


@dataclass(frozen=True)
class AdapterOptions:
    """Adapter."""

    adapter: Annotated[Literal["lora", "qlora", "none"], marks.TRAINED] = "lora"
    """lora trains low-rank matrices beside the frozen model; qlora is lora with --quant nf4; none trains the model itself."""
    lora_r: Annotated[int, SMALL, marks.ADAPTER_SCALE, LORA, BROUGHT] = 16
    """Rank."""
    lora_alpha: Annotated[float, POSITIVE, marks.ADAPTER_SCALE, LORA, BROUGHT] = 32.0
    """Scale numerator: updates are multiplied by lora_alpha / lora_r."""
    lora_rslora: Annotated[bool, marks.ADAPTER_SCALE, LORA, BROUGHT] = False
    """Multiply by lora_alpha / sqrt(lora_r) instead."""
    lora_dora: Annotated[bool, marks.TRAINED, LORA, BROUGHT] = False
    """DoRA: train the length of each row of the adapted weights, too."""
    lora_init: Annotated[
        Literal[
            "default", "gaussian", "orthogonal", "pissa", "pissa_niter_4", "pissa_niter_16", "olora", "loftq", "qera", "corda", "corda_ipm"
        ],
        START,
        LORA,
        BROUGHT,
    ] = "default"
    """Start of A, B: the largest part (pissa, olora), what quant loses (loftq; qera: on rows), what rows use least (corda; ipm: most)."""
    lora_init_rows: Annotated[int, whole(1, ROWS_MAX), START, LORA, BROUGHT, ROWS] = 256
    """Training rows, evenly spaced, that qera, corda and corda_ipm measure the inputs of weights on."""
    lora_rank_pattern: Annotated[tuple[str, ...], marks.REGEX_NUMBERS, marks.TRAINED, LORA, BROUGHT] = ()
    """TARGET=RANK pairs, first match wins: another rank for some of the targets."""
    lora_alpha_pattern: Annotated[tuple[str, ...], marks.REGEX_NUMBERS, marks.ADAPTER_SCALE, LORA, BROUGHT] = ()
    """TARGET=ALPHA pairs, first match wins: another lora_alpha for some of the targets."""
    lora_dropout: Annotated[float, BELOW_ONE, marks.listed("is noise on the steps to come"), LORA] = 0.0
    """Dropout on the adapter's input; a function of seed, step and row, so packing does not change it."""
    lora_target_modules: Annotated[tuple[str, ...], marks.TRAINED, LORA, BROUGHT] = ("all-linear",)
    """Which weights to adapt: all-linear, names of modules as in PEFT (self_attn.q_proj), paths (layers.0.q_proj), or regexes."""
    lora_layers: Annotated[tuple[int, ...], whole(0, 65535), marks.TRAINED, LORA, BROUGHT] = ()
    """Adapt only these layers; empty for all."""
    lora_modules_to_save: Annotated[tuple[str, ...], marks.TRAINED, LORA] = ()
    """Whole weights to train and save beside the adapter, by name or regular expression: embed_tokens, lm_head, model.norm."""
    lora_bias: Annotated[Literal["none", "all", "lora_only"], marks.TRAINED, LORA, BROUGHT] = "none"
    """Biases that train beside the adapter, as PEFT has them: all of the model, or lora_only, those of the adapted modules."""
    unfrozen_parameters: Annotated[tuple[str, ...], marks.TRAINED] = ()
    """Regexes over paths or keys of transformers: weights that train whole. With adapter none all others are frozen."""
    fp8_products: Annotated[bool, QUANTISED, FP8] = False
    """Multiply linear layers of --quant fp8 in float8, activations rounded row by row: faster from compute capability 8.9 on."""
    lora_model_dir: Annotated[str | None, marks.ADAPTER, marks.ADAPTER_WEIGHTS, LORA] = None
    """Start from this adapter (a folder in PEFT format) instead of a fresh one."""
    loraplus_lr_ratio: Annotated[float | None, POSITIVE, marks.STEP_SIZE, LORA, SCALED] = None
    """LoRA+: learning rate of B over that of A; 16 is the authors' advice."""
    relora_steps: Annotated[int | None, whole(2, ROWS_MAX), MERGED, LORA] = None
    """ReLoRA: after every so many steps merge the adapter into the model and start it anew. What is saved is the merged model."""
    relora_warmup_steps: Annotated[int | None, COUNT_OR_NONE, marks.STEP_SIZE, RESTARTED] = None
    """Steps in which the learning rate rises again after a restart; a tenth of relora_steps if not given."""
    relora_anneal_steps: Annotated[int, COUNT_OR_NONE, marks.STEP_SIZE, RESTARTED] = 0
    """Steps in which the learning rate falls before a restart."""
    relora_prune_ratio: Annotated[float, PART, marks.listed("sets what later restarts forget of the moments"), RESTARTED] = 1.0
    """Part of the optimiser's moments of the adapter that a restart sets to 0, the smallest numbers; 1 starts the optimiser anew."""


@dataclass(frozen=True)
class AdapterPath:
    """Adapter."""

    adapter: Annotated[str | None, marks.ADAPTER] = None
    """Adapter folder in PEFT format, or a run folder with one; its own base model is used unless --model names another."""


def conflicts(adapter: AdapterOptions, model: ModelOptions) -> None:
    """Raise ValueError for options of an adapter that contradict each other."""
    _restart_conflicts(adapter, model)
    if adapter.adapter == "none" or adapter.lora_model_dir is not None:
        return
    if adapter.fp8_products and adapter.lora_dora:
        raise ValueError("lora_dora needs the numbers of weights, and fp8_products multiplies their codes: leave one out")
    for option, least in (("lora_rank_pattern", 1), ("lora_alpha_pattern", 1e-9)):
        for text, value in zip(
            getattr(adapter, option), option_pairs.rules(getattr(adapter, option), option.replace("_", "-")), strict=True
        ):
            if not least <= value[1] <= MOST or (least == 1 and value[1] != int(value[1])):
                raise ValueError(
                    f"{option} needs {'whole numbers from 1' if least == 1 else 'numbers above 0'}, at most {MOST}, got {text!r}"
                )
    if adapter.lora_init in ("loftq", "qera") and model.quant in ("auto", "none"):
        raise ValueError(
            f"lora_init {adapter.lora_init} starts from what quantising loses, and the model is not quantised: give quant, such as nf4"
        )
    if adapter.lora_init.startswith(("pissa", "olora", "corda")) and adapter.lora_dropout:
        raise ValueError(f"lora_init {adapter.lora_init} needs lora_dropout 0: dropout would drop parts of the weight itself")


def _restart_conflicts(adapter: AdapterOptions, model: ModelOptions) -> None:
    if adapter.relora_steps is None:
        return
    if model.quant not in ("auto", "none"):
        raise ValueError(
            f"relora_steps merges the adapter into the weights, and most updates are smaller than a step between codes of {model.quant}: "
            "leave quant out"
        )
    if adapter.lora_init not in ("default", "gaussian", "orthogonal"):
        raise ValueError(f"relora_steps starts pairs that are 0 together, and lora_init {adapter.lora_init} does not: leave it out")
    if (adapter.relora_warmup_steps or 0) + adapter.relora_anneal_steps > adapter.relora_steps:
        raise ValueError(
            f"relora_warmup_steps and relora_anneal_steps are longer than the {adapter.relora_steps} steps from one restart to the next"
        )
