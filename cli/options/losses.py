"""Names of earlier places of options. Importing this imports no torch."""

from treetune.cli.methods.cpo import CpoLoss as CpoLoss
from treetune.cli.methods.dpo import LOSSES as LOSSES
from treetune.cli.methods.dpo import DpoLoss as DpoLoss
from treetune.cli.methods.kto import KtoLoss as KtoLoss
from treetune.cli.methods.orpo import OrpoLoss as OrpoLoss
from treetune.cli.methods.reward import RewardLoss as RewardLoss
from treetune.cli.methods.simpo import SimpoLoss as SimpoLoss
from treetune.cli.options.optim import PreferenceOptim as PreferenceOptim
from treetune.cli.options.optim import RewardOptim as RewardOptim
from treetune.cli.options.reference import ReferenceOptions as ReferenceOptions
