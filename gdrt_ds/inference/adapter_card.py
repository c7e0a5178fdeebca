"""The README.md of an adapter that is published: base, data, objective, group figures and limits.

It states what the run folder records, and nothing about the machine that the run was made on: paths are cut
to their last part. The front matter is that of the Hugging Face hub, figures included.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gdrt_ds.config import RunConfig
from gdrt_ds.inference.model_card import (
    NF4_LOADING,
    PLAIN_LOADING,
    metric_table,
    own_evaluation,
    read_json,
    recorded,
    trained_dtype,
)
from gdrt_ds.inference.public_names import public_path, public_settings
from gdrt_ds.inference.row_model import is_row_run
from gdrt_ds.models.quantization import get_quantization, storage_dtype
from gdrt_ds.models.source import dtype_name

IN_INDEX = ("ndcg@10", "hr@10", "mrr", "nll", "mgu@10", "dgu@10")
"""Metrics that the hub shows beside the model; the card has all of them."""


@dataclass(frozen=True)
class Adapter:
    """What a card says about an adapter.

    Attributes:
        run: the run folder.
        config: its resolved config.
        base: the base as others name it: on the hub, or the last part of its folder.
        name: the adapter as others name it: on the hub, or the run's name.
    """

    run: Path
    config: RunConfig
    base: str
    name: str

    @property
    def on_rows(self) -> bool:
        """Whether the run is on rows of prompt and completion, which have no catalogue."""
        return is_row_run(self.run)


def adapter_card(about: Adapter) -> str:
    """Returns the text of README.md."""
    summary = read_json(about.run / "summary.json")
    results = own_evaluation(about.run, about.config) or {}
    lines = [
        front_matter(about, results),
        *_what_it_is(about),
        *_loading(about, summary),
        *_data(about, summary, results),
        *_objective(about),
        *_groups(about, summary, results),
        *_metrics(about, results),
        *_limits(about, results),
        *_settings(about, summary),
    ]
    return "\n".join(lines)


def front_matter(about: Adapter, results: dict[str, Any]) -> str:
    """Returns the YAML that the hub reads, between its lines of dashes."""
    from huggingface_hub import EvalResult, ModelCardData

    figures = []
    for name in IN_INDEX:
        value = (results.get("metrics") or {}).get(name, {}).get("value")
        if value is not None:
            figures.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type="text" if about.on_rows else "recommendation",
                    dataset_name=public_path(about.config.data.path, about.run, about.config),
                    dataset_split=results.get("split"),
                    metric_type=name,
                    metric_value=round(float(value), 6),
                )
            )
    data = ModelCardData(
        base_model=about.base,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=[*([] if about.on_rows else ["recommendation"]), "gdrt", "lora", about.config.objective],
        model_name=about.name,
        eval_results=figures or None,
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _what_it_is(about: Adapter) -> list[str]:
    kind = "recommender"
    answers = (
        "Asked with a user's history, the model answers with the title of the next item of its catalogue."
    )
    if about.on_rows:
        kind = "model"
        answers = "Asked with a prompt like those of its data, the model answers with a completion."
    files = [
        "| `adapter_model.safetensors`, `adapter_config.json` | the adapter |",
        "| `tokenizer*` | the tokenizer of training |",
    ]
    if (about.run / "prompt.json").is_file():
        files.append("| `prompt.json` | the prompt; other prompts were not trained |")
    if (about.run / "catalogue.jsonl").is_file():
        files.append(
            "| `catalogue.jsonl`, `catalogue_trie.safetensors` | the titles, their tokens as a tree |"
        )
    return [
        f"# {about.name}: a {about.config.objective} {kind} on {about.base}",
        "",
        f"A LoRA adapter (PEFT) for `{about.base}`, trained by gdrt_ds with the objective "
        f"`{about.config.objective}`. {answers}",
        "",
        "| file | what it is |",
        "|---|---|",
        *files,
        "",
    ]


def _loading(about: Adapter, summary: dict[str, Any]) -> list[str]:
    model = about.config.model
    dtype = trained_dtype(model, summary)
    form = get_quantization(model.quantization).describe(model, dtype).removeprefix("base: ")
    revision = f", revision `{model.revision}`" if model.revision else ""
    place = repr(about.base) + (f", revision={model.revision!r}" if model.revision else "")
    names = {"base": place, "adapter": repr(about.name), "dtype": dtype_name(dtype)}
    if model.quantization == "nf4":
        storage = dtype_name(storage_dtype(model))
        code = NF4_LOADING.format(**names, double_quant=model.double_quant, storage=storage)
    else:
        code = PLAIN_LOADING.format(**names)
    return [
        "## Base",
        "",
        f"Trained on `{about.base}`{revision}, held as {form}. Fingerprint of this base: "
        f"{recorded(summary.get('base_fingerprint'))}.",
        "",
        "```python",
        code.rstrip(),
        "```",
        "",
    ]


def _data(about: Adapter, summary: dict[str, Any], results: dict[str, Any]) -> list[str]:
    data = about.config.data
    key = results.get("scoring_key") or {}
    fingerprint = summary.get("data_fingerprint") or key.get("corpus")
    samples = f" {summary['samples']} samples were read in training." if summary.get("samples") else ""
    names = [public_path(path, about.run, about.config) for path in data.mixture or [data.path]]
    what = ", ".join(f"`{name}`" for name in names)
    what += ": rows of prompt and completion." if about.on_rows else f", split by {data.split}."
    holds = "the titles of the catalogue, and nothing about users"
    if about.on_rows:
        holds = "none of these rows"
    return [
        "## Data",
        "",
        f"{what} Fingerprint of the data: {recorded(fingerprint)}.{samples} This folder holds {holds}.",
        "",
    ]


def _objective(about: Adapter) -> list[str]:
    config = about.config
    text = f"`{config.objective}`"
    if "dro" in config.objective or "gdrt" in config.objective:
        text += f", tau {config.dro.tau:g}: groups of tokens with a larger loss weigh more"
    return [
        "## Objective",
        "",
        f"{text}. {config.train.max_steps or 'All'} steps, seed {config.train.seed}.",
        "",
    ]


def _groups(about: Adapter, summary: dict[str, Any], results: dict[str, Any]) -> list[str]:
    """Loss of each group of training, and the slices of the evaluation by the same groups."""
    groups = read_json(about.run / "groups.json")
    lines = ["## Groups", ""]
    names = groups.get("names")
    if not names:
        lines += ["The run records no groups.", ""]
    else:
        losses = _group_losses(about.run, summary)
        lines += [
            f"Target tokens are grouped by {groups.get('by')}. Losses are means per target token of "
            "the validation "
            "split, in nats, at the step of this adapter.",
            "",
            "| group | target tokens in train | validation loss |",
            "|---|---|---|",
        ]
        for place, name in enumerate(names):
            count = groups["counts"][place]
            lines.append(f"| {name} | {count:,} | {_number(losses[place] if losses else None)} |")
        lines.append("")
    slices = ((results.get("breakdowns") or {}).get("relevance_group") or {}).get("groups") or {}
    if slices:
        lines += [
            "Test samples by the relevance of their target (0 is least tied to the prompt):",
            "",
            "| relevance group | n | NDCG@10 | NLL |",
            "|---|---|---|---|",
        ]
        for name, figures in slices.items():
            ndcg = figures.get("ndcg@10") or {}
            nll = (figures.get("nll") or {}).get("value")
            lines.append(f"| {name} | {ndcg.get('n', '')} | {_number(ndcg.get('value'))} | {_number(nll)} |")
        lines.append("")
    return lines


def _group_losses(run: Path, summary: dict[str, Any]) -> list[float | None] | None:
    """Losses of the groups at the validation whose weights the adapter holds; None if there is none."""
    file = run / "validation.jsonl"
    if not file.is_file():
        return None
    step = summary.get("adapter_step")
    chosen = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # a killed run left half a line
            continue
        if isinstance(row, dict) and row.get("step") == step:
            chosen.append(row)
    if not chosen:
        return None
    return chosen[-1].get("group_loss")


def _metrics(about: Adapter, results: dict[str, Any]) -> list[str]:
    if not results:
        return ["## Metrics", "", "This adapter was not evaluated as a whole.", ""]
    what = f"{results.get('num_samples')} samples, {results.get('num_items')} titles, all of them scored"
    over = " over users"
    if about.on_rows:
        what, over = f"{results.get('num_samples')} rows, scored over the vocabulary", ""
    lines = [
        "## Metrics",
        "",
        f"Split {results.get('split')}, {what}. Intervals are 95 %{over}.",
        "",
    ]
    return [*lines, *metric_table(results), ""]


def _limits(about: Adapter, results: dict[str, Any]) -> list[str]:
    scope = (
        "It recommends titles of its catalogue, asked with the prompt of `prompt.json`. Other titles, "
        "prompts and languages were neither trained nor measured."
    )
    if about.on_rows:
        scope = (
            "It completes prompts like those of its data, in the form of `prompt.json`. Other tasks, prompts "
            "and languages were neither trained nor measured."
        )
    lines = [
        "## Limits",
        "",
        f"- {scope}",
        "- The figures are of one run with one seed, on the data named above. They say nothing about others.",
        "- Groups are groups of *tokens*. The objective makes no promise about groups of people; where the "
        "data name such groups, the evaluation's breakdowns measure them.",
    ]
    if not about.on_rows:
        lines.append(
            "- Recommendations can follow popularity, genre and the base model's own knowledge of titles. "
            "The audits of gdrt_ds measure that."
        )
    lines.append("- The licence and the limits of the base model apply.")
    kind = about.config.model.quantization.upper()
    if kind != "NONE":
        lines.append(
            f"- The adapter was fitted to the {kind} weights of the base, rounding errors included. "
            "On unquantised "
            "weights its scores are other ones."
        )
    audits = results.get("audits") or {}
    for audit in audits.values():
        if audit.get("finding"):
            lines.append(f"- Audit, {audit.get('title', '')}: {audit['finding']}")
    if results and not audits:
        lines.append("- No audit was made with this evaluation.")
    return [*lines, ""]


def _settings(about: Adapter, summary: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in (summary.get("versions") or {}).items())
    text = yaml.safe_dump(public_settings(about.config, about.run), sort_keys=False)
    lines = ["## Settings", ""]
    if versions:
        lines += [versions, ""]
    return [*lines, "```yaml", text.rstrip(), "```", ""]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
