"""TensorBoard: event files in the run folder, written without TensorFlow and without torch. TensorBoard keeps numbers in float32."""

import importlib
import os
import time
from collections.abc import Mapping
from typing import Any

from treetune.core.trackers import tracked_run
from treetune.core.trackers.tracked_run import Answers, TrackedRun

FOLDER = "tensorboard"


class TensorBoard:
    """An event file. One that continues a run begins with the mark that makes TensorBoard drop the steps after it."""

    def __init__(self, run: TrackedRun):
        self.events: Any = importlib.import_module("tensorboard.compat.proto.event_pb2")
        self.summaries: Any = importlib.import_module("tensorboard.compat.proto.summary_pb2")
        writer: Any = importlib.import_module("tensorboard.summary.writer.event_file_writer")
        folder = os.path.join(run.folder, FOLDER)
        self.writer, self.last = writer.EventFileWriter(folder), max(run.step, 0)
        self.id, self.place = run.id or run.name, f"tensorboard --logdir {folder}"
        if run.continued:
            mark = self.events.SessionLog(status=self.events.SessionLog.START)
            self._write(run.step + 1, session_log=mark)
        self.facts({"about": _table(run.about), "options": _table(tracked_run.flat(run.config))})
        hparams: Any = importlib.import_module("tensorboard.plugins.hparams.summary_v2")
        self._write(0, summary=hparams.hparams_pb(tracked_run.flat(run.config)))

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """A scalar for each number, on the disk at once."""
        self.last = step
        entries = [self.summaries.Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(step, summary=self.summaries.Summary(value=entries))
        self.writer.flush()

    def answers(self, step: int, table: Answers) -> None:
        """A text of the step, as Markdown."""
        self.last = step
        self._write(step, summary=self._text("eval/answers", table.markdown()))
        self.writer.flush()

    def facts(self, values: Mapping[str, str | float]) -> None:
        """A text for each, as Markdown."""
        for name, value in values.items():
            self._write(self.last, summary=self._text(name, str(value)))
        self.writer.flush()

    def copy(self, path: str, name: str) -> None:
        """Nothing: the folder lies beside the events."""

    def finish(self, stopped: str | None) -> None:
        """Close the file."""
        self.writer.close()

    def _write(self, step: int, **what: Any) -> None:
        self.writer.add_event(self.events.Event(wall_time=time.time(), step=step, **what))

    def _text(self, name: str, text: str) -> Any:
        tensors: Any = importlib.import_module("tensorboard.compat.proto.tensor_pb2")
        types: Any = importlib.import_module("tensorboard.compat.proto.types_pb2")
        metadata = self.summaries.SummaryMetadata(plugin_data=self.summaries.SummaryMetadata.PluginData(plugin_name="text"))
        tensor = tensors.TensorProto(dtype=types.DT_STRING, string_val=[text.encode("utf-8", "replace")])
        return self.summaries.Summary(value=[self.summaries.Summary.Value(tag=name, metadata=metadata, tensor=tensor)])


def _table(values: Mapping[str, Any]) -> str:
    """Markdown of two columns."""
    rows = (f"| {name} | {str(value).replace('|', '&#124;')} |" for name, value in values.items())
    return "\n".join(["| | |", "|---|---|", *rows])


def open_run(run: TrackedRun, **options: Any) -> TensorBoard:
    """Begin an event file."""
    return TensorBoard(run, **options)
