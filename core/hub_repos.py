"""Repositories of the Hugging Face hub: checked before anything is made, private unless asked for otherwise, folders uploaded to them.

The token is that of HF_TOKEN or of `hf auth login`, which huggingface_hub reads; no option holds one. huggingface_hub is imported when the
hub is asked, and retries single requests by itself.
"""

import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from treetune.core import manifest

WAITS = (2.0, 8.0)  # seconds before a whole upload is tried again
BUSY = (408, 409, 412, 425, 429)  # somebody else commits just now, or too much is asked of the hub: what passes
NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
TOKEN = "make one that may write at https://huggingface.co/settings/tokens, then export HF_TOKEN=..., or hf auth login"


class Repo(NamedTuple):
    """A repository: its name, NAME or OWNER/NAME, the branch, whether it is private where it is made, and model or dataset."""

    id: str
    revision: str | None = None
    private: bool = True
    kind: str = "model"


class Unsent(Exception):
    """An upload did not arrive; the message says why, in one line."""


def check_name(flag: str, value: str) -> None:
    """Raise ValueError for what cannot be the name of a repository."""
    if not NAME.fullmatch(value) or "--" in value or ".." in value or value.endswith((".git", ".", "-")):
        raise ValueError(f"{flag} must be NAME or OWNER/NAME of letters, digits, -, _ and ., as in me/my-model, got {value!r:.120}")


def prepare(repo: Repo, flag: str) -> Repo:
    """Ask the hub who we are, and make the repository, and its branch, where they are not there. The repository with its owner.

    Errors: ValueError, one line, for a name or a token that the hub does not take, and for a hub that does not answer.
    """
    check_name(flag, repo.id)
    api = _api()
    if not (api.token or _token()):
        raise ValueError(f"{flag} {repo.id} needs a token of the hub, and there is none: {TOKEN}")
    try:
        who = api.whoami()
        if who.get("auth", {}).get("accessToken", {}).get("role") == "read":  # a repository that is there could be asked for with it
            raise ValueError(f"the token may only read: {TOKEN}")
        whole = repo._replace(id=repo.id if "/" in repo.id else f"{who['name']}/{repo.id}")
        api.create_repo(whole.id, private=whole.private, repo_type=whole.kind, exist_ok=True)
        if whole.revision is not None:
            api.create_branch(whole.id, branch=whole.revision, repo_type=whole.kind, exist_ok=True)
    # It talks to a network through a package whose errors nobody can list.
    except Exception as error:
        raise ValueError(f"{flag} {repo.id}: {_reason(error)}") from error
    return whole


def upload(repo: Repo, folder: Path, message: str) -> str:
    """Commit the files of a folder, those that are there already excepted. The address of the repository. Errors: Unsent.

    What an earlier upload has listed in a manifest that is replaced, and the folder has not, goes: it would be loaded with the new files.
    """
    import tenacity

    tries = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_passing), stop=tenacity.stop_after_attempt(len(WAITS) + 1),
        wait=tenacity.wait_chain(*map(tenacity.wait_fixed, WAITS)), reraise=True,
    )  # fmt: skip
    try:
        return tries(_upload, repo, folder, message)
    except Exception as error:  # as in `prepare`
        raise Unsent(_reason(error)) from error


def _passing(error: BaseException) -> bool:
    """Whether an upload that failed so may arrive when it is tried again."""
    status = _status(error)
    return status in BUSY or not (isinstance(error, FileNotFoundError | ValueError) or status in range(400, 500))


def _upload(repo: Repo, folder: Path, message: str) -> str:
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    api, quiet = _api(), are_progress_bars_disabled()
    disable_progress_bars()  # the screen is that of the run
    try:
        options = {"repo_type": repo.kind, "revision": repo.revision, "commit_message": message}
        api.upload_folder(repo_id=repo.id, folder_path=folder, delete_patterns=_replaced(api, repo, folder) or None, **options)
    finally:
        if not quiet:
            enable_progress_bars()
    return address(repo)


def _replaced(api: Any, repo: Repo, folder: Path) -> list[str]:
    """The files of earlier uploads that a folder's manifests no longer list, by their paths in the repository."""
    of_repo, replaced = {"repo_type": repo.kind, "revision": repo.revision}, []
    there = set(api.list_repo_files(repo.id, **of_repo))
    for name in (path.relative_to(folder).as_posix() for path in folder.rglob(manifest.NAME)):
        if name not in there:
            continue
        with tempfile.TemporaryDirectory(prefix="treetune-hub-") as made:
            try:
                older = Path(api.hf_hub_download(repo.id, name, local_dir=made, **of_repo)).parent
            except FileNotFoundError as error:  # the file is listed, so it is the network that failed, and that may pass
                raise ConnectionError(str(error)) from error
            gone = manifest.read(older).keys() - manifest.read((folder / name).parent).keys() - {manifest.CARD}
        replaced += sorted({(Path(name).parent / one).as_posix() for one in gone} & there)
    return replaced


def address(repo: Repo) -> str:
    """Where people see a repository."""
    place = "datasets/" if repo.kind == "dataset" else ""
    return f"{_api().endpoint}/{place}{repo.id}" + (f"/tree/{repo.revision}" if repo.revision else "")


def front_matter(values: Mapping[str, Any] = MappingProxyType({})) -> str:
    """The YAML between the marks at the top of a model card, checked by huggingface_hub."""
    from huggingface_hub import ModelCardData

    return f"---\n{ModelCardData(**{name: value for name, value in values.items() if value}).to_yaml()}\n---\n"


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)


def _token() -> str | None:
    from huggingface_hub import get_token

    return get_token()


def _status(error: BaseException) -> int | None:
    """The status of the answer that an error, or what it came from, is about."""
    while error is not None:
        if (code := getattr(getattr(error, "response", None), "status_code", None)) is not None:
            return code
        error = error.__cause__  # type: ignore[assignment]
    return None


def _reason(error: Exception) -> str:
    """What went wrong, in one line without addresses."""
    code = _status(error)
    if code == 401:
        return f"the hub does not take the token: {TOKEN}"
    if code == 403:
        return "the token may not write there: name a repository of your own or of an organization that you may write to, or " + TOKEN
    if type(error).__name__ == "OfflineModeIsEnabled":
        return "HF_HUB_OFFLINE is set, so nothing is sent: unset it, or leave the hub out"
    said = " ".join(str(error.__cause__ or error).split())[:300] or type(error).__name__
    if code is not None:
        return f"the hub answered {code}: {said}"
    return said if type(error) is ValueError else f"the hub at {_api().endpoint} is not reached or failed: {said}"
