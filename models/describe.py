"""A model or an adapter in a few lines: sizes, parameters, targets."""

from pathlib import Path
from typing import Any

from treetune.core import lora, module_names, param, tree
from treetune.models import MODELS, adapter_config, adapter_parameters, bridge, gguf, hf, quant_config
from treetune.models.dense import Config
from treetune.models.policy import Policy, weights


def describe_model(path: Path) -> dict[str, str]:
    """Lines by name for a model folder or a .gguf file: family, sizes, parameters, and what LoRA of rank 16 would add."""
    family, cfg = read_sizes(path)
    stored = None if path.suffix == ".gguf" else quant_config.of_folder(path)
    sizes = MODELS[family].abstract(cfg)
    linears, count = lora.linears(sizes), param.count(sizes)
    low_rank = param.count(lora.abstract(sizes, linears, rank=16))
    windows = " or ".join(str(window or "none") for window in cfg.windows)
    return {
        "model": str(path),
        "family": f"{family}, {cfg.num_layers} layers, hidden {cfg.hidden_size}, mlp {cfg.mlp_size}",
        "computed by": _computed_by(cfg),
        "attention": f"{cfg.num_heads} query and {cfg.num_kv_heads} key heads of {cfg.head_dim}, window {windows}",
        "vocabulary": f"{cfg.vocab_size}, embeddings {'tied' if cfg.tied else 'not tied'}, {cfg.max_positions} positions",
        "parameters": f"{count / 1e6:.1f} M: {count * 4 / 2**30:.2f} GiB in float32, {count * 2 / 2**30:.2f} GiB in bfloat16",
        **({} if stored is None else {"weights": f"quantised in the files: {quant_config.named(stored)}"}),
        "lora r 16": f"{low_rank / 1e6:.2f} M on all linear layers ({100 * low_rank / count:.2f} %)",
        "lora targets": _targets(family, sizes, linears),
        "full training": f"{count * 16 / 2**30:.1f} GiB for float32 weights, gradients and two moments, before activations",
    }


def _targets(family: str, sizes: Any, linears: list[str]) -> str:
    """Modules that an adapter sits on by default, and those that it may sit on besides."""
    default, others = (
        ", ".join(module_names.shorten(adapter_parameters.target(family, path) for path in paths))
        for paths in (linears, [path for path in lora.adaptable(sizes) if path not in linears])
    )
    return f"{default}{f'; if named also {others}' * bool(others)}"


def read_sizes(path: Path) -> tuple[str, Config]:
    """The family and the sizes of a model folder or a .gguf file."""
    if path.suffix != ".gguf":
        return hf.read_config(path / "config.json")
    model = gguf.load(path)
    return model.family, model.cfg


def _computed_by(cfg: Config) -> str:
    """Whose code computes a model, and whether documents are packed."""
    if not isinstance(cfg, bridge.Config):
        return "a native family, packed documents"
    alone = f"one document at a time: {cfg.alone}" if cfg.alone else "packed documents"
    return f"transformers' modules, {alone}"


def describe_adapter(path: Path) -> dict[str, str]:
    """Lines by name for an adapter folder: rank, scale, base model and targets."""
    config = adapter_config.read(path)
    names = (config.targets,) if isinstance(config.targets, str) else config.targets
    targets = sorted({name.rpartition(".")[2] for name in names})
    return {
        "adapter": str(path),
        "base": config.base or "not named",
        "rank": f"{config.rank}, alpha {config.alpha:g}{', rank-stabilised' * config.rslora}",
        "targets": config.targets if isinstance(config.targets, str) else f"{len(names)} modules: {', '.join(targets)}",
        "trained whole": ", ".join(config.saved) or "none",
    }


def describe_policy(policy: Policy, name: str) -> dict[str, str]:
    """Lines by name for a policy from the model of this name: its size, and what of it trains."""
    trained, total = param.count(policy.params), param.count(weights(policy.params, policy.frozen))
    leaves = len(tree.leaves(policy.params))
    alone = f"one document at a time, prompts copied instead of shared: {policy.cfg.alone}" if policy.cfg.alone else ""
    return {
        "model": f"{name}: {policy.family}, {total / 1e6:.1f} M parameters, computes in {str(policy.cfg.dtype)[6:]}",
        "trains": f"{trained / 1e6:.2f} M parameters in {leaves} leaves ({100 * trained / total:.2f} %)",
    } | ({"passes": alone} if alone else {})
