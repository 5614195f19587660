"""SwanLab: an experiment that is continued under its id; offline and local, a folder in swanlog for each process."""

import importlib
from collections.abc import Mapping
from typing import Any

from treetune.core.trackers import tracked_run
from treetune.core.trackers.tracked_run import Answers, TrackedRun


class SwanLab:
    """An experiment of SwanLab. No git state and no output goes with it."""

    def __init__(
        self,
        run: TrackedRun,
        *,
        project: str | None,
        workspace: str | None,
        name: str | None,
        mode: str | None,
        api_key: str | None,
        description: str | None = None,
    ):
        swanlab: Any = importlib.import_module("swanlab")
        if api_key is not None:
            swanlab.login(api_key=api_key, save=False)
        self.swanlab = swanlab
        Settings = swanlab.Settings
        settings = Settings(interactive=False, probe=Settings.Probe(git=False), terminal=Settings.Terminal(proxy_type="none"))
        self.run = swanlab.init(
            project=project or "treetune",
            workspace=workspace,
            name=name or run.name,
            description=description,
            id=run.id,
            resume="allow",
            mode=mode,
            config=run.config,
            settings=settings,
        )
        self.id = self.run.id
        self.place = self._place()

    def _place(self) -> str:
        try:
            return str(self.run.url)
        except ValueError:  # not online
            return f"SwanLab experiment {self.id} in swanlog"

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Scalars of the step."""
        self.run.log(dict(values), step=step)

    def answers(self, step: int, table: Answers) -> None:
        """A text, as Markdown."""
        self.run.log({"eval/answers": self.swanlab.Text(table.markdown())}, step=step)

    def facts(self, values: Mapping[str, str | float]) -> None:
        """Entries of the config."""
        self.run.config.update(dict(values))

    def copy(self, path: str, name: str) -> None:
        """Nothing: no option asks for it."""

    def finish(self, stopped: str | None) -> None:
        """Write or send what is left."""
        state = "success" if stopped is None else "aborted" if tracked_run.ended_well(stopped) else "crashed"
        self.run.finish(state=state)


def open_run(run: TrackedRun, **options: Any) -> SwanLab:
    """Begin the experiment, or go on with it."""
    return SwanLab(run, **options)
