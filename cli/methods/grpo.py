"""`treetune grpo`: reinforcement learning from rewards of sampled completions."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from treetune.cli.methods.method import Method, Parts, RolloutParts, Setting
from treetune.cli.options import meshes, online
from treetune.cli.options.data import PromptData
from treetune.cli.options.hub import HubOptions
from treetune.cli.options.model import AdapterOptions, ModelOptions, VocabularyOptions
from treetune.cli.options.optim import RL_RATES, RlOptim
from treetune.cli.options.pipeline import CorrectionOptions, EngineOptions, PipelineOptions
from treetune.cli.options.policy_loss import RoutedPolicyLoss
from treetune.cli.options.reference import RlReference
from treetune.cli.options.rollout import RewardFunctions, RolloutOptions
from treetune.cli.options.run import RunOptions
from treetune.cli.options.trackers import TrackerOptions
from treetune.core.config.table import group

if TYPE_CHECKING:
    from treetune.core.state import Logprob
    from treetune.models.policy import Policy


@dataclass(frozen=True)
class Grpo:
    """Reinforcement learning: sample several completions of each prompt, score them with rewards, and raise those that beat the rest."""

    model: ModelOptions = group(ModelOptions)
    data: PromptData = group(PromptData)
    vocabulary: VocabularyOptions = group(VocabularyOptions)
    adapter: AdapterOptions = group(AdapterOptions)
    rollout: RolloutOptions = group(RolloutOptions)
    rewards: RewardFunctions = group(RewardFunctions)
    loss: RoutedPolicyLoss = group(RoutedPolicyLoss)
    correction: CorrectionOptions = group(CorrectionOptions)
    pipeline: PipelineOptions = group(PipelineOptions)
    engine: EngineOptions = group(EngineOptions)
    reference: RlReference = group(RlReference)
    optim: RlOptim = group(RlOptim)
    run: RunOptions = group(RunOptions)
    tracking: TrackerOptions = group(TrackerOptions)
    hub: HubOptions = group(HubOptions)


def conflicts(config: Grpo) -> None:
    """Raise ValueError for options that contradict each other."""
    rewards = config.rewards
    online.conflicts(config)
    if rewards.reward_weights and len(rewards.reward_weights) != len(rewards.reward_funcs):
        raise ValueError(f"reward_weights needs a number for each of the {len(rewards.reward_funcs)} rewards")


def parts(config: Grpo, policy: "Policy", setting: Setting) -> Parts:
    """Rewards that functions and reward models give to sampled completions."""
    from treetune.cli.methods import policy_gradient, rewarding
    from treetune.core.data import prompt_rows
    from treetune.models import tensor_rules

    prompt_rows.check_fits(
        setting.data.train + setting.data.val,
        max_completion_length=config.rollout.max_completion_length,
        stop_ids=config.rollout.stop_token_ids,
        vocab_size=policy.cfg.vocab_size,
        max_positions=policy.cfg.shared_positions,
    )

    def rollouts(logprob: "Logprob") -> RolloutParts:
        # With streaming a thread scores while the next completions are sampled, and ranks would gather weights at different times.
        split = None if config.pipeline.streaming_partial_batch else tensor_rules.home(setting.ranks.mesh, meshes.sharding(config.run))
        place, tell = rewarding.Place(setting.device, setting.ranks, split), {"say": setting.say, "warn": setting.warn}
        return RolloutParts(logprob, lambda placed: rewarding.start(config.rewards, config.model, place, **tell))

    return policy_gradient.build(config, policy, setting, rollouts)


METHOD = Method(
    "grpo",
    "learn from rewards of sampled completions: GRPO, DAPO, GSPO, RLOO, ...",
    Grpo,
    RL_RATES,
    "prompts",
    parts,
    ("reward", "kl", "completions/mean_length"),
    "completions",
    goal="reward",
    conflicts=conflicts,
)
