"""From options to a model, a tokenizer, trees of trained and frozen weights, and the functions over them."""

import dataclasses
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

from treetune.cli import pairs
from treetune.cli.options.shared import (
    AdapterOptions,
    LossOptions,
    ModelName,
    ModelOptions,
    OptimOptions,
    TokenOptions,
    VocabularyOptions,
)
from treetune.core import check, fields, lora, manifest, optim, param, shard, tree
from treetune.core.run.ranks import Ranks as Ranks
from treetune.core.run.ranks import barrier as wait_for_all  # noqa: F401
from treetune.core.run.ranks import join_ranks as ranks  # noqa: F401
from treetune.core.state import Objective, Params
from treetune.losses import sft, sft_objective
from treetune.models import Model, adapter, bare, fetch, gguf, heads, hf, logprobs, resize, tokenizer_config, vocabulary
from treetune.models.dense import Neftune

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Trees(NamedTuple):
    """What trains, what does not, how the adapter is applied, and what its folder will say (None without one)."""

    params: Params
    frozen: Params
    lora: lora.Lora | None
    info: adapter.Info | None


class Words(NamedTuple):
    """The tokenizer of a run, the tokens that it was given, the tokens it had before, and those that the model must hold (0: any)."""

    tokenizer: Any
    added: list[str]
    before: int
    needed: int


def device(name: str) -> torch.device:
    """The torch device for an option; under torchrun each rank takes its own CUDA device."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, but this machine or this torch has no CUDA; use --device cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def compute_dtype(name: str, on: torch.device) -> torch.dtype:
    """The dtype for an option: auto is bfloat16 on CUDA, float32 on CPU."""
    return DTYPES.get(name, torch.bfloat16 if on.type == "cuda" else torch.float32)


def load_model(options: ModelOptions, *, on: torch.device, say=print) -> tuple[Model, str]:
    """The model an option names, in its compute dtype, and the path it came from."""
    path, dtype = fetch.resolve(options.model, say=say, revision=options.revision), compute_dtype(options.dtype, on)
    load = gguf.load if str(path).endswith(".gguf") else hf.load
    with fields.reading(f"the model {path}"):
        model = load(path, dtype=dtype, device=on)
    if bad := check.not_finite(model.params):
        raise ValueError(f"{path} holds weights that are not finite: {', '.join(bad[:3])}; download or save the model again")
    return model, str(path)


def adapter_folder(path: str) -> Path:
    """The adapter folder that a path means: itself, or the one inside a run folder."""
    inside = Path(path) / "adapter"
    return inside if inside.is_dir() else Path(path)


def renamed(options: ModelOptions, name: str) -> ModelOptions:
    """The options with another model."""
    return dataclasses.replace(options, model=name)


def pair_name(options: ModelOptions, path: str | None) -> str:
    """Model and adapter as a person would name them."""
    return options.model if path is None else f"{options.model} + {path}"


def check_rows(path: str, found: int, tokens: int) -> None:
    """Raise ValueError where an adapter has fewer rows of vocabulary than its tokenizer has tokens."""
    if found < tokens:
        raise ValueError(f"{path} has {found} rows of vocabulary and its tokenizer {tokens} tokens: the adapter is of another model")


def load_adapter(path: str, model: Model, *, head: bool = False) -> tuple[lora.Lora, Params, adapter.Info]:
    """The adapter, whole weights and facts of an adapter folder or of the one in a run folder; with `head`, of a reward model's too."""
    folder = adapter_folder(path)
    judges = heads.kind(folder) is not None
    if judges and not head:
        raise ValueError(f"{path} is a reward model's adapter: use it with treetune score, or train it on with treetune reward or prm")
    with fields.reading(f"the adapter {folder}"):
        found, whole, *_, info = (heads.load_adapter if judges else adapter.load)(folder, model)
    if bad := check.not_finite(found.tree) + check.not_finite(whole):
        raise ValueError(f"{path} holds weights that are not finite: {', '.join(bad[:3])}; train or download the adapter again")
    return found, whole, info


