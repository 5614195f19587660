"""These tests start a real server and run only when a marker expression names `vllm`: make test-vllm."""

from pathlib import Path

import pytest


def pytest_collection_modifyitems(config, items):
    """A folder is a keyword of its tests, so the marker itself is looked up."""
    if "vllm" in config.getoption("markexpr"):
        return
    skip = pytest.mark.skip(reason="needs a vLLM server: run with make test-vllm")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(skip)
