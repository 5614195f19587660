"""The memory of a run by term, for its screen and for `treetune info`: from options to the sizes that `models.memory` counts with."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import torch

from treetune.cli.options import optim
from treetune.cli.options.commands import MemoryOptions
from treetune.cli.run import TrainRun
from treetune.core import shard, tree
from treetune.core.config import table
from treetune.core.state import TrainState
from treetune.models import MODELS, describe, loading, memory, quant_config, quantised
from treetune.models.memory import Setup, Table
from treetune.models.policy import Policy


def of_model(path: Path, options: MemoryOptions) -> dict[str, str]:
    """Rows for a run with these options on a model folder or a .gguf file. The device of the run need not be here."""
    device = torch.device("cuda") if options.device == "cuda" else loading.select_device(options.device)
    family, cfg = describe.read_sizes(path)
    cfg = dataclasses.replace(cfg, dtype=loading.compute_dtype(options.dtype, device))
    chosen = optim.OptimOptions(
        optimizer=options.optimizer,
        gradient_checkpointing=options.gradient_checkpointing,
        activation_offloading=options.activation_offloading,
        layer_offloading=options.layer_offloading,
    )
    prompt, completion, n = options.sequence_len, options.max_completion_length, options.num_generations or 0
    setup = Setup(
        _tokens(options.micro_batch_size, prompt, n, completion),
        rank=options.lora_r if options.adapter == "lora" else 0,
        scheme=quantised.of(options) or (quant_config.of_folder(path) if path.is_dir() else None),
        state_bytes=memory.state_bytes(optim.build(chosen)),
        remat=chosen.remat,
        device=device.type,
        master=loading.DTYPES[options.master_dtype].itemsize,
        rows=options.micro_batch_size * n,
        slots=prompt + completion,
        layers=chosen.layer_offloading,
        paged=options.optimizer.startswith("paged_"),
    )
    return memory.lines(memory.table(MODELS[family].abstract(cfg), cfg, setup), _about(options, setup, cfg.dtype))


def _about(options: MemoryOptions, setup: Setup, dtype: torch.dtype) -> str:
    """What a table is of: the options that count most, those that are not given included."""
    kept = "" if setup.scheme is None else f" on {setup.scheme.kind}"
    trained = f"lora r {setup.rank}{kept}" if setup.rank else "the whole model"
    samples = f", {options.num_generations} completions each" if options.num_generations else ""
    size = f"{options.micro_batch_size} x {options.sequence_len} tokens{samples}"
    remat = f"gradient checkpointing {options.gradient_checkpointing}"
    return f"{setup.device}, {str(dtype).removeprefix('torch.')}, {size}, {trained}, {options.optimizer}, {remat}"


def _tokens(documents: int, prompt: int, completions: int, longest: int) -> int:
    """Tokens of a micro-batch: completions share their prompt."""
    return documents * (prompt + completions * longest)


def of_run(run: TrainRun, start: Policy, state: TrainState) -> str:
    """A line for a run that is about to start, from the very trees that it holds; empty where its micro-batches have no known size."""
    tokens, rows, slots = sizes(table.flatten(run.config))
    if not tokens:
        return ""
    count = partial(memory.size, device=run.device.type)
    trained = sum(shard.local(leaf).numel() for leaf in tree.leaves(state.params))
    whole = {name: part for name, part in state.params.items() if name != "lora"}
    here, away = memory.frozen(state.frozen, run.device)
    held = Table(here + count(whole), adapter=count(state.params.get("lora", {})), away=away)
    setup = Setup(
        tokens,
        rank=0 if start.adapter is None else start.adapter.rank,
        scheme=quantised.of(run.config.model),
        state_bytes=count(state.opt) / trained,
        remat=run.config.optim.remat,
        master=loading.DTYPES[run.config.optim.master_dtype].itemsize,
        device=run.device.type,
        rows=rows,
        slots=slots,
        nucleus=table.flatten(run.config).get("top_p", 1.0) < 1,
        layers=run.config.optim.layer_offloading,
    )
    abstract = MODELS[start.family].abstract(start.cfg)
    return memory.line(memory.training(held, trained, abstract, start.cfg, setup))


def sizes(values: dict[str, Any]) -> tuple[int, int, int]:
    """Tokens of a micro-batch, and rows and slots of the sampler's cache, 0 where they are not known or nothing is sampled here."""
    documents, prompt = values["micro_batch_size"], values.get("max_prompt_len") or values.get("sequence_len") or 0
    n, longest = values.get("num_generations") or 0, values.get("max_completion_length") or 0
    if not (prompt and n and longest):
        return documents * prompt, 0, 0
    rows = 0 if values.get("use_vllm") else documents * values["gradient_accumulation_steps"] * n
    return _tokens(documents, prompt, n, longest), rows, prompt + longest
