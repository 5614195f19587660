"""An engine on two stand-ins for servers. argv: folder, their addresses, axes of the mesh; each rank writes what it drew to rankI.json."""

import importlib.util
import json
import sys
from functools import partial
from pathlib import Path

import torch

from treetune.cli.options import meshes
from treetune.core.rollout import engine, vllm
from treetune.core.run import ranks as processes
from treetune.core.state import TrainState

spec = importlib.util.spec_from_file_location("fake_vllm", Path(__file__).parents[1] / "core" / "rollout" / "fake_vllm.py")
fake_vllm = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fake_vllm)
IDS = [[3, 1], [4]]


class Words:
    def decode(self, ids, skip_special_tokens=True):
        return " ".join(map(str, ids))


def state(step: int) -> TrainState:
    return TrainState({"lora": {"A": torch.full((1,), 0.1 * step)}}, {}, {}, {}, torch.tensor(step))


def save(at: TrainState, trained: dict, folder: Path) -> None:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"number": float(at.params["lora"]["A"]), "r": 8}))


def run(folder: Path, urls: list[str], axes: str) -> None:
    ranks = processes.join_ranks(torch.device("cpu"), meshes.read((axes,)))
    server = ranks.row_rank % len(urls)
    settings = engine.EngineSettings(
        urls[server],
        "tiny",
        ("models/tiny",),
        fake_vllm.VOCAB,
        64,
        folder / "engine",
        (5, 6),
        "float32",
        5.0,
        servers=len(urls),
        server=server,
    )
    expected = lambda at, tokens: fake_vllm.logps(tokens, float(at.params["lora"]["A"]))  # noqa: E731
    calls = {"save": save, "prompt_logprobs": expected, "base_logprobs": fake_vllm.logps}
    made = engine.VllmEngine(settings, vllm.SamplingParams(stop_ids=[2]), Words(), **calls, ranks=ranks)
    made.start(state(0))
    made.after_step(state(1), {}, 1)
    draw = partial(made.draw, None, IDS, [2 * ranks.row_rank, 2 * ranks.row_rank + 1], n=2)
    drawn, told = draw(max_tokens=6), made.metrics()
    made.sync = engine.Followed("gone")
    try:
        draw(max_tokens=6)
        error = ""
    except (ValueError, engine.RunFailed) as found:
        error = str(found)
    made.close()
    tokens = [[one.tokens.tolist() for one in group] for group in drawn.completions]
    result = {"row_rank": ranks.row_rank, "tokens": tokens, "version": drawn.version, "told": told, "error": error}
    (folder / f"rank{ranks.rank}.json").write_text(json.dumps(result))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), sys.argv[2:4], sys.argv[4])
