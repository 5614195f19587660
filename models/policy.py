"""A policy: a model with what trains and what does not, and the functions over it.

What lives as long as a run closes over sizes only: the weights are those of its state, and a copy of the loaded ones would never be freed.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from treetune.core import layer_offload, lora_use, partition, shard, tree
from treetune.core.layer_offload import Put
from treetune.core.lora import Lora
from treetune.core.param import Params
from treetune.core.partition import Partition
from treetune.core.quant import Scheme
from treetune.core.state import Batch, Logprob, LogprobBeside, Scores, TokenStats, TrainState
from treetune.models import (
    Model,
    adapter,
    adapter_blocks,
    adapter_spec,
    artifacts,
    heads,
    hf,
    loading,
    logprobs,
    logprobs_beside,
    processor,
    quantised,
    resize,
    tensor_rules,
)  # fmt: skip
from treetune.models.adapter import Base, Carried, Info
from treetune.models.adapter_spec import AdapterSpec
from treetune.models.adapter_starts import WEIGHTS_ALONE, Given
from treetune.models.dense import Config, Neftune
from treetune.models.fetch import Say, silent
from treetune.models.tokenizer import adapter_folder, generation_config, has_own_words, resize_embeddings, set_up_tokenizer
from treetune.ops.attention import Plan

MODELS_KEPT = ("model", "ref", "features")  # of what is frozen: models, or parts of such


class Policy(NamedTuple):
    """A model with what trains and what does not.

    params: what trains, {"model"?, "lora"?, "head"?}; a "model" may be part of a tree. frozen: what does not, {"model"?, "ref"?,
    "ref_lora"?, "start"?, "features"?}, where "start" is what an adapter began with and its model is without. lora: how the adapter is
    applied; its tree is empty, the trained one is params["lora"]. adapter: what the adapter's folder will say. folds: whether the adapter
    is folded into the frozen model as the run goes, so that what the run leaves is a model.
    """

    family: str
    cfg: Config
    params: Params
    frozen: Params
    lora: Lora | None = None
    tokenizer: Any = None
    adapter: Info | None = None
    folds: bool = False

    @property
    def leaves_model(self) -> bool:
        """Whether a model is what it leaves, and no adapter."""
        return self.lora is None or self.folds


def load(
    name: str,
    *,
    adapter: AdapterSpec | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    scheme: Scheme | None = None,
    seed: int = 0,
    say: Say = silent,
) -> Policy:
    """The policy that starts from a model by name (a folder, a .gguf file, a known name, a hub id), with its tokenizer.

    Without an adapter all weights train, in float32. scheme: quantises the base of one. `seed` decides how a fresh adapter starts. Raises
    ValueError, one line, for what cannot be found or read, and for an adapter that does not fit the model.
    """
    start = None if adapter is None else adapter.start
    torch_device = loading.select_device(device)
    setup = set_up_tokenizer(name, revision=revision, start=start, say=say)
    loading.check_configs(name, revision=revision)
    loaded, _ = loading.load_model(name, revision=revision, dtype=dtype, device=torch_device, scheme=scheme, say=say)
    model = resize_embeddings(loaded, setup, start=start)
    if adapter is None:
        return full(model)._replace(tokenizer=setup.tokenizer)
    # The digest is of the model as it was loaded: rows that are added are the adapter's.
    base = loading.identify_base(name, loaded, scheme)
    if start is not None:
        loading.check_base(start, base, say=say, train=True)
    new_rows = model.cfg.vocab_size > loaded.cfg.vocab_size
    reread = partial(loading.load_model, name, revision=revision, dtype=dtype, device=torch_device, scheme=scheme)
    options = {"seed": seed, "new_rows": new_rows, "given": Given(lambda see: reread(see=see))}
    return adapt(model, adapter, base=base, **options, say=say)._replace(tokenizer=setup.tokenizer)


def bare(policy: Policy) -> Policy:
    """The policy without weights: what a function that lives as long as a run may keep."""
    return policy._replace(params={}, frozen={}, lora=without_tree(policy.lora))


def full(model: Model, unfrozen: tuple[str, ...] = (), dtype: torch.dtype = torch.float32) -> Policy:
    """The policy of a model that trains itself, nothing frozen but what no gradient reaches by nature.

    unfrozen: regular expressions of the only weights that train, by `adapter_spec.unfrozen`. dtype: of matrices; vectors are float32.
    """
    trains = adapter_spec.unfrozen(model, unfrozen) or {path for path, leaf in tree.items(hf.abstract_of(model)) if leaf.trains}
    parts = [[(path, leaf) for path, leaf in tree.items(model.params) if (path in trains) == chosen] for chosen in (True, False)]
    trained, frozen = (tree.from_items(part) for part in parts)
    quantised.check_dense(trained)
    params = {"model": tree.map(partial(_master, dtype=dtype), move_to(trained, model))}
    return Policy(model.family, model.cfg, params, {"model": frozen} if frozen else {})


def inference(model: Model, lora: Lora | None = None) -> tuple[Policy, TrainState]:
    """A policy that does not train, a model with or without an adapter on it: without its weights, and the state that holds them."""
    params = {} if lora is None else {"lora": lora.tree}
    state = TrainState(params, {"model": model.params}, {}, {}, torch.tensor(0, device=model.params["embed_tokens"].device))
    return Policy(model.family, model.cfg, {}, {}, without_tree(lora)), state


def adapt(
    model: Model,
    spec: AdapterSpec,
    *,
    base: Base,
    seed: int,
    new_rows: bool = False,
    head: bool = False,
    given: Given = WEIGHTS_ALONE,
    say: Say = silent,
) -> Policy:
    """The policy of an adapter: low-rank pairs, and whole weights that train beside them, over the frozen model.

    With `new_rows` in the vocabulary, which no base model has, the embedding and an untied head are among the latter. With `head` the
    adapter to start from may be a reward model's. given: what starts are computed from.
    """
    begin = adapter_spec.fresh(model, spec, seed=seed, given=given) if spec.start is None else _started(model, spec.start, head)
    low, whole, info, start = begin
    info = info._replace(base=base.name, digest=base.digest, scheme=base.scheme)
    vocabulary = adapter_spec.vocabulary_leaves(model, spec, whole, info, say=say) if new_rows else ()
    whole = tree.merge(adapter_spec.whole_leaves(model, spec, vocabulary), whole)
    adapter.check(model.family, info.paths, [path for path, _ in tree.items(whole)], dropout=spec.dropout, bias=info.bias)
    params = {"lora": tree.map(_master, move_to(low.tree, model))} | ({"model": tree.map(_master, move_to(whole, model))} if whole else {})
    frozen = {"model": model.params} | ({"start": tree.map(_master, move_to(start, model))} if start else {})
    return Policy(model.family, model.cfg, params, frozen, without_tree(low._replace(dropout=spec.dropout)), None, info)


def _master(leaf: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A copy that an optimiser may change in place; of vectors, which are few, in float32."""
    own = dtype if leaf.ndim > 1 else torch.float32
    if shard.distributed(leaf):
        return shard.like(lambda rows: rows.detach().to(own, copy=True), leaf)
    return shard.gather(leaf, own).detach().clone()