def load_tokenizer(options: ModelName, adapter_path: str | None = None, *, say=print):
    """The tokenizer of the model an option names, or the one, or the chat template, that an adapter was trained with and carries."""
    own = adapter_path is not None and has_tokenizer(adapter_path)
    path = adapter_folder(adapter_path) if own else fetch.resolve(options.model, say=say, revision=options.revision)
    try:
        tokenizer = (gguf.tokenizer if str(path).endswith(".gguf") else hf.tokenizer)(path)
    except Exception as error:  # the tokenizers package raises bare Exceptions
        if path.is_dir() and not any((path / name).is_file() for name in ("config.json", "tokenizer.json")):
            raise ValueError(f"{path} holds no model: there is no config.json in it") from error
        if path.is_dir():
            tokenizer_config.check_files(path)
        raise ValueError(f"the tokenizer of {path} cannot be read: {error}") from error
    if adapter_path is not None and (template := adapter_folder(adapter_path) / adapter.TEMPLATE).is_file():
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    return tokenizer


def has_tokenizer(adapter_path: str) -> bool:
    """Whether an adapter carries a tokenizer of its own. Raises ValueError where its files are not as they were written."""
    manifest.check(adapter_folder(adapter_path), weights=False)
    return (adapter_folder(adapter_path) / adapter.TOKENIZER).is_file()


def check_files(options: ModelName) -> None:
    """Raise ValueError for a config.json or generation_config.json that cannot be used: before rows are read, and before a run that
    would save a model with it."""  # fmt: skip
    path = fetch.resolve(options.model, revision=options.revision)
    if path.is_dir() and getattr(options, "from_config", None) is None:
        hf.read_config(path / "config.json")
    hf.generation_config(path)


def load_words(model: ModelName, options: TokenOptions, start: str | None = None, *, say=print) -> Words:
    """The tokenizer of a run: that of the model, or of the adapter it starts from, with special and extra tokens as asked."""
    plain = load_tokenizer(model, start, say=say)
    check_files(model)
    special = pairs.named_texts(options.special_tokens, "special-tokens")
    tokenizer, added = vocabulary.apply(plain, special_tokens=special, tokens=options.tokens)
    whole = special or options.tokens or (start is not None and has_tokenizer(start))
    return Words(tokenizer, added, len(plain), len(tokenizer) if whole else 0)


def with_rows(model: Model, words: Words, options: VocabularyOptions, start: str | None = None) -> Model:
    """The model with a row for every token that was asked for, and for every row of the adapter that the run starts from."""
    rows = None if start is None else adapter.rows(adapter_folder(start), model.family)
    if rows is not None:
        check_rows(start, rows, words.before)
    return resize.resize(model, max(words.needed, rows or 0), multiple=options.embedding_multiple)


def describe_rows(words: Words, before: Model, after: Model) -> str:
    """What became of the vocabulary, in a line; nothing where it is as it was."""
    texts = f"{len(words.added)} tokens added ({' '.join(words.added[:8])}{' ...' * (len(words.added) > 8)})" if words.added else ""
    old, new = before.cfg.vocab_size, after.cfg.vocab_size
    return ", ".join(part for part in (texts, f"{old} rows grown to {new}" if new > old else "") if part)


def adapted(
    model: Model, options: AdapterOptions, *, base: adapter.Base, seed: int, new_rows: bool = False, head: bool = False, say=print
) -> Trees:
    """Trained and frozen trees for an adapter: the low-rank pairs, and whole weights that train beside them.

    With `new_rows` in the vocabulary, which no base model has, the embedding and an untied head are among the latter.
    """
    if options.lora_model_dir is not None:
        found, whole, info = _started(model, options.lora_model_dir, head)
    else:
        found, whole, info = _fresh(model, options, seed=seed)
    info = info._replace(base=base.name, digest=base.digest)
    also = _vocabulary_leaves(model, options, whole, info, say=say) if new_rows else ()
    whole = tree.merge(whole_modules(model, options.lora_modules_to_save + also), whole)
    adapter.check(model.family, info.paths, [path for path, _ in tree.items(whole)])
    params = {"lora": tree.map(_trained, on_device(found.tree, model))} | ({"model": tree.map(_trained, whole)} if whole else {})
    return Trees(params, {"model": model.params}, found._replace(dropout=options.lora_dropout), info)


def _started(model: Model, path: str, head: bool) -> tuple[lora.Lora, Params, adapter.Info]:
    """An adapter to train further, its vocabulary grown to that of the model."""
    rows = adapter.rows(adapter_folder(path), model.family)
    found, whole, info = load_adapter(path, model if rows is None else resize.cut(model, rows), head=head)
    if odd := [name for name, (a, _) in lora.pairs(found.tree).items() if a.shape[0] != info.rank]:
        raise ValueError(f"{path} has another rank on {odd[0]} than its r of {info.rank}; training goes on from adapters of one rank only")
    return found, resize.grown(whole, model.cfg.vocab_size), info


