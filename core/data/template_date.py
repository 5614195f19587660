"""The date that chat templates write (`strftime_now`): one for a whole process, for a resumed run that of its start.

With the date of each rendering the same rows would be other documents after midnight, and a run could not be resumed on another day.
"""

from datetime import date, datetime, time


class _Day:
    chosen = date.today()


def today() -> str:
    """Today as YYYY-MM-DD."""
    return date.today().isoformat()


def choose(day: str) -> None:
    """Write this day, YYYY-MM-DD, from now on. Errors: ValueError for a text that is none."""
    _Day.chosen = date.fromisoformat(day)


def chosen() -> str:
    """The day that is written, as YYYY-MM-DD."""
    return _Day.chosen.isoformat()


def strftime_now(form: str) -> str:
    """The chosen day, at midnight, in a format of strftime: what transformers gives its templates under this name."""
    return datetime.combine(_Day.chosen, time()).strftime(form)