def _started(model: Model, path: str, head: bool) -> adapter_spec.Fresh:
    """An adapter to train further, its vocabulary grown to that of the model."""
    rows = adapter.rows(adapter_folder(path), model.family)
    low, whole, info = loading.load_adapter(path, model if rows is None else resize.cut(model, rows), head=head)
    return adapter_spec.Fresh(low, resize.grown(whole, model.cfg.vocab_size), info, {})


def move_to(params: Params, model: Model) -> Params:
    """A tree on the device of a model."""
    return tree.map(lambda leaf: layer_offload.brought(leaf, model.params["embed_tokens"].device), params)


def without_tree(low: Lora | None) -> Lora | None:
    """How an adapter is applied, without its weights."""
    return None if low is None else low._replace(tree={})


def place(policy: Policy, mesh: Any, sharding: str) -> Policy:
    """The policy with all leaves sharded along `data` of a mesh ("full"), or not (any other sharding), and layers split along `tensor`."""
    home = tensor_rules.home(mesh, sharding)
    if home is None:
        # Ranks update rows of a leaf, which are one piece of memory.
        return policy if mesh is None or sharding == "none" else policy._replace(params=tree.map(Tensor.contiguous, policy.params))

    def put(part: Params, *, vectors: bool = True) -> Params:
        return tree.from_items((path, _put(home, path, leaf, vectors=vectors)) for path, leaf in tree.items(part))

    params = {name: put(part) for name, part in policy.params.items()}
    # What is frozen beside a model that trains may be a few vectors, which every rank keeps.
    frozen = {name: put(part, vectors=name != "model" or policy.lora is not None) for name, part in policy.frozen.items()}
    return policy._replace(params=params, frozen=frozen)