def _vocabulary_leaves(model: Model, options: AdapterOptions, whole: Params, info: adapter.Info, *, say) -> tuple[str, ...]:
    """Regular expressions of the leaves with a row per token that are not trained whole yet."""
    named = [path for path, _ in tree.items(whole_modules(model, options.lora_modules_to_save))]
    missing = [name for name in resize.LEAVES if name in model.params and name not in (*named, *whole)]
    if low := [name for name in missing if name in info.paths]:
        raise ValueError(f"the vocabulary has new rows, so {low[0]} trains whole: leave it out of --lora-target-modules")
    if missing:
        say(f"the vocabulary has new rows: {' and '.join(missing)} train whole beside the adapter and are saved with it")
    return tuple(f"^{name}$" for name in missing)


def _fresh(model: Model, options: AdapterOptions, *, seed: int) -> tuple[lora.Lora, Params, adapter.Info]:
    sizes = hf.abstract_of(model, head=True)
    targets = "all-linear" if options.lora_target_modules == ("all-linear",) else options.lora_target_modules
    try:
        paths = lora.match(sizes, targets, layers=options.lora_layers or None)
    except ValueError as error:
        raise ValueError(f"{'lora_layers' if 'layers [' in str(error) else 'lora_target_modules'}: {error}") from error
    scale = lora.scale(rank=options.lora_r, alpha=options.lora_alpha, rslora=options.lora_rslora)
    info = adapter.Info(options.lora_r, options.lora_alpha, options.lora_rslora, options.lora_dropout, "", paths)
    return lora.Lora(lora.init(sizes, paths, rank=options.lora_r, seed=seed), scale), {}, info


def _trained(leaf: torch.Tensor) -> torch.Tensor:
    """A float32 copy that an optimiser may change in place."""
    return leaf.detach().float().clone()


def stop_ids(options: ModelOptions, tokenizer) -> list[int]:
    """Ids that end an answer of the model an option names."""
    path = fetch.resolve(options.model, revision=options.revision)
    with fields.reading(f"generation_config.json of {path}"):
        return hf.stop_ids(path, tokenizer)


def generation_config(options: ModelOptions, tokenizer) -> dict:
    """The generation_config.json of the model an option names, for a model made from it with this tokenizer."""
    path = fetch.resolve(options.model, revision=options.revision)
    with fields.reading(f"generation_config.json of {path}"):
        found = hf.generation_config(path)
    own = {name: value for name in ("bos_token_id", "pad_token_id") if name in found and (value := getattr(tokenizer, name)) is not None}
    if found.get("eos_token_id") is not None:
        named = found["eos_token_id"] if isinstance(found["eos_token_id"], list) else [found["eos_token_id"]]
        own["eos_token_id"] = found["eos_token_id"] if tokenizer.eos_token_id in (*named, None) else [tokenizer.eos_token_id, *named]
    return found | own


def on_device(params: Params, model: Model) -> Params:
    """A tree moved to where the model is."""
    where = model.params["embed_tokens"].device
    return tree.map(lambda leaf: leaf.to(where), params)


def whole_modules(model: Model, regexes: tuple[str, ...]) -> Params:
    """The weights that train whole beside an adapter; the head of a tied model starts as its embedding."""
    leaves = {"lm_head": model.params["embed_tokens"]} | dict(tree.items(model.params))
    for regex in regexes:
        try:
            tree.require_match(regex, list(leaves))
        except ValueError as error:
            raise ValueError(f"lora_modules_to_save: {error}") from error
    chosen = [(path, leaf) for path, leaf in leaves.items() if any(re.search(regex, path) for regex in regexes)]
    return tree.from_items(chosen)


def without_tree(used: lora.Lora | None) -> lora.Lora | None:
    """How an adapter is applied, without the weights that it started with."""
    return None if used is None else used._replace(tree={})


def full(model: Model) -> Trees:
    """Trained and frozen trees when the model itself trains: float32 weights, nothing frozen."""
    return Trees({"model": tree.map(_trained, model.params)}, {}, None, None)


