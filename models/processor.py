"""What the processor of a model that reads other media says of itself: small files, kept as they are beside a saved model."""

from collections.abc import Mapping
from pathlib import Path

from treetune.models import fetch

NAMES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def read(name: str, *, revision: str | None = None) -> dict[str, bytes]:
    """{file: contents} of those that the folder of a model by name has; {} for a .gguf file."""
    path = fetch.resolve(name, revision=revision)
    return {file: (path / file).read_bytes() for file in NAMES if (path / file).is_file()}


def write(files: Mapping[str, bytes], folder: Path) -> None:
    """Write them into a folder."""
    for name, contents in files.items():
        (folder / name).write_bytes(contents)