def _put(home: Partition, path: str, leaf: Any, *, vectors: bool) -> Any:
    """This rank's part of a leaf, or all of a vector."""
    return home.split(path, leaf) if vectors or leaf.ndim > 1 or home.dimension(path) is not None else shard.full(leaf)


def offload(policy: Policy, home: Put | None) -> Policy:
    """The policy with the frozen layers of all its models where `home` puts them; as it is without one.

    Errors: ValueError where all layers train.
    """
    if home is None:
        return policy
    models = {name: part for name, part in policy.frozen.items() if name in MODELS_KEPT and "layers" in part}
    if not models:
        raise ValueError("layer_offloading is of frozen layers, and all layers of this run train: leave it out, or train an adapter")
    return policy._replace(frozen=policy.frozen | {name: layer_offload.away(part, home) for name, part in models.items()})


def logprob(
    policy: Policy,
    *,
    neftune: float = 0.0,
    remat: str | None = None,
    temperature: float = 1.0,
    run: Callable[..., Any] = logprobs,
) -> Logprob:
    """The log-prob function of an objective: lays trained weights over frozen ones and runs the model.

    run: `models.logprobs`, or `models.logprobs_beside` for the log-probs of prompt rows, too, or `models.logprobs_routed` for the logits
    of routers. Randomness (dropout, NEFTune) is drawn from the step's seed in the batch; without one, as in evaluation, there is none.
    """
    family, cfg, low = policy.family, policy.cfg, without_tree(policy.lora)

    def compute(params: Params, frozen: Params, batch: Batch, plan: Plan | None, /, *, want: tuple[str, ...] = ()) -> Any:
        seed = batch.get("seed")
        noise = Neftune(neftune, seed) if neftune and seed is not None else None
        options = {"lora": _lora(low, params, frozen, seed), "want": want, "noise": noise, "remat": remat, "temperature": temperature}
        return run(family, cfg, weights(params, frozen), batch, plan, **options)

    return compute


def logprob_beside(policy: Policy, *, remat: str | None = None, temperature: float = 1.0, documents: bool = True) -> LogprobBeside:
    """The log-probs of generated tokens, and those of the documents' own beside them, or None where documents are not read."""
    if documents:
        return cast(LogprobBeside, logprob(policy, remat=remat, temperature=temperature, run=logprobs_beside))
    generated = logprob(policy, remat=remat, temperature=temperature)

    def without_documents(
        params: Params, frozen: Params, batch: Batch, plan: Plan, /, *, want: tuple[str, ...] = ()
    ) -> tuple[TokenStats, None]:
        return generated(params, frozen, batch, plan, want=want), None

    return without_documents


def scores(policy: Policy, *, remat: str | None = None) -> Scores:
    """The scores of the policy's head: trained weights over frozen ones, and the head."""
    family, cfg, low = policy.family, policy.cfg, without_tree(policy.lora)

    def compute(params: Params, frozen: Params, batch: Batch, plan: Plan | None, /) -> Tensor:
        adapted = _lora(low, params, frozen, batch.get("seed"))
        return heads.scores(family, cfg, weights(params, frozen), params["head"], batch, plan, lora=adapted, remat=remat)

    return compute


