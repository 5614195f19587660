"""Datasets of the datasets library: from the hub, whole or as a stream, and from folders that it saved."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from treetune.core.data import arrow, files
from treetune.core.data.rows import Row

if TYPE_CHECKING:
    from datasets import Dataset
    from pyarrow import Table


def load_dataset(
    path: str,
    *,
    split: str,
    name: str | None = None,
    revision: str | None = None,
    data_files: str | Sequence[str] = (),
    streaming: bool = False,
) -> Any:
    """A dataset `owner/name`, one split or a part of it. Errors: ValueError of one line when it is not there or cannot be reached."""
    import datasets  # takes a second, and most runs read plain files
    from datasets.exceptions import DatasetsError

    options = {"revision": revision, "data_files": data_files if isinstance(data_files, str) else list(data_files), "streaming": streaming}
    try:
        return datasets.load_dataset(path, name, split=split, **{key: value for key, value in options.items() if value})
    except (OSError, ValueError, DatasetsError) as error:
        raise ValueError(
            f"{path}: no such file here, and no such dataset on the hub or no way to reach it ({files.first_line(error)})"
        ) from error


def load_saved_dataset(path: str, split: str) -> "Dataset":
    """One split of a folder written by `save_to_disk`. Errors: ValueError for a split that it lacks or a folder that is damaged."""
    import datasets
    from pyarrow import ArrowException

    try:
        data = datasets.load_from_disk(path)
    except (OSError, ValueError, KeyError, TypeError, ArrowException) as error:
        raise ValueError(f"{path}: not a readable saved dataset ({files.first_line(error)})") from error
    splits = {str(name): part for name, part in data.items()} if isinstance(data, dict) else {str(data.split or "train"): data}
    if split in splits:
        return splits[split]
    if not isinstance(data, dict) and split == "train":
        return data
    raise ValueError(f"{path} has no split {split!r}: expected one of {', '.join(splits)}")


def read_rows(data: "Dataset") -> list[Row]:
    """All rows of a dataset as plain dicts."""
    tables = data.with_format("arrow").iter(batch_size=arrow.BATCH_ROWS)
    batches = (batch for table in tables for batch in cast("Table", table).to_batches())
    return [row for _, row in arrow.iterate_batches(batches)]
