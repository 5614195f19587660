"""From options to what `models` loads by plain values, and to an optimiser."""

from collections.abc import Callable
from typing import Any

import torch

from treetune.cli.options.model import AdapterOptions, ModelName, ModelOptions, TokenOptions, VocabularyOptions
from treetune.cli.options.optim import OptimOptions
from treetune.core import optim, option_pairs, registry
from treetune.models import Model, loading
from treetune.models import tokenizer as tokenizers
from treetune.models.loading import compute_dtype as compute_dtype
from treetune.models.loading import select_device as device  # noqa: F401
from treetune.models.policy import AdapterSpec
from treetune.models.tokenizer import TokenizerSetup
from treetune.models.tokenizer import adapter_folder as adapter_folder
from treetune.models.tokenizer import describe_resize as describe_rows  # noqa: F401

Say = Callable[[str], None]


def adapter_spec(options: AdapterOptions) -> AdapterSpec:
    """The adapter that the options describe."""
    return AdapterSpec(
        rank=options.lora_r,
        alpha=options.lora_alpha,
        rslora=options.lora_rslora,
        dropout=options.lora_dropout,
        targets=options.lora_target_modules,
        layers=options.lora_layers,
        modules_to_save=options.lora_modules_to_save,
        start=options.lora_model_dir,
    )


def load_model(options: ModelOptions, *, on: torch.device, say: Say = print) -> tuple[Model, str]:
    """The model that the options name, in its compute dtype, and the path it came from."""
    model, path = loading.load_model(options.model, revision=options.revision, dtype=options.dtype, device=on, say=say)
    return model, str(path)


def load_tokenizer(options: ModelName, adapter_path: str | None = None, *, say: Say = print) -> Any:
    """The tokenizer of the model that the options name, or of an adapter that carries one."""
    return tokenizers.load_tokenizer(options.model, adapter_path=adapter_path, revision=options.revision, say=say)


def load_words(model: ModelName, options: TokenOptions, start: str | None = None, *, say: Say = print) -> TokenizerSetup:
    """The tokenizer of a run, with special and extra tokens as the options ask; checks the model's configs before rows are read."""
    special = option_pairs.named_texts(options.special_tokens, "special-tokens")
    asked = {"special_tokens": special, "tokens": options.tokens}
    words = tokenizers.set_up_tokenizer(model.model, revision=model.revision, start=start, say=say, **asked)
    loading.check_configs(model.model, revision=model.revision, sizes=getattr(model, "from_config", None) is None)
    return words


def with_rows(model: Model, words: TokenizerSetup, options: VocabularyOptions, start: str | None = None) -> Model:
    """The model with a row for every token that the options and the adapter to start from ask for."""
    return tokenizers.resize_embeddings(model, words, multiple=options.embedding_multiple, start=start)


def stop_ids(options: ModelOptions, tokenizer: Any) -> list[int]:
    """Ids that end an answer of the model that the options name."""
    return tokenizers.stop_ids(options.model, tokenizer, revision=options.revision)


def generation_config(options: ModelOptions, tokenizer: Any) -> dict[str, Any]:
    """The generation_config.json of the model that the options name, for a model made from it with this tokenizer."""
    return tokenizers.generation_config(options.model, tokenizer, revision=options.revision)


def optimizer(options: OptimOptions, *, loraplus: float | None = None) -> optim.Optimizer:
    """The optimiser that the options name; LoRA+ is a learning-rate rule for the B side."""
    factors = option_pairs.rules(options.lr_rules, "lr-rules")
    if frozen := [regex for regex, factor in factors if not factor > 0]:
        raise ValueError(f"--lr-rules needs factors above 0, and {frozen[0]!r} has none; to leave weights as they are, do not target them")
    scale = factors + ([(r"^lora\..*\.B$", loraplus)] if loraplus else [])
    common = {
        "weight_decay": options.weight_decay,
        "decay": option_pairs.rules(options.weight_decay_rules, "weight-decay-rules"),
        "lr_scale": scale,
    }
    knobs = {"b1": options.adam_beta1, "eps": options.adam_epsilon, "momentum": options.momentum}
    knobs |= {} if options.adam_beta2 is None else {"b2": options.adam_beta2}
    return registry.bind(registry.choose(registry.OPTIMIZERS, options.optimizer), **knobs, **common)()


def model_name(options: ModelName) -> str:
    """How files should name the base model: a local path absolute, a known name by its hub id, anything else as it is."""
    return loading.base_name(options.model)
