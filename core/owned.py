"""Deletion of files that treetune wrote, and of nothing else: the names that it writes into folders of its own.

A link, a file of another name, a folder where a file belongs: whatever a run did not write is foreign, and stays as it is.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from treetune.core import drafts, manifest

PAGE = '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="generator" content="treetune">'  # begins a page
LOG = "# treetune: output of a vLLM server\n"  # begins a log of `treetune serve`
CHECKPOINT = re.compile(r"state(-\d{5}-of-\d{5})?\.safetensors|state(\.index)?\.json|treetune_\w+\.json")
EVENTS = re.compile(r"events\.out\.tfevents\.[^/]+")  # of TensorBoard
MODEL = re.compile(  # a model, an adapter or a reward model, with a tokenizer
    r"(model|model-\d{5}-of-\d{5}|adapter_model)\.safetensors|model\.safetensors\.index\.json|(adapter_|generation_|tokenizer_)?config\.json"
    r"|tokenizer\.(json|model)|special_tokens_map\.json|added_tokens\.json|chat_template\.(json|jinja)|additional_chat_templates/[^/]+\.jinja"
    r"|vocab\.(json|txt)|merges\.txt|treetune_\w+\.json"
)


def foreign(folder: Path, names: re.Pattern) -> list[Path]:
    """Paths below a folder that treetune did not write; the folder itself where it is a link.

    names: names relative to the folder that treetune writes; files in its manifest count, too, a README.md unless it was edited. Of a
    `MODEL` with a manifest only the manifest counts: a tokenizer beside an adapter may be the user's.
    """
    if folder.is_symlink() or not folder.is_dir():
        return [folder] if os.path.lexists(folder) else []
    listed = _listed(folder)
    paths = ((path, path.relative_to(folder).as_posix()) for path in _below(folder))
    matching = names is not MODEL or not listed
    return [path for path, name in paths if not (_plain(path) and (name in listed or matching and names.fullmatch(name)))]


def _listed(folder: Path) -> set[str]:
    """Names in a folder's manifest, and the manifest's own; none where there is no manifest."""
    try:
        files = json.loads((folder / manifest.NAME).read_bytes())["files"]
        edited = manifest.CARD in files and not _as_written(folder / manifest.CARD, files[manifest.CARD])
        return {manifest.NAME, *files} - ({manifest.CARD} if edited else set())
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return set()


def _as_written(path: Path, entry: dict) -> bool:
    return _plain(path) and manifest.entry(path)._asdict() == entry


def _below(folder: Path) -> Iterator[Path]:
    """Files, links and empty folders below a folder; links are not followed."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            inner = list(_below(path))
            yield from inner or [path]
        else:
            yield path


def _plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def remove(folder: Path, names: re.Pattern) -> bool:
    """Delete the files below a folder that treetune wrote, and the folder if nothing else is in it; return whether it was deleted.

    A folder without foreign files is renamed first, so that a crash never leaves a part of it under its name.
    """
    if folder.is_symlink() or not folder.is_dir():
        return False
    if not foreign(folder, names):
        retired = drafts.name(folder, drafts.GONE)
        os.rename(folder, retired)
        drafts.delete(retired)
        return True
    others = set(foreign(folder, names))
    for path in list(_below(folder)):
        if path not in others:
            path.unlink(missing_ok=True)
    for path, _, _ in os.walk(folder, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(path)
    return not folder.exists()


def replace(new: Path, path: Path, names: re.Pattern) -> None:
    """Rename a finished folder to `path`. A folder of that name is deleted, after its foreign files have moved into the new one.

    A crash in between leaves the old folder under a draft's name, from which `restore` brings it back.
    """
    if not os.path.lexists(path):
        os.rename(new, path)
        return
    if path.is_symlink() or not path.is_dir():
        raise FileExistsError(f"{path} is a {'link' if path.is_symlink() else 'file'} that treetune did not make: move it away")
    old = drafts.name(path, drafts.OLD)
    os.rename(path, old)
    try:
        os.rename(new, path)
    except OSError:
        os.rename(old, path)
        raise
    _retire(old, path, names)


def _retire(old: Path, path: Path, names: re.Pattern) -> None:
    """Delete a folder that was replaced, after its foreign files have moved to `path`."""
    for other in foreign(old, names):
        target = path / other.relative_to(old)
        target.parent.mkdir(parents=True, exist_ok=True)
        while os.path.lexists(target):
            target = target.with_name(f"{target.name}.old")
        os.rename(other, target)
    drafts.delete(old)


def restore(folder: Path, names: re.Pattern, *, locked: bool = False) -> None:
    """Finish a `replace` that a crash interrupted: an old folder without a successor gets its name back, any other is deleted.

    locked: as for `drafts.abandoned`.
    """
    for draft in drafts.inside(folder):
        if draft.kind == drafts.OLD and drafts.abandoned(draft, locked=locked):
            path = folder / draft.name
            if os.path.lexists(path):
                _retire(draft.path, path, names)
            else:
                os.rename(draft.path, path)
