"""Modules that some systems lack: nothing imports them without a way on."""

import subprocess
import sys
from pathlib import Path

import pytest

ABSENT = ("resource", "fcntl", "termios", "pwd", "grp", "pty", "tty", "syslog")
IMPORT_ALL = f"""
import importlib, signal, sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
import torch, transformers  # which have ways of their own
for name in {ABSENT!r}:
    sys.modules[name] = None
for name in ("SIGKILL", "SIGHUP", "SIGALRM", "SIGXFSZ", "SIGUSR1", "setitimer", "ITIMER_REAL"):
    delattr(signal, name)
for name in sys.argv[1:]:
    importlib.import_module(name)
from treetune.core.run import memory
assert memory.peak_gib(torch.device("cpu")) != memory.peak_gib(torch.device("cpu"))
"""


@pytest.mark.more
def test_every_module_is_imported_without_what_windows_lacks():
    import treetune.cli

    root = Path(treetune.cli.__file__).resolve().parents[1]
    names = [
        ".".join(("treetune", *path.relative_to(root).with_suffix("").parts))
        for folder in ("core", "losses", "models", "cli")
        for path in sorted((root / folder).rglob("*.py"))
        if path.stem not in ("__init__", "logprob_kernels")
    ]
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL, *names], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(names) > 100
