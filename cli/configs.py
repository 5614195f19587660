"""The config classes of all commands, by name. Importing this imports no torch."""

from treetune.cli.methods.cpo import Cpo as Cpo
from treetune.cli.methods.dpo import Dpo as Dpo
from treetune.cli.methods.ebft import Ebft as Ebft
from treetune.cli.methods.grpo import Grpo as Grpo
from treetune.cli.methods.kto import Kto as Kto
from treetune.cli.methods.orpo import Orpo as Orpo
from treetune.cli.methods.pretrain import Pretrain as Pretrain
from treetune.cli.methods.prm import Prm as Prm
from treetune.cli.methods.reward import Reward as Reward
from treetune.cli.methods.sft import Sft as Sft
from treetune.cli.methods.simpo import Simpo as Simpo
from treetune.cli.options.commands import Chat as Chat
from treetune.cli.options.commands import Eval as Eval
from treetune.cli.options.commands import Fetch as Fetch
from treetune.cli.options.commands import Generate as Generate
from treetune.cli.options.commands import Info as Info
from treetune.cli.options.commands import Merge as Merge
from treetune.cli.options.commands import Preprocess as Preprocess
from treetune.cli.options.commands import Rollout as Rollout
from treetune.cli.options.commands import Score as Score
from treetune.cli.options.commands import Serve as Serve
