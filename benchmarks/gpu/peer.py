"""20 steps of transformers on the tokens of train.py, with PEFT for the large shape and Liger where installed: python peer.py SHAPE.

The weights are those of treetune's side, and so is the first loss. Documents have equal lengths and are rows of one batch, which is what
packing would be with variable-length attention, without needing flash-attn.
"""

import contextlib
import sys
from importlib import metadata

import device
import harness
import shapes
import torch
from train import STEPS, WARM

from treetune.core import tree
from treetune.models import MODELS, hf_keys


def liger(family: str) -> str:
    """Put Liger's kernels into the modules of transformers; the version, or why not."""
    if device.DRY:
        return "none: a dry run"
    try:
        from liger_kernel import transformers as kernels
    except ImportError as error:
        return f"none: {error}"
    getattr(kernels, f"apply_liger_kernel_to_{family}")()
    return metadata.version("liger-kernel")


def module(name: str, lora: bool) -> torch.nn.Module:
    """The model of transformers with the weights of `shapes.model`, and PEFT's adapter with `lora`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    source = shapes.model(name)
    values = MODELS[source.family].to_hf(source.cfg) | {"use_cache": False}
    config = AutoConfig.for_model(**values)
    dtype = device.DTYPE if lora else torch.float32
    with device.DEVICE:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    weights = {hf_keys.hf_key(source.family, path): leaf for path, leaf in tree.items(source.params)}
    missing, unknown = model.load_state_dict(weights, strict=False)
    assert not unknown and set(missing) <= {"lm_head.weight"}, (missing, unknown)
    model.train()
    if not lora:
        return model
    from peft import LoraConfig, get_peft_model

    options = {"r": shapes.RANK, "lora_alpha": shapes.ALPHA, "lora_dropout": 0.0, "task_type": "CAUSAL_LM"}
    return get_peft_model(model, LoraConfig(target_modules="all-linear", **options))


def main(name: str) -> None:
    lora, label = name.startswith("llama"), f"{name}: transformers"
    with contextlib.redirect_stdout(sys.stderr):
        try:
            kernels = liger(shapes.SHAPES[name][0])
            model = module(name, lora)
        except ImportError as error:
            kernels = None
            reason = str(error)
    if kernels is None:
        device.report(label, skipped=reason)
        return
    trained = [leaf for leaf in model.parameters() if leaf.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=shapes.RATE, weight_decay=0.0, fused=True)
    mixed = contextlib.nullcontext() if device.DRY else torch.autocast("cuda", torch.bfloat16)
    losses = []

    def step(number: int) -> None:
        ids = torch.from_numpy(shapes.ids(number)).long().view(-1, shapes.DOCUMENT).to(device.DEVICE)
        with mixed:
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())

    seconds = device.step_seconds(step, steps=STEPS, warm=WARM)
    device.report(
        f"{label}{' + PEFT' * lora}", step_ms=1e3 * seconds, tokens_per_s=shapes.TOKENS / seconds, peak_gib=harness.peak_gib(),
        first_loss=losses[0].item(), last_loss=losses[-1].item(), liger=kernels, transformers=metadata.version("transformers"),
    )  # fmt: skip
    table, counts = device.profiled(lambda: step(STEPS))
    device.report(f"{label}: profile of a step", text=table, **counts)


if __name__ == "__main__":
    main(sys.argv[1])
