"""An adapter that was trained on a quantised base, loaded by PEFT over the base that bitsandbytes quantises: equal logits."""

import pytest
import torch

from treetune.core import lora, tree
from treetune.core.quant import Scheme
from treetune.models import families, hf, loading, policy

peft = pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
IDS = list(range(3, 40))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small llama whose rows are whole blocks: bitsandbytes' kernel for CPUs is wrong for other even widths."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = dict(vocab_size=80, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    model = LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.08, bos_token_id=None, eos_token_id=None))
    folder = tmp_path_factory.mktemp("base")
    model.bfloat16().save_pretrained(folder)  # as most models are
    return folder


def trained(base, scheme, dtype, folder):
    """An adapter away from its start on the quantised model, saved; the logits of both."""
    loaded, _ = loading.load_model(base, dtype=dtype, device=torch.device("cpu"), scheme=scheme)
    start = policy.adapt(loaded, policy.AdapterSpec(rank=4, alpha=8), base=loading.identify_base(str(base), loaded, scheme), seed=0)
    generator = torch.Generator().manual_seed(1)
    moved = tree.map(lambda leaf: leaf + 0.1 * torch.randn(leaf.shape, generator=generator), start.params["lora"])
    start = start._replace(params={"lora": moved})
    policy.save(start, folder)
    model, low = policy.current(start)
    return families.document_logits(model, torch.tensor(IDS), lora=low)


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-4), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_logits_over_a_base_of_bitsandbytes(base, tmp_path, kind, dtype, limit):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    ours = trained(base, Scheme(kind), dtype, tmp_path / "adapter")
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=loading.DTYPES[dtype]
    )
    quantised = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=loading.DTYPES[dtype])
    model = peft.PeftModel.from_pretrained(quantised, tmp_path / "adapter").eval()
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor([IDS])).logits[0].float()
    apart = (ours - theirs).abs()
    # Of bfloat16 the mean: it holds a logit of 2 to 0.008 itself.
    assert (apart.max() if dtype == "float32" else apart.mean()).item() <= limit
    assert theirs.std() > 0.1


def test_the_adapter_matters(base, tmp_path):
    ours = trained(base, Scheme("nf4"), "float32", tmp_path / "adapter")
    plain = families.document_logits(hf.load(base, scheme=Scheme("nf4")), torch.tensor(IDS))
    assert (ours - plain).abs().max() > 0.05 and lora.ALL_LINEAR == "all-linear"