def place(trees: Trees, model: Model, where: Ranks, sharding: str) -> Trees:
    """Shard all leaves over the ranks when asked to; otherwise leave them whole."""
    if where.mesh is None or sharding == "none":
        return trees
    sizes = hf.abstract_of(model)

    def put(part: Params, like: Params) -> Params:
        return shard.place(part, where.mesh, shard.placements(like, where.mesh, shard.FULLY_SHARDED))

    def shapes(part: Params) -> Params:
        return tree.map(lambda leaf: param.Param(tuple(leaf.shape), axes=("embed",) * leaf.ndim), part)

    params = {name: put(part, shapes(part)) for name, part in trees.params.items()}
    frozen = {name: put(part, sizes if name == "model" else shapes(part)) for name, part in trees.frozen.items()}
    return trees._replace(params=params, frozen=frozen)


def logprob(
    model: Model, used: lora.Lora | None, *, neftune: float = 0.0, remat: str | None = None, temperature: float = 1.0, run=logprobs
):
    """The log-prob function of an objective: lays trained weights over frozen ones and runs the model.

    run: `models.logprobs`, or `models.logprobs_beside` for the log-probs of prompt rows, too. Randomness (dropout, NEFTune) is drawn
    from the step's seed in the batch; without one, as in evaluation, there is none.
    """
    model, used = bare(model), without_tree(used)

    def fn(params: Params, frozen: Params, batch: dict, plan: Any, *, want: tuple[str, ...] = ()):
        weights = tree.merge(frozen.get("model", {}), params.get("model", {}))
        seed = batch.get("seed")
        ab = None
        if used is not None:
            ab = used._replace(tree=params["lora"], seed=seed, dropout=used.dropout if seed is not None else 0.0)
        noise = Neftune(neftune, seed) if neftune and seed is not None else None
        how = {"lora": ab, "want": want, "noise": noise, "remat": remat, "temperature": temperature}
        return run(model.family, model.cfg, weights, batch, plan, **how)

    return fn


def objective(logprob_fn, options: LossOptions, *, report: tuple[str, ...] = ()) -> Objective:
    """The supervised objective that the loss options name; `report` names statistics to report besides accuracy."""
    want = ["top1", *report]

    def token_loss(stats):
        if options.loss == "dft":
            value = sft.dft(stats.logp)
        elif options.loss == "eaft":
            value = sft.eaft(stats.logp, stats.topk_entropy)
        elif options.label_smoothing:
            value = sft.smoothed(stats.logp, stats.lse, stats.mean_logit, label_smoothing=options.label_smoothing)
        else:
            value = sft.nll(stats.logp)
        return value + sft.z_loss(stats.lse, coef=options.z_loss_coef) if options.z_loss_coef else value

    want += ["topk_entropy"] if options.loss == "eaft" else []
    want += ["mean_logit"] if options.label_smoothing else []
    return sft_objective.objective(logprob_fn, token_loss, want=tuple(want))


def optimizer(options: OptimOptions, *, loraplus: float | None = None) -> optim.Optimizer:
    """The optimiser that the options name; LoRA+ is a learning-rate rule for the B side."""
    factors = pairs.rules(options.lr_rules, "lr-rules")
    if frozen := [regex for regex, factor in factors if not factor > 0]:
        raise ValueError(f"--lr-rules needs factors above 0, and {frozen[0]!r} has none; to leave weights as they are, do not target them")
    scale = factors + ([(r"^lora\..*\.B$", loraplus)] if loraplus else [])
    common = {
        "weight_decay": options.weight_decay,
        "decay": pairs.rules(options.weight_decay_rules, "weight-decay-rules"),
        "lr_scale": scale,
    }
    if options.optimizer == "sgd":
        return optim.sgd(momentum=options.momentum, **common)
    betas = {"b1": options.adam_beta1} | ({} if options.adam_beta2 is None else {"b2": options.adam_beta2})
    if options.optimizer == "lion":
        return optim.lion(**betas, **common)
    return optim.adamw(**betas, eps=options.adam_epsilon, **common)


def model_name(options: ModelOptions) -> str:
    """How files should name the base model: a local path absolute, a known name by its hub id, anything else as given."""
    if (local := Path(options.model).expanduser()).exists():
        return str((fetch.model_in(local) if local.is_dir() else local).resolve())
    short = fetch.known_name(options.model)
    return fetch.MODELS[short].hub_id if short else options.model