def weights(params: Params, frozen: Params) -> Params:
    """The weights of the model, trained over frozen ones."""
    return tree.merge(frozen.get("model", {}), params.get("model", {}))


def _lora(low: Lora | None, params: Params, frozen: Params, seed: Tensor | None = None) -> Lora | None:
    """The adapter in use with its trained tree; no dropout without a seed to draw it from."""
    return None if low is None else lora_use.in_use(low, params["lora"], frozen.get("start"), seed)


def current(policy: Policy, params: Params | None = None, frozen: Params | None = None) -> tuple[Model, Lora | None]:
    """The whole model and adapter with these weights, by default the policy's own: a collective where they are sharded. No dropout."""
    model, low = in_parts(policy, policy.params if params is None else params, policy.frozen if frozen is None else frozen)
    return model._replace(params=tree.map(shard.full, model.params)), low


def in_parts(policy: Policy, params: Params, frozen: Params, adapter: Callable[[Tensor], Tensor] = shard.full) -> tuple[Model, Lora | None]:
    """The model with this rank's part of sharded leaves, and the adapter without dropout: whole, or what `adapter` makes of its leaves."""
    small = {name: tree.map(adapter, part[name]) for part, name in ((params, "lora"), (frozen, "start")) if name in part}
    return Model(policy.family, policy.cfg, weights(params, frozen)), _lora(policy.lora, small, small)


def save(
    policy: Policy,
    path: str | Path | None,
    *,
    params: Params | None = None,
    frozen: Params | None = None,
    generation: dict[str, Any] | None = None,
    beside: Mapping[str, bytes] | None = None,
    carried: Carried | None = None,
) -> None:
    """Write what trained into a folder: the adapter, or the whole model in the dtype that it computes in, with a head if there is one.

    params, frozen: by default the policy's own. Where leaves are sharded all ranks call this; those without a path write nothing.
    generation, beside: the generation_config.json and the processor's files of a model. carried: the tokenizer that an adapter's
    folder holds. Raises RunFailed for weights that are not finite.
    """
    trained, still = policy.params if params is None else params, policy.frozen if frozen is None else frozen
    if policy.leaves_model:
        model, low = in_parts(policy, trained, still)
        head = tree.map(shard.full, trained["head"]) if "head" in trained else None
        artifacts.save_model(path, model, lora=low, head=head, tokenizer=policy.tokenizer, generation=generation, beside=beside)
    elif policy.lora is None or policy.adapter is None:
        raise ValueError("the policy says nothing of its adapter: expected `adapter`, as `load` and `adapt` give it")
    else:
        trained = {name: partition.gathered(part, keep=path is not None) for name, part in trained.items()}
        start = {name: partition.gathered(still[name], keep=path is not None) for name in ("start",) if name in still}
        if path is not None:
            trained |= {"lora": lora_use.whole(trained["lora"], start.get("start"))}
            info = adapter_spec.file_info(policy.adapter, policy.lora.scale, twice=bool(start))._replace(dropout=policy.lora.dropout)
            artifacts.save_adapter(path, trained, family=policy.family, info=info, tied=policy.cfg.tied, carried=carried)


def file_rank(policy: Policy) -> int:
    """The largest rank in the file of the policy's adapter."""
    return adapter_blocks.file_rank(policy.family, lora_use.whole(policy.params["lora"], policy.frozen.get("start")))


def companions(
    policy: Policy, name: str, *, revision: str | None = None, start: str | None = None, own_words: bool = False
) -> dict[str, Any]:
    """What a saved folder holds besides weights, as arguments of `save`: generation_config.json, or the tokenizer of an adapter.

    name, revision: the model that it was made from; start: the adapter. own_words: whether the tokenizer may have tokens that the model's
    has not. Raises ValueError for a generation_config.json that cannot be used.
    """
    if policy.leaves_model:
        if "head" in policy.params:
            return {}
        generation = generation_config(name, policy.tokenizer, revision=revision)
        return {"generation": generation, "beside": processor.read(name, revision=revision)}
    return {"carried": Carried(policy.tokenizer, own=own_words or (start is not None and has_own_words(start)))}
