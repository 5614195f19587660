"""The training commands: one file a method. Importing this imports no torch."""

from treetune.cli.methods import cpo, dpo, ebft, grpo, kto, orpo, pretrain, prm, reward, sft, simpo
from treetune.cli.methods.method import Method, resolve
from treetune.core import import_path

_FILES = (sft, pretrain, dpo, kto, orpo, simpo, cpo, reward, prm, grpo, ebft)
METHODS: dict[str, Method] = {file.METHOD.name: file.METHOD for file in _FILES}
CONFIGS: dict[type, Method] = {method.config: method for method in METHODS.values()}


def register(method: Method) -> Method:
    """Add a method from outside of this folder to the commands: `register(METHOD)` before `main` runs.

    Errors: ValueError for what is no method, and for the name or the config class of another; a file that runs anew replaces its own.
    """
    if not isinstance(method, Method):
        raise ValueError(f"{method!r:.80} is no method; expected a treetune.cli.methods.method.Method, as METHOD in cli/methods/sft.py")
    same = METHODS.get(method.name, method)
    if (same.config.__module__, same.config.__qualname__) != (method.config.__module__, method.config.__qualname__):
        raise ValueError(f"there is a method {method.name} already; give yours another name")
    if CONFIGS.get(method.config, method).name != method.name:
        raise ValueError(f"{method.config.__name__} is the config of {CONFIGS[method.config].name}; give {method.name} a class of its own")
    METHODS[method.name] = CONFIGS[method.config] = method
    return method


def load(path: str) -> Method:
    """The method at an import path such as mine.py:METHOD, as one of the commands. Errors: ValueError where there is none."""
    method = import_path.load_object(path, "method")
    try:
        return register(method)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def of_config(config: object) -> Method:
    """The method whose config this is, as its options make it. Errors: ValueError for a config of another kind."""
    method = CONFIGS.get(type(config))
    if method is None:
        raise ValueError(
            f"{type(config).__name__} is no config of a method; expected one of {', '.join(kind.__name__ for kind in CONFIGS)}"
        )
    return resolve(method, config)
