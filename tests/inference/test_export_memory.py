"""The export of a model in shards takes the memory of about one shard, whatever the number of shards."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from gdrt_ds.config import RunConfig, dump_config
from gdrt_ds.models.built_in import make_tiny_model

pytestmark = pytest.mark.slow

MEASURE = """
import json, sys
from pathlib import Path
import torch
import bitsandbytes, peft, transformers.models.llama.modeling_llama
from gdrt_ds.inference.exporting import export

def memory(what):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))

def peak_of(work):
    before = memory("VmRSS:")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    done = work()
    return memory("VmHWM:") - before, done

run, output = map(Path, sys.argv[1:3])
torch.set_num_threads(1)
results = {}
for base in ("plain", "trained"):
    peak, done = peak_of(lambda: export(run, output / base, base=base, shard_size="64MB"))
    results[base] = {"peak": peak, **done}
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on a Llama of five shards, 276 MB in float32, whose adapter is on every linear layer."""
    folder = tmp_path_factory.mktemp("large")
    tokenizer = AutoTokenizer.from_pretrained(make_tiny_model(folder / "words", ["Alien", "Brazil"], 0))
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=4,
        num_attention_heads=8,
        pad_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder / "base", max_shard_size="64MB")
    tokenizer.save_pretrained(folder / "base")
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    adapted.peft_config["default"].base_model_name_or_path = str(folder / "base")
    adapted.save_pretrained(folder / "run" / "adapter", save_embedding_layers=False)
    settings = RunConfig(model={"path": str(folder / "base"), "dtype": "float32"})
    (folder / "run" / "config.yaml").write_text(dump_config(settings))
    return folder / "run"


def test_the_peak_is_below_one_and_a_half_of_the_largest_shard(run, tmp_path):
    found = subprocess.run(
        [sys.executable, "-c", MEASURE, str(run), str(tmp_path)], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    results = json.loads(found.stdout.splitlines()[-1])
    for base, done in results.items():
        shards = [file.stat().st_size for file in (tmp_path / base).glob("model-*.safetensors")]
        assert len(shards) >= 4
        assert done["merged"] == "tensor by tensor" and done["check"] == "computed layer by layer"
        assert done["peak"] < 1.5 * max(shards), (base, done["peak"], max(shards))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert torch.isfinite(merged(torch.arange(3, 9)[None]).logits).all()
