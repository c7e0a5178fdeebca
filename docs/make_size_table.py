"""Computes the table "Sizes: 7B to 70B" of docs/clusters.md from the memory plan.

    python docs/make_size_table.py [--check]

The table is written into the page between its two marks. With --check the page is only compared.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import transformers

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from gdrt_ds.config import RunConfig  # noqa: E402
from gdrt_ds.planning.memory_plan import estimate  # noqa: E402

PAGE = ROOT / "docs" / "clusters.md"
BEGIN = "<!-- sizes: written by docs/make_size_table.py -->"
END = "<!-- sizes end -->"
WORLDS = (1, 2, 4, 8, 16, 32)
CARD = 80 << 30
# hidden, intermediate, layers, heads, key-value heads, vocabulary: from the models' config.json
MODELS = {
    "7B (Llama-2)": (4096, 11008, 32, 32, 32, 32000),
    "8B (Llama-3)": (4096, 14336, 32, 32, 8, 128256),
    "13B (Llama-2)": (5120, 13824, 40, 40, 40, 32000),
    "34B (Yi)": (7168, 20480, 60, 56, 8, 64000),
    "70B (Llama-3)": (8192, 28672, 80, 64, 8, 128256),
}
SETTINGS = RunConfig(
    model={
        "dtype": "bfloat16",
        "gradient_checkpointing": True,
        "lora": {"r": 8, "targets": ["q_proj", "v_proj"]},
    },
    train={"micro_batch": 4, "global_batch": 128},
    prompt={"max_length": 512},
)


def model_config(sizes: tuple[int, ...]) -> transformers.LlamaConfig:
    hidden, intermediate, layers, heads, key_value_heads, vocabulary = sizes
    return transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        vocab_size=vocabulary,
    )


def table() -> str:
    """Returns the Markdown table: GiB per GPU for every model and number of GPUs."""
    lines = [
        "| model | base, whole | " + " | ".join(f"{world} GPU" for world in WORLDS) + " |",
        "|---|" + "---|" * (len(WORLDS) + 1),
    ]
    for name, sizes in MODELS.items():
        config = model_config(sizes)
        plans = {world: estimate(SETTINGS, config, world, CARD) for world in WORLDS}
        whole = plans[1].parts["base weights"] / 2**30
        cells = " | ".join(f"{plan.peak_bytes / 2**30:.1f}" for plan in plans.values())
        lines.append(f"| {name} | {whole:.1f} GiB | {cells} |")
    return "\n".join(lines)


def page_with(text: str) -> str:
    """Returns the page with the table between its marks."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    wanted = page_with(table())
    if options.check:
        return int(wanted != PAGE.read_text(encoding="utf-8"))
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
