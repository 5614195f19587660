"""`treetune agent-docs`: the pages of documentation that come with the package, for people and for programs that write configs."""

from treetune.cli.options.commands import AgentDocs
from treetune.core.data import bundled
from treetune.core.run.errors import checking_input


def run(config: AgentDocs, given: frozenset[str]) -> int:
    """Print a page, or the list of pages; the exit code."""
    with checking_input():
        text = _list() if config.topic is None else bundled.page(config.topic)
    print(text, end="")
    return 0


def _list() -> str:
    rows = "".join(f"  {name:14} {title}\n" for name, title in bundled.topics().items())
    ends = "treetune agent-docs TOPIC prints a page; treetune config-schema --method sft lists options; treetune COMMAND --help, too.\n"
    return f"pages:\n{rows}\n{ends}"
