"""Types of rows: what a data file holds in one line, and the messages inside."""

from collections.abc import Callable
from typing import Any

Row = dict[str, Any]  # columns by name
Message = dict[str, Any]  # role, content, and perhaps reasoning_content, tool_calls and other fields
Advance = Callable[[int], None]  # takes how many more rows are done
