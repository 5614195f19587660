"""What one rank decides and all must know."""

from treetune.core.run.ranks import share as share
