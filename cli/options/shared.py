"""Names of earlier places of options. Importing this imports no torch."""

from treetune.cli.methods.pretrain import PretrainData as PretrainData
from treetune.cli.methods.pretrain import PretrainModel as PretrainModel
from treetune.cli.methods.sft import LossOptions as LossOptions
from treetune.cli.options.data import SAMPLES as SAMPLES
from treetune.cli.options.data import AnyRows as AnyRows
from treetune.cli.options.data import DataOptions as DataOptions
from treetune.cli.options.data import HeldOut as HeldOut
from treetune.cli.options.data import Listed as Listed
from treetune.cli.options.data import PairData as PairData
from treetune.cli.options.data import RowOptions as RowOptions
from treetune.cli.options.model import AdapterOptions as AdapterOptions
from treetune.cli.options.model import AdapterPath as AdapterPath
from treetune.cli.options.model import ModelName as ModelName
from treetune.cli.options.model import ModelOptions as ModelOptions
from treetune.cli.options.model import TokenOptions as TokenOptions
from treetune.cli.options.model import VocabularyOptions as VocabularyOptions
from treetune.cli.options.optim import OptimOptions as OptimOptions
from treetune.cli.options.run import RunOptions as RunOptions
from treetune.cli.options.run import SampleOptions as SampleOptions
