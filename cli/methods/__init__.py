"""The training commands: one file a method. Importing this imports no torch."""

from treetune.cli.methods import cpo, dpo, ebft, grpo, kto, orpo, pretrain, prm, reward, sft, simpo
from treetune.cli.methods.method import Method, resolve

_FILES = (sft, pretrain, dpo, kto, orpo, simpo, cpo, reward, prm, grpo, ebft)
METHODS: dict[str, Method] = {file.METHOD.name: file.METHOD for file in _FILES}
CONFIGS: dict[type, Method] = {method.config: method for method in METHODS.values()}


def of_config(config: object) -> Method:
    """The method whose config this is, as its options make it. Errors: ValueError for a config of another kind."""
    method = CONFIGS.get(type(config))
    if method is None:
        raise ValueError(
            f"{type(config).__name__} is no config of a method; expected one of {', '.join(kind.__name__ for kind in CONFIGS)}"
        )
    return resolve(method, config)
