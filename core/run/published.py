"""What a model card says in public: facts of a run without folders of its machine, and without secrets.

Folders are told by their form, secrets by that and by the environment: whatever a variable with the name of a secret holds is none of a
reader's business, wherever it has come to stand.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
# /data/rows.jsonl, ~/models/a, C:\\models\\a: what is behind the last folder stays. Addresses and names such as me/data are none.
PATH = re.compile(r"""(?<![^\s'"`(\[=,])(?:~|[A-Za-z]:(?=[\\/]))?[\\/](?:[^/\\\s'"`,;:]+[\\/]+)+([^/\\\s'"`,;:)\]]*)""")
FOLDER = re.compile(
    r"""(?<![^\s'"`(\[=,])((?:~|[A-Za-z]:(?=[\\/]))?[\\/](?:[^/\\\s'"`,;:]+[\\/]+)*[^/\\\s'"`,;:]+)[\\/](?=[\s'"`),\]]|$)"""
)
LOGIN = re.compile(r"(?<=://)[^\s/@'\"]+@")
TOKENS = re.compile(
    r"(?<![A-Za-z0-9_-])(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}"
    r"|xox[abprs]-[\w-]{10,}|AKIA[0-9A-Z]{16}|AIza[\w-]{30,}|wandb_v1_\w{16,})"
)
NAMED = re.compile(
    r"(?i)((?:api[_-]?key|secret(?:[_-]?key)?|access[_-]?key|password|passwd|auth[_-]?token|access[_-]?token)['\"]?\s*[:=]\s*['\"]?)[^\s'\",}]+"
)
VARIABLE = re.compile(r"(?i)(^|_)(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(_|$)")
SHORTEST = 8  # characters of a secret; shorter values are words


def cleared(value: Any) -> Any:
    """A value of JSON in which no text names a folder of this machine or holds a secret."""
    secrets = [held for name, held in os.environ.items() if VARIABLE.search(name) and len(held) >= SHORTEST]
    return _cleared(value, sorted(secrets, key=len, reverse=True))


def _cleared(value: Any, secrets: list[str]) -> Any:
    if isinstance(value, str):
        return _text(value, secrets)
    if isinstance(value, Mapping):
        return {key: _cleared(inner, secrets) for key, inner in value.items()}
    return [_cleared(inner, secrets) for inner in value] if isinstance(value, list | tuple) else value


def _text(text: str, secrets: list[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    text = NAMED.sub(rf"\1{HIDDEN}", TOKENS.sub(HIDDEN, LOGIN.sub(f"{HIDDEN}@", text)))
    return PATH.sub(r"\1", FOLDER.sub(r"\1", text))
