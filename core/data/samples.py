"""The sample rows that commands read where no data is named: part of the package, so that an installed one has them. Imports no torch."""

import os
from pathlib import Path

SOURCE = "examples/data"  # in a checkout, where the installed package has `samples`


def path(name: str) -> str:
    """The path of a sample file: as seen from a checkout that is the working folder, else in the package."""
    local = f"{SOURCE}/{name}"
    package = Path(__file__).resolve().parents[2]
    if (package / local).exists() and os.path.exists(local) and os.path.samefile(local, package / local):
        return local
    return next((str(file) for file in (package / local, package / "samples" / name) if file.exists()), local)
