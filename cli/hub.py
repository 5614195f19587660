"""From the options of the hub to uploads of a run, and the facts on its card."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from treetune.cli import invocation, row_settings
from treetune.cli.assembly import Assembly
from treetune.cli.methods.method import Method
from treetune.cli.options.hub import HubOptions
from treetune.cli.run import TrainConfig, TrainRun
from treetune.core import hub_repos, machine, manifest, shard, tree
from treetune.core.hub_repos import Repo
from treetune.core.records import JsonRecord as Record
from treetune.core.run import cards, folder, ranks, uploads
from treetune.core.run.ranks import Ranks
from treetune.core.run.uploads import Uploads
from treetune.core.state import TrainState
from treetune.models import fetch, loading
from treetune.models import policy as policies

UNSHOWN = ("eval/seconds",)


def options_of(config: TrainConfig) -> HubOptions:
    """The options of the hub; those of a method without them are the defaults."""
    return getattr(config, "hub", None) or HubOptions()


def repo_of(config: TrainConfig, world: Ranks) -> Repo | None:
    """The repository that a run uploads to, asked for and made by the first rank; None without one.

    Errors: ValueError, one line, for a name or a token that the hub does not take.
    """
    options = options_of(config)
    if options.hub_model_id is None:
        return None
    repo = Repo(options.hub_model_id, options.hub_revision, options.hub_private_repo)
    return ranks.share(world, lambda: hub_repos.prepare(repo, "hub_model_id"))


def uploads_of(this: TrainRun, repo: Repo | None) -> Uploads | None:
    """The uploads of a run, on the first rank."""
    if repo is None or this.ranks.rank > 0:
        return None
    return Uploads(repo, options_of(this.config).hub_strategy, this.folder.root, this.observers.warn)


def exporter(this: TrainRun, parts: Assembly, extras: dict[str, Any], sent: Uploads | None) -> Callable[[TrainState], None]:
    """What writes and uploads the weights of each checkpoint; every rank calls it, since sharded leaves are gathered."""
    options, start = options_of(this.config), policies.bare(parts.policy)
    described = facts(this, parts)
    sharded = any(shard.distributed(leaf) for leaf in tree.leaves(parts.policy.params))

    def export(state: TrainState) -> None:
        step = int(state.step)
        if options.hub_model_id is None or options.hub_strategy == uploads.END or step >= parts.rate.total_steps:
            return
        shown = parts.shown(state)
        save = partial(policies.save, start, params=shown.params, frozen=shown.frozen, **extras)
        if sent is None:
            if sharded:
                save(None)
            return
        path = sent.staged(step)
        try:
            save(path)
            cards.add(path, described | metrics(sent.evaluations, this.method, step), place=sent.repo.id)
        except OSError as error:  # a checkpoint that cannot be written ends the run; what is only to be uploaded does not
            sent.warn(f"the weights of step {step} are not uploaded: {error}")
            return
        sent.offer(step, path)

    return export


def leave(path: Path, save: Callable[[Path], None], described: dict[str, Any]) -> None:
    """Write a result of a run with its card."""

    def both(draft: Path) -> None:
        save(draft)
        cards.add(draft, described, place=path.name)

    folder.leave(path, both)


def by_hand(saved: Path, repo: Repo) -> str:
    """The command that uploads what a run has left."""
    branch = ("--revision", repo.revision) if repo.revision else ()
    return invocation.command("push", saved.parent, repo.id, *branch, *(() if repo.private else ("--no-private",)))


def facts(this: TrainRun, parts: Assembly) -> dict[str, Any]:
    """What the card of a run says, but for its metrics and the steps that it made."""
    start, model = parts.policy, this.config.model
    named = bool(model.model) and not getattr(model, "from_config", None)
    local = named and Path(str(model.model)).expanduser().exists()
    file = this.folder.root / "config.yaml"
    about = machine.describe()
    return {
        "format": 1, "run": this.folder.root.resolve().name, "method": this.method.name, "goal": this.method.help,
        "kind": "model" if start.leaves_model else "adapter",
        "base": loading.base_name(str(model.model)) if named else "", "base_on_hub": named and not local and not _file(str(model.model)),
        "revision": model.revision, "scores": "head" in start.params,
        "rank": None if start.leaves_model else policies.file_rank(start),
        "datasets": _datasets(this.config.data), "rows": [text for text in parts.data.lines if not text.startswith("!")],
        "documents": dict(parts.supply.documents),
        "versions": {name: about[name] for name in ("treetune", *machine.PACKAGES, "python") if name in about},
        "config": file.read_text(encoding="utf-8") if file.is_file() else "",
    }  # fmt: skip


def _file(name: str) -> bool:
    return name.endswith(".gguf") and fetch.known_name(name) is None


def metrics(history: Sequence[Record], method: Method, step: int) -> dict[str, Any]:
    """The facts of the last evaluation and of the best one."""
    goal = f"eval/{method.goal}"
    evaluations = [record for record in history if goal in record and record[goal] == record[goal]]
    sign = 1 if method.goal.endswith("loss") else -1
    rows = {"last": evaluations[-1], "best": min(evaluations, key=lambda record: sign * record[goal])} if evaluations else {}
    values = {
        name: {key: value for key, value in record.items() if key == "step" or key.startswith("eval/") and key not in UNSHOWN}
        for name, record in rows.items()
    }
    return {"metrics": values, "steps": step}


def _datasets(options: Any) -> list[dict[str, Any]]:
    """Data sets by name, with the sha256 of files; the names of files without their folders, which are nobody's business."""
    uses = {"training": ("datasets", "data"), "evaluation": ("test_datasets", "val_data")}
    datasets = []
    for use, names in uses.items():
        entries = next((value for name in names if (value := getattr(options, name, ()))), ())
        datasets += [_described(name, use) for name in row_settings.names(entries)]
    return datasets


def _described(path: str, use: str) -> dict[str, Any]:
    file = Path(path).expanduser()
    if not file.exists():
        return {"name": path, "use": use, "hub": True}
    return {"name": file.name, "use": use} | ({"sha256": manifest.entry(file).sha256} if file.is_file() else {})
