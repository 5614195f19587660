"""Names of earlier places of options. Importing this imports no torch."""

from treetune.cli.methods.ebft import TEMPERATURES as TEMPERATURES
from treetune.cli.methods.ebft import EbftData as EbftData
from treetune.cli.methods.ebft import EbftLoss as EbftLoss
from treetune.cli.methods.ebft import EbftOptim as EbftOptim
from treetune.cli.methods.ebft import EbftOptions as EbftOptions
from treetune.cli.methods.ebft import EbftRollout as EbftRollout
