"""`treetune pretrain`: every token of raw text is supervised, from a model's weights or from random ones."""

from pathlib import Path

from treetune.cli import method, setup, training
from treetune.cli.methods.pretrain import Pretrain
from treetune.core import fields, tree
from treetune.models import hf


def run(config: Pretrain, given: frozenset[str]) -> int:
    """Pretrain and leave a run folder; the exit code."""
    return training.train("pretrain", config, given, method.SUPERVISED, lambda on: _model(config, on))


def _model(config: Pretrain, on):
    options = config.model
    if options.from_config is None:
        return setup.load_model(options, on=on)[0]
    path = Path(options.from_config)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"config file {file} does not exist")
    with fields.reading(file):
        family, _ = hf.read_config(file)
        model = hf.random(family, file, seed=config.optim.seed, dtype=setup.compute_dtype(options.dtype, on))
    return model._replace(params=tree.map(lambda leaf: leaf.to(on), model.params))
