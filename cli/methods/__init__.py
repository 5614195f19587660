"""The training commands: one file a method. Importing this imports no torch."""

from treetune.cli.methods import cpo, dpo, ebft, grpo, kto, orpo, pretrain, prm, reward, sft, simpo
from treetune.cli.methods.method import Method

_FILES = (sft, pretrain, dpo, kto, orpo, simpo, cpo, reward, prm, grpo, ebft)
METHODS: dict[str, Method] = {file.METHOD.name: file.METHOD for file in _FILES}
CONFIGS: dict[type, Method] = {method.config: method for method in METHODS.values()}
