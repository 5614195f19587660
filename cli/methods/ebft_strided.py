"""Strided mode of `treetune ebft`: short rollouts from anchors inside documents, compared with what the documents say there.

M blocks of the documents of a stream, n rollouts of each, R = M n, of G tokens; B sequences of the grown stream; D features.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from treetune.cli.methods import ebft_features
from treetune.cli.methods.ebft import Ebft, EbftOptions
from treetune.cli.methods.method import Parts, Setting
from treetune.core import shard, strided
from treetune.core.data import kinds, strides
from treetune.core.state import Batch, LogprobBeside, Params, Plan, TokenStats, TrainState
from treetune.losses import ebft, ebft_objective
from treetune.models import Model, decode_branches, feature_network, logprobs_beside
from treetune.models import policy as policies
from treetune.models.policy import Policy
from treetune.ops import attention, noise

ROLLOUTS, EVALUATION = 21, 22  # what randomness is for


def dataset(options: EbftOptions) -> kinds.DatasetSpec:
    """The rows that strided mode reads: documents without a block only where cross-entropy trains, too."""
    return kinds.strided(places(options), blocks=options.rl_coef != 0)


def places(options: EbftOptions) -> strides.Places:
    """Where rollouts start."""
    one = {name: getattr(options, name) for name in strides.Places._fields if name != "needed"}
    return strides.Places(**one, needed=options.ce_coef == 0)


def parts(config: Ebft, policy: Policy, setting: Setting) -> Parts:
    """Strided mode for one model: rollouts and their scores are made anew for each step, from its weights."""
    options, rollout = config.ebft, config.rollout
    assert rollout.temperature is not None  # of the mode, where none is given
    network = ebft_features.build(options, policy)
    for text in describe(options, policy.cfg.num_layers):
        setting.say(text)
    remat = "full" if config.optim.gradient_checkpointing else None
    logprob = partial(_logprob, policy, temperature=rollout.temperature)
    objective = partial(ebft_objective.objective, rl_coef=options.rl_coef, ce_coef=options.ce_coef)
    train, evaluation = objective(logprob(remat=remat, beside=options.ce_coef != 0)), objective(logprob(beside=True))
    seed = noise.keys(config.optim.seed, EVALUATION)
    roll = Roll(options, rollout.temperature, rollout.top_p, policies.bare(policy), network.phi, seed, setting.device)
    return Parts(network.policy, train, evaluation, (strides.collate,), prepare=partial(prepare, roll, mesh=setting.ranks.mesh))


def describe(options: EbftOptions, num_layers: int) -> list[str]:
    """What is compared, and what one rollout alone cannot have."""
    layers = ", ".join(map(str, ebft.layers(options.feature_layers, num_layers)))
    scale = ebft_features.norm(options) + (f", whitened in {options.whitening_space}" if options.use_whitening else "")
    lines = [f"features: layers {layers} of {num_layers}, {options.embed_method}, {scale}"]
    if options.n_samples_per_prompt == 1:
        plain = options.advantage_estimator == "reinforce"
        lines.append("one rollout from each anchor: diversity is 0" + ("" if plain else ", and the advantage is the reward itself"))
    return lines


def _logprob(policy: Policy, *, temperature: float, remat: str | None = None, beside: bool = False) -> LogprobBeside:
    """Log-probs of generated tokens, and those of the documents' own beside them or None."""
    if beside:
        return cast(LogprobBeside, policies.logprob(policy, remat=remat, temperature=temperature, run=logprobs_beside))
    generated = policies.logprob(policy, remat=remat, temperature=temperature)

    def without_documents(
        params: Params, frozen: Params, batch: Batch, plan: Plan, /, *, want: tuple[str, ...] = ()
    ) -> tuple[TokenStats, None]:
        return generated(params, frozen, batch, plan, want=want), None

    return without_documents


class Roll(NamedTuple):
    """What rollouts and their scores are made with; seed is that of evaluations."""

    options: EbftOptions
    temperature: float
    top_p: float
    policy: Policy  # without weights: those of each state are laid over it
    phi: Callable[..., Tensor]
    seed: Tensor
    device: torch.device


def prepare(roll: Roll, state: TrainState, micro_batches: list, *, mesh: Any = None) -> list:
    """The micro-batches of a step with the rollouts of its weights, their advantages and their scores."""
    grown = [grow(roll, state, batch) for batch, _ in micro_batches]
    gains = torch.cat([batch["advantage"][strided.sequences(batch)] for batch, _ in grown])
    spread = {"advantages_std": deviation(gains, mesh)}
    return [(batch | spread, plan) for batch, plan in grown]


def deviation(x: Tensor, mesh: Any = None) -> Tensor:
    """The standard deviation of the values [R] of all ranks."""
    count, total, squares = shard.all_sum([x.new_tensor(x.shape[0]), x.sum(), x.square().sum()], mesh)
    count = count.clamp(min=1)
    return (squares / count - (total / count).square()).clamp(min=0).sqrt()


