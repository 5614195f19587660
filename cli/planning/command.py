"""`treetune plan`: what a run of a config would take on devices, before anything is loaded."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from treetune.cli.methods.method import Method, resolve

HELP = "say what a run would take, and on which device it fits: treetune plan run.yaml"
USAGE = """usage: treetune plan FILE|METHOD [--on DEVICE ...] [--nproc N] [--memory SIZE] [options of the method]

Say from a config alone what its run would take: the peak of its memory and the time of a step, by term, on this machine and on others.
Nothing is loaded, fetched or written but a config.json. FILE is one of `treetune train`; flags win over it.

  --on DEVICE ...   h200, h100, a100-80, a100-40, 4090, l4 or cpu: terms on these devices; without it one line for each device
  --nproc N         devices that share the run; with --sharding full each holds a part of what trains
  --memory SIZE     memory of the device instead of its own, such as 24GiB
  --json            figures in bytes and seconds, as JSON"""
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]i?b?)?", re.IGNORECASE)
JOINED = "--on=", "--memory="
UNITS = {"k": 10, "m": 20, "g": 30, "t": 40}


class Asked(NamedTuple):
    """What the command was asked. devices: names, none for all. memory: bytes of a device, None for its own."""

    devices: tuple[str, ...] = ()
    memory: int | None = None
    as_json: bool = False


def take(argv: Sequence[str]) -> tuple[Asked, list[str]]:
    """The arguments of the command itself, and the others. Errors: ValueError for a value that none of them takes."""
    devices, memory, as_json, rest = [], None, False, list[str]()
    words = [part for arg in argv for part in (arg.split("=", 1) if arg.startswith(JOINED) else [arg])]
    while words:
        word = words.pop(0)
        if word == "--on":
            while words and not words[0].startswith("-"):
                devices += [name for name in words.pop(0).split(",") if name]
            if not devices:
                raise ValueError("--on needs the name of a device, such as h100")
        elif word == "--memory":
            memory = size_of(words.pop(0) if words else "")
        elif word == "--json":
            as_json = True
        else:
            rest.append(word)
    return Asked(tuple(devices), memory, as_json), rest


def size_of(text: str) -> int:
    """Bytes that a text such as 24GiB says; a number alone is of GiB. Errors: ValueError for any other."""
    match = SIZE.fullmatch(text.strip())
    if match is None or float(match[1]) == 0:
        raise ValueError(f"--memory is {text!r}; expected a size such as 24GiB")
    unit = (match[2] or "gib").lower()
    return int(float(match[1]) * (2 ** UNITS[unit[0]] if "i" in unit or len(unit) == 1 else 1000 ** (UNITS[unit[0]] // 10)))


def run(asked: Asked, config: Any, method: Method) -> int:
    """Print the plan of a config; the exit code, 0 whether it fits or not."""
    from treetune.cli.planning import advice, estimate, words
    from treetune.cli.screen import Screen
    from treetune.core.run.errors import checking_input
    from treetune.models import describe, devices

    screen, method = Screen(), resolve(method, config)
    with checking_input():
        path = _model(config, screen)
        family, cfg = describe.read_sizes(path)
        this = estimate.Run(method, config, family, cfg)
        chosen = [devices.named(name) for name in asked.devices or devices.NAMES]
        chosen = [one if asked.memory is None else one._replace(memory=asked.memory) for one in chosen]
        places = [estimate.place(one, config.run) for one in chosen]
        with screen.busy("counting a step"):
            counts = {kind: estimate.counted(this, one) for kind, one in {one.device.gpu: one for one in places}.items()}
        plans = [(place, estimate.estimate(this, counts[place.device.gpu], place)) for place in places]
    tokens = next(iter(counts.values())).tokens
    if not asked.as_json:
        screen.line(words.title(method.name, config, Path(config.model.model).name or config.model.model, tokens))
        screen.grid(*(words.terms(plans) if asked.devices else (words.HEADER, words.grid(plans))))
        for place, one in plans if asked.devices else ():
            screen.line(words.line(one, place), "green" if words.verdict(one, place) == "fits" else "yellow")
    changes = []
    if lacking := bool(asked.devices) and words.verdict(plans[0][1], places[0]) == "does not fit":
        with checking_input(), screen.busy("looking for what fits"):
            changes = advice.advise(this, places[0])
    if asked.as_json:
        print(json.dumps({"plan": [_figures(place, one) for place, one in plans], "advice": [_option(one) for one in changes]}, indent=1))
        return 0
    for text in words.advice(changes) if lacking else ():
        screen.line(text)
    screen.line("estimates: memory of tensors, time from rates of data sheets (docs/planning.md); nothing was loaded", "dim")
    return 0


def _figures(place: Any, one: Any) -> dict[str, Any]:
    figures = {"device": place.device.name, "ranks": place.ranks, "room": place.device.room, "peak": one.peak, "memory": one.memory}
    return figures | {"step_seconds": one.step, "seconds": one.seconds, "tokens": one.tokens}


def _option(one: Any) -> dict[str, Any]:
    return {"flags": one.change.flags, "peak": one.estimate.peak, "step_seconds": one.estimate.step}


def _model(config: Any, screen: Any) -> Path:
    """The folder, or the file, with the sizes of the model; of a hub id only small files are fetched."""
    from treetune.models import fetch, hf

    shape = getattr(config.model, "from_config", None)
    if shape is not None:
        return Path(shape) if Path(shape).is_dir() else Path(shape).parent
    name = config.model.model
    if (path := fetch.here(name)) is not None:
        return path
    known = fetch.known_name(name)
    hub_id = fetch.MODELS[known].hub_id if known else name
    fetch.check(hub_id)
    if not fetch.cached(hub_id) and not fetch.reachable(hub_id):
        raise ValueError(f"{name} is not on this machine, and the hub cannot be reached for its config.json: name a folder that holds one")
    screen.line(f"reading the config.json of {hub_id} from the hub")
    return hf.fetch(hub_id, revision=config.model.revision, weights=False)
