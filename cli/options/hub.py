"""Options of the Hugging Face hub: where what trains is uploaded. Importing this imports no torch."""

from dataclasses import dataclass
from typing import Annotated, Literal

from treetune.core import hub_repos
from treetune.core.config.marks import SHOWN, unused_unless

SENT = unused_unless("hub_model_id", reason="there is no hub_model_id, so nothing is uploaded")


@dataclass(frozen=True)
class HubOptions:
    """Hugging Face hub. The token is that of HF_TOKEN or `hf auth login`."""

    hub_model_id: Annotated[str | None, SHOWN] = None
    """Repository of the hub to upload what trains to, NAME or OWNER/NAME; made where it is not there. If not given, nothing is uploaded."""
    hub_strategy: Annotated[Literal["end", "every_save", "checkpoint", "all_checkpoints"], SHOWN, SENT] = "every_save"
    """When: at the end; what has trained so far at each checkpoint, too (every_save); and the newest checkpoint besides, to go on from
    (checkpoint), or all of them (all_checkpoints)."""
    hub_private_repo: Annotated[bool, SHOWN, SENT] = True
    """Make the repository private; one that is there stays as it is."""
    hub_revision: Annotated[str | None, SHOWN, SENT] = None
    """Branch to upload to, made where it is not there; if not given, main."""


def conflicts(options: HubOptions) -> None:
    """Raise ValueError for what cannot be the name of a repository."""
    if options.hub_model_id is not None:
        hub_repos.check_name("hub_model_id", options.hub_model_id)