def grow(roll: Roll, state: TrainState, batch: Batch) -> tuple[Batch, Any]:
    """Documents of a stream with rollouts at their anchors: geometry and masks are made on the host, the rest on the device."""
    host = {key: value.cpu() for key, value in batch.items()}
    found, more = anchors(roll.options, host)
    n = roll.options.n_samples_per_prompt
    tokens = sample(roll, state, host, found).cpu()
    grown, place = strided.grow(host, found, tokens, n)
    plan = attention.plan(grown, window=roll.policy.cfg.window, device=roll.device, dtype=roll.policy.cfg.dtype)
    grown = {key: value.to(roll.device, non_blocking=True) for key, value in (grown | more).items()}
    written, true = tokens.view(-1, n, tokens.shape[1]).to(roll.device), grown["tokens"][place.truth.to(roll.device)]
    phi, y = features(roll, state, grown, plan, place)
    scored = alike(ebft_features.scores(roll.options, shared(phi, y, written, true), y), written)
    told = {"alignment": scored.alignment, "diversity": scored.diversity, "ebft_reward": scored.reward}
    told |= {"advantage": ebft_features.advantages(roll.options, scored), "cfm": scored.cfm[:, None].expand(-1, n)}
    at, size = strided.sequences(grown), grown["seq_lens"].shape[0]
    by_sequence = {key: value.new_zeros(size).index_copy(0, at, value.flatten()) for key, value in told.items()}
    return grown | by_sequence, plan


def shared(phi: Tensor, y: Tensor, tokens: Tensor, true: Tensor) -> Tensor:
    """The features [M, n, D] with those of equal rollouts, tokens [M, n, G], made equal: to the truth's where they say what it does.

    true [M, G]. In bfloat16 where a rollout stands in the stream moves its features by 1e-3, which whitening would scale up to a direction.
    """
    phi = phi.gather(1, _first(tokens)[:, :, None].expand_as(phi))
    return torch.where((tokens == true[:, None]).all(-1)[:, :, None], y[:, None], phi)


def alike(scored: ebft.Scores, tokens: Tensor) -> ebft.Scores:
    """The scores with those of equal rollouts of a group made equal to the bit: tokens [M, n, G].

    Rounding tells their features apart, and an advantage that divides by the deviation of a group would make it a signal.
    """
    first = _first(tokens)
    reward, near, like = (value.gather(1, first) for value in (scored.reward, scored.alignment, scored.diversity))
    return scored._replace(reward=reward, alignment=near, diversity=like)


def _first(tokens: Tensor) -> Tensor:
    """The first rollout of the same tokens, for each: [M, n, G] -> [M, n]."""
    return (tokens[:, :, None] == tokens[:, None]).all(-1).int().argmax(-1)


def anchors(options: EbftOptions, host: Batch) -> tuple[strided.Anchors, Batch]:
    """Blocks of the documents that rollouts are compared with, and the numbers about them that a step reports.

    Where only cross-entropy trains, steps have none; evaluations do.
    """
    lens = strided.lengths(host)
    prompts = torch.zeros_like(lens).scatter(0, host["doc_of_seq"], host["prompt_length"])
    found = strided.anchors(lens, prompt_lengths=prompts, **strides.anchor_options(places(options)))
    found = strided.trained_blocks(found, host["cu_docs"], strided.scored(host))
    if options.rl_coef == 0 and "seed" in host:
        found = found._replace(document=found.document[:0], start=found.start[:0])
    after = {"context_length": options.context_length, "min_completion_prefix": options.min_completion_prefix}
    offsets = strided.first(prompts, **after)[prompts > 0].double()
    count = torch.tensor(offsets.shape[0])
    about = {"num_blocks": torch.tensor(found.start.shape[0]), "num_prompts": count, "anchor_offset": offsets.sum() / count.clamp(min=1)}
    return found, about


def sample(roll: Roll, state: TrainState, host: Batch, found: strided.Anchors) -> Tensor:
    """The tokens [R, G] of rollouts from the weights as they are, without dropout: a function of weights, step, row and place."""
    policy, lora = roll.policy, roll.policy.lora
    model = Model(policy.family, policy.cfg, policies.weights(state.params, state.frozen))
    lora = None if lora is None else lora._replace(tree=state.params["lora"])
    rows = torch.zeros(host["cu_docs"].shape[0] - 1, dtype=torch.int64).scatter(0, host["doc_of_seq"], host["row"])
    seed = int(noise.keys(host.get("seed", roll.seed), ROLLOUTS))
    how = {"temperature": roll.temperature, "top_p": roll.top_p, "seed": seed, "ids": rows.tolist()}
    return decode_branches.branches(model, host, found, roll.options.n_samples_per_prompt, lora=lora, **how).tokens


def features(roll: Roll, state: TrainState, grown: Batch, plan: Any, place: strided.Layout) -> tuple[Tensor, Tensor]:
    """What the frozen network says of rollouts [M, n, D] and of the true blocks [M, D]: every block is read by itself."""
    at = torch.cat([place.generated, place.truth])  # [R + M, G]
    lens = torch.full((at.shape[0],), at.shape[1], device=roll.device)
    found = roll.phi(state.frozen, grown, plan, feature_network.sequence_rows(lens, at.flatten().to(roll.device)))
    own, true = found.split([place.generated.shape[0], place.truth.shape[0]])
    return own.view(true.shape[0], roll.options.n_samples_per_prompt, own.shape[1]), true
