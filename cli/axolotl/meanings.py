"""What axolotl means where a key is absent or counts something else: options of ours, each with the reason that a run prints. No torch."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from treetune.cli.axolotl import precision
from treetune.cli.axolotl.file import File, Values, write

PREFERENCES = ("simpo", "cpo")
SAMPLED = ("grpo", "ebft")


class Meaning(NamedTuple):
    """An option, its value, and why the file means it."""

    option: str
    value: Any
    reason: str


def absent(file: File) -> Iterator[Meaning]:
    """What the file means by leaving keys out, as far as the command has such options and defaults of ours differ."""
    parts = (_adapter, _rows, _sampled, _simple_preferences)
    yield from (meaning for part in parts for meaning in part(file) if meaning.option in file.options)


def _adapter(file: File) -> Iterator[Meaning]:
    if file.value("adapter") is None:
        yield Meaning("adapter", "none", "no adapter: all weights train")
    elif "lora_r" in file.options and file.value("lora_r") is None and file.value("lora_model_dir") is None:
        r, alpha = file.options["lora_r"].default, file.options["lora_alpha"].default
        yield Meaning("lora_r", r, f"no lora_r: {r}, the default here, and lora_alpha {file.value('lora_alpha', alpha)}")
    if file.value("quantize_moe_experts") is None and precision.frozen(file) is not None:
        yield Meaning("quantize_moe_experts", False, "no quantize_moe_experts: stacks of experts stay as they are")


def _rows(file: File) -> Iterator[Meaning]:
    if file.value("sample_packing") is None and file.command not in SAMPLED:
        yield Meaning("sample_packing", False, "no sample_packing: micro_batch_size rows in a forward pass, each as long as it is")
    if file.value("val_set_size") is None:
        yield Meaning("val_set_size", 0.0, "no val_set_size: nothing is split off")
    for key in ("micro_batch_size", "gradient_accumulation_steps"):
        if file.value(key) is None:
            yield Meaning(key, 1, f"no {key}: 1")


def _sampled(file: File) -> Iterator[Meaning]:
    if file.command not in SAMPLED:
        return
    if file.value("lr_scheduler") is None:
        yield Meaning("lr_scheduler", "cosine", "no lr_scheduler: cosine")
    if file.value("log_completions") is None:
        yield Meaning("log_completions", False, "no log_completions: completions are not written down")
    for key, own in (("ref_model_mixup_alpha", 0.9), ("ref_model_sync_steps", 64)):
        if file.value("sync_ref_model") and file.value(key) is None:
            yield Meaning(key, own, f"no {key}: {own}")
    if file.command == "grpo" and file.value("epsilon_high") is None:
        yield Meaning("epsilon_high", file.value("epsilon", 0.2), "no epsilon_high: as epsilon")
    if file.command == "ebft" and file.value("mode") is None and any("strided" in kind or "pretrain" in kind for kind in _types(file)):
        yield Meaning("mode", "strided", "no mode, but rows of strided EBFT: strided")
    elif file.command == "ebft" and structured(file) and file.value("temperature") is None:
        yield Meaning("temperature", 0.7, "no temperature: 0.7")


def _types(file: File) -> list[str]:
    listed = file.value("datasets", [])
    return [str(entry.get("type")) for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []


def structured(file: File) -> bool:
    """Whether EBFT samples answers to prompts."""
    return file.value("mode", "structured") == "structured"


def _simple_preferences(file: File) -> Iterator[Meaning]:
    if file.command not in PREFERENCES:
        return
    if file.value("rl_beta") is None:
        yield Meaning("rl_beta", 0.1, "no rl_beta: 0.1")
    if file.value("cpo_alpha") is None:
        yield Meaning("cpo_alpha", 1.0, "no cpo_alpha: 1")


def _generations(file: File) -> int | None:
    return file.options["num_generations"].default if "num_generations" in file.options else None


def counted(file: File) -> Iterator[Meaning]:
    """What counts something else: completions in a micro-batch of a method that samples, which are prompts here."""
    sizes = [file.value(key, default) for key, default in (
        ("num_generations", _generations(file)), ("micro_batch_size", 1), ("gradient_accumulation_steps", 1))]  # fmt: skip
    sampled = file.command == "grpo" or file.command == "ebft" and structured(file)
    if sampled and all(isinstance(size, int) and size > 0 for size in sizes):
        each, rows, splits = sizes
        prompts = max(1, -(-rows * splits // each))
        held = next(count for count in range(max(1, rows // each), 0, -1) if prompts % count == 0)
        reason = f"micro_batch_size counts completions: {rows} x {splits} a step, {each} for each prompt, so prompts a step: {prompts}"
        yield Meaning("micro_batch_size", held, reason + ", rounded up" * (rows * splits % each > 0))
        yield Meaning("gradient_accumulation_steps", prompts // held, "")
    if file.command in SAMPLED and file.value("sequence_len") is not None and "max_prompt_len" in file.options:
        yield Meaning("max_prompt_len", file.value("sequence_len"), "sequence_len bounds prompts: max_prompt_len")


def values_of(meanings: Iterator[Meaning]) -> tuple[Values, list[str]]:
    """The options, and the lines to print."""
    listed = list(meanings)
    return {one.option: write(one.value) for one in listed}, [one.reason for one in listed if one.reason]
