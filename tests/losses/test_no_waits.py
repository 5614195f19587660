"""Nothing in a loss makes the host wait for a GPU: what `torch.cuda.set_sync_debug_mode` would say there, as far as it can be read."""

import ast
from pathlib import Path

import pytest

LOSSES = Path(__file__).parents[2] / "losses"
READING = {"item", "tolist", "nonzero", "new_tensor", "cpu"}  # new_tensor copies from the host and waits; new_full does not
ON_THE_HOST = {"advantage.py", "ebft.py"}  # rewards of groups, and what an error says


def waits(source):
    """Lines with a call that reads a number of a tensor or copies one from the host to where a tensor is."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            copied = node.func.attr in ("tensor", "as_tensor") and any(keyword.arg == "device" for keyword in node.keywords)
            if node.func.attr in READING or copied:
                lines.append(node.lineno)
    return lines


@pytest.mark.parametrize("path", sorted(set(LOSSES.glob("*.py")) - {LOSSES / name for name in ON_THE_HOST}), ids=lambda path: path.name)
def test_losses_wait_for_nothing(path):
    assert not waits(path.read_text())


def test_a_wait_is_seen():
    lines = ["torch.tensor(3, device=x.device)", "x.new_tensor(3)", "x.item()", "torch.tensor(3)", "x.new_full((), 3)", "x.sum()"]
    assert waits("\n".join(lines)) == [1, 2, 3]
