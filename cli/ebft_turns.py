"""The rollouts of structured energy-based fine-tuning, under their former names."""

from treetune.core.rollout.turns import adaptive
from treetune.core.rollout.turns import multi_turn as turns

__all__ = ["adaptive", "turns"]
