"""Draws docs/figures/method.png: one prompt, its target tokens, their groups and their weights.

    python docs/figures/method_picture.py              # draws from docs/figures/method.json
    python docs/figures/method_picture.py --measure    # computes that file with SmolLM2-135M first (a minute)

Every number is computed, none is invented. The relevance and the loss of each target token come from
the untuned SmolLM2-135M-Instruct. The groups are four equal shares of the tokens. The weights follow the
method's closed form, with this one sample as the whole batch. A training does the same over all samples of
a step.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from gdrt_ds.files import write_json

FOLDER = Path(__file__).parent
HISTORY = ("Toy Story (1995)", "Babe (1995)", "James and the Giant Peach (1996)")
TARGET = "A Close Shave (1995)"
NUM_GROUPS = 4
TAU = 3.0
COLOURS = ("#b2182b", "#ef8a62", "#92c5de", "#4393c3")  # group 0 (the prompt predicts it worst) ... group 3


def measure() -> dict:
    """Scores the target behind the prompt with and without the history; see the module's docstring."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from gdrt_ds.config import PromptSection
    from gdrt_ds.data.templates import PromptTemplate
    from gdrt_ds.models.built_in import smollm2_folder

    folder = smollm2_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    template = PromptTemplate.from_config(PromptSection(), "movie", tokenizer)

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    head = ids(template.before_instruction) + ids(template.instruction) + ids(template.before_history)
    tail = ids(template.after_history)
    items = [template.item_format.format(title=title) for title in HISTORY]
    history = ids(template.separator.join(items))
    target = ids(template.target_format.format(title=TARGET)) + [tokenizer.eos_token_id]

    def losses(prompt: list[int]) -> np.ndarray:
        rows = torch.tensor([prompt + target])
        with torch.no_grad():
            logits = model(rows).logits[0, len(prompt) - 1 : -1].double()
        return torch.nn.functional.cross_entropy(logits, torch.tensor(target), reduction="none").numpy()

    relevance = -losses(head + tail)
    loss = losses(head + history + tail)
    order = np.argsort(np.argsort(relevance))
    groups = order * NUM_GROUPS // len(target)
    group_loss = np.array([loss[groups == g].mean() for g in range(NUM_GROUPS)])
    share = np.bincount(groups, minlength=NUM_GROUPS) / len(target)
    weights = share * np.exp(group_loss / TAU)
    weights /= weights.sum()
    return {
        "instruction": template.instruction.strip(),
        "history": [item.strip() for item in items],
        "tokens": [tokenizer.decode([token]) for token in target],
        "relevance": relevance.round(3).tolist(),
        "loss": loss.round(3).tolist(),
        "group": groups.tolist(),
        "group_loss": group_loss.round(3).tolist(),
        "token_share": share.round(3).tolist(),
        "group_weight": weights.round(3).tolist(),
        "tau": TAU,
    }


def draw_prompt(axes, found: dict) -> None:
    """The prompt's parts as boxes of text."""
    axes.axis("off")
    instruction = "\n".join(_wrapped(found["instruction"], 50))
    parts = (
        (0.0, "instruction and template", instruction, "#eeeeee"),
        (0.47, "history of the user", ",\n".join(found["history"]), "#d9ead3"),
        (0.80, "target", f'"{TARGET}"', "#fff2cc"),
    )
    for left, title, text, colour in parts:
        axes.text(left, 1.0, title, fontsize=10, weight="bold", va="top")
        box = {"facecolor": colour, "edgecolor": "#888888", "boxstyle": "round,pad=0.5"}
        axes.text(left + 0.012, 0.68, text, fontsize=9, va="top", family="monospace", bbox=box)


def draw_tokens(axes, found: dict) -> None:
    """A bar per target token: how well the prompt without the history predicts it, coloured by group."""
    places = np.arange(len(found["tokens"]))
    colours = [COLOURS[group] for group in found["group"]]
    axes.bar(places, found["relevance"], color=colours, width=0.75)
    axes.axhline(0, color="black", linewidth=0.8)
    labels = [token.strip() or "␣" for token in found["tokens"]]
    labels = ["end" if label.startswith("<|") else label for label in labels]
    axes.set_xticks(places, labels, family="monospace", fontsize=10)
    axes.xaxis.tick_top()
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel("log p(token | prompt\nwithout the history)")
    axes.spines[["right", "bottom", "top"]].set_visible(False)
    for group, colour in enumerate(COLOURS):
        axes.bar(0, 0, color=colour, label=f"group {group}")
    axes.legend(loc="lower right", frameon=False, ncols=4, fontsize=9)


def draw_weights(axes, found: dict) -> None:
    """Weight of every group under SFT (its share of the tokens) and under GDRT."""
    places = np.arange(NUM_GROUPS)
    axes.bar(places - 0.2, found["token_share"], 0.36, color="#bbbbbb", label="SFT: share of the tokens")
    axes.bar(places + 0.2, found["group_weight"], 0.36, color=COLOURS)
    axes.bar(0, 0, color="#b2182b", label=f"GDRT, tau {found['tau']:g}")
    for place, weight in zip(places, found["group_weight"], strict=True):
        axes.text(place + 0.2, weight + 0.015, f"{weight:.2f}", ha="center", fontsize=9)
    names = [f"group {g}\nloss {loss:.1f}" for g, loss in enumerate(found["group_loss"])]
    axes.set_xticks(places, names, fontsize=9)
    axes.set_ylim(0, max(found["group_weight"]) * 1.15)
    axes.set_ylabel("weight in the loss")
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["right", "top"]].set_visible(False)


def _wrapped(text: str, width: int) -> list[str]:
    import textwrap

    return [line for part in text.splitlines() for line in textwrap.wrap(part, width)]


def draw(found: dict, path: Path) -> None:
    """Three rows: the prompt, its target tokens with their groups, the groups' weights."""
    figure = plt.figure(figsize=(11, 7.6), dpi=150)
    rows = figure.add_gridspec(3, 1, height_ratios=(1.0, 1.35, 1.35), hspace=0.62)
    titles = (
        "1  A training sample: what the user liked, and the title to be predicted",
        "2  Each target token is scored by the prompt alone; similar scores form a group",
        "3  Groups with a high loss get more weight than their share of the tokens",
    )
    drawers = (draw_prompt, draw_tokens, draw_weights)
    for row, (title, drawer) in enumerate(zip(titles, drawers, strict=True)):
        axes = figure.add_subplot(rows[row])
        axes.set_title(title, loc="left", fontsize=12, weight="bold", pad=24 if row == 1 else 14)
        drawer(axes, found)
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


def main(argv: list[str]) -> None:
    numbers = FOLDER / "method.json"
    if "--measure" in argv:
        write_json(numbers, measure())
    found = json.loads(numbers.read_text(encoding="utf-8"))
    draw(found, FOLDER / "method.png")
    print(f"wrote {FOLDER / 'method.png'}")


if __name__ == "__main__":
    main(sys.argv[1:])
