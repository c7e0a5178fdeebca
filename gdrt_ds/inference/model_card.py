"""The README.md of an exported model: what it is, how to load it, from what, and with which figures.

A card states only what the run folder records. Its figures are those of the newest full evaluation of this
very adapter on the base as trained, with the data and the prompt of the run: evaluations of the base model,
of another adapter or on another base, of other histories, of a part of the samples (--limit) and by a search
are passed over.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gdrt_ds.config import ModelSection, RunConfig
from gdrt_ds.files import sha256_of
from gdrt_ds.inference.row_model import is_row_run
from gdrt_ds.models.fingerprint import base_fingerprint
from gdrt_ds.models.quantization import get_quantization, storage_dtype
from gdrt_ds.models.source import compute_dtype, dtype_name

# Settings that an evaluation may be given and that change what is asked.
THE_SAME_WINDOWS = {
    "data": ("limit_test", "history_length", "min_history"),
    "prompt": ("history", "max_length"),
}

NF4_LOADING = """\
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

nf4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant={double_quant},
    bnb_4bit_compute_dtype=torch.{dtype},
    bnb_4bit_quant_storage=torch.{storage},
)
base = AutoModelForCausalLM.from_pretrained(
    {base}, quantization_config=nf4, dtype=torch.{dtype}, use_safetensors=True
)
# On CPUs with AVX512-BF16, bitsandbytes repacks the weights at their first use and rounds their scales.
for module in base.modules():
    if hasattr(module, "support_avx512bf16_for_cpu"):
        module.support_avx512bf16_for_cpu = False
model = PeftModel.from_pretrained(base, {adapter}, autocast_adapter_dtype=False)
"""

PLAIN_LOADING = """\
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({base}, dtype=torch.{dtype}, use_safetensors=True)
model = PeftModel.from_pretrained(base, {adapter}, autocast_adapter_dtype=False)
"""

OWN_LOADING = """\
from gdrt_ds import open_run
from gdrt_ds.runtime import single_process_runtime

model = open_run({run}, single_process_runtime()).loaded.model
"""


@dataclass(frozen=True)
class Export:
    """What is known about an exported model when its card is written.

    Attributes:
        run: the run folder.
        config: its resolved config.
        base: "plain" or "trained", see `exporting.export`.
        dtype: dtype of the stored weights.
        difference: largest difference of a logit to base + adapter, found when the export was checked.
        largest: the largest absolute logit of that check.
    """

    run: Path
    config: RunConfig
    base: str
    dtype: torch.dtype
    difference: float
    largest: float

    @property
    def dtype_name(self) -> str:
        return dtype_name(self.dtype)

    @property
    def quantised(self) -> bool:
        """Whether the adapter was trained on a quantised base."""
        return self.config.model.quantization != "none"


def model_card(about: Export) -> str:
    """Returns the text of README.md."""
    summary = read_json(about.run / "summary.json")
    results = own_evaluation(about.run, about.config) or {}
    lines = [
        *_front_matter(),
        *_what_it_is(about),
        *_base(about, summary),
        *_data(about, summary, results),
        *_metrics(about, results),
        *_versions(summary),
        *_configuration(about),
    ]
    return "\n".join(lines)


def own_evaluation(run: Path, config: RunConfig) -> dict[str, Any] | None:
    """The results.json of the newest exact evaluation of the run's own adapter, on the base as trained.

    It is of the whole test split, with the data and the prompt of the run. Scores over the catalogue's tokens
    (`renormalised`) come before those over the vocabulary (`full`); searches are passed over. An evaluation
    names the SHA-256 of the adapter that it scored, which is empty for a base model, and its `limit`. Both
    are under `scoring_key`, which results of format 1 call `scoring`.
    """
    adapter = run / "adapter" / "adapter_model.safetensors"
    if not adapter.is_file():
        return None
    digest = sha256_of(adapter)
    bases = _fingerprints_as_trained(run, config)
    data = read_json(run / "summary.json").get("data_fingerprint")
    written = sorted(run.glob("**/results.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    found: dict[str, dict[str, Any]] = {}
    for path in written:
        results = read_json(path)
        key = _scoring_key(results)
        own = key.get("adapter") == digest and key.get("limit") is None
        if results.get("metrics") and own and results.get("split", "test") == "test":
            if _on_the_base(results, bases, config.model) and _on_the_windows(results, data, config):
                mode = results.get("mode") or key.get("mode") or "renormalised"
                found.setdefault(mode, results)
    return found.get("renormalised") or found.get("full")


def _on_the_base(results: dict[str, Any], bases: set[str], trained: ModelSection) -> bool:
    """Whether an evaluation scored the base as trained: by its fingerprint, else by its settings."""
    fingerprint = _scoring_key(results).get("model")
    if fingerprint and bases:
        return fingerprint in bases
    evaluated = (results.get("config") or {}).get("model") or {}
    names = ("path", "revision", "quantization", "double_quant", "quant_storage")
    return all(evaluated.get(name, getattr(trained, name)) == getattr(trained, name) for name in names)


def _on_the_windows(results: dict[str, Any], data: str | None, trained: RunConfig) -> bool:
    """Whether an evaluation asked what the run's config asks: `eval.run` takes other settings after it.

    Args:
        data: the fingerprint of the data that the run recorded; None in runs of earlier versions.
    """
    if data and _scoring_key(results).get("corpus", data) != data:
        return False
    evaluated = results.get("config") or {}
    return all(
        evaluated.get(section, {}).get(name, getattr(getattr(trained, section), name))
        == getattr(getattr(trained, section), name)
        for section, names in THE_SAME_WINDOWS.items()
        for name in names
    )


def _fingerprints_as_trained(run: Path, config: RunConfig) -> set[str]:
    """Fingerprints of the base that an evaluation of it can have; none if the base is not on this machine.

    Evaluations load it in the dtype of the training, or in float32.
    """
    recorded = read_json(run / "adapter" / "adapter_config.json").get("base_model_name_or_path")
    places = [place for place in (run / "base", recorded, config.model.path) if place]
    base = next((Path(place) for place in places if (Path(place) / "config.json").is_file()), None)
    if base is None:
        return set()
    summary = read_json(run / "summary.json")
    dtypes = {torch.float32, torch.bfloat16, torch.float16}
    if summary.get("dtype"):
        dtypes = {torch.float32, trained_dtype(config.model, summary)}
    found = {base_fingerprint(base, config.model, dtype) for dtype in dtypes}
    return found | {summary["base_fingerprint"]} if summary.get("base_fingerprint") else found


def _scoring_key(results: dict[str, Any]) -> dict[str, Any]:
    key = results.get("scoring_key") or results.get("scoring")
    if isinstance(key, dict):
        return key
    return {}


def _front_matter() -> list[str]:
    return [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [recommendation, gdrt]",
        "---",
        "",
    ]


def _what_it_is(about: Export) -> list[str]:
    config = about.config
    source = ""
    if about.base == "trained" and about.quantised:
        source = f" (weights dequantised from {config.model.quantization.upper()}, as trained)"
    return [
        f"# {about.run.name}: {config.objective} {'model' if is_row_run(about.run) else 'recommender'}",
        "",
        f"A LoRA adapter trained by gdrt_ds with the objective `{config.objective}`, merged into "
        f"`{config.model.path}`{source}, stored as {about.dtype_name}. It loads with "
        "`AutoModelForCausalLM.from_pretrained` of this folder.",
        "",
        "Checked when exported: logits differ from base + adapter by at most "
        f"{about.difference:.2g} (largest logit {about.largest:.3g}).",
        "",
        "Prompt: the template of the run (`prompt.json`); other prompts were not trained. The licence of "
        "the base model applies.",
        "",
    ]


def _base(about: Export, summary: dict[str, Any]) -> list[str]:
    """On which base the adapter was trained, how to load that, and what another base does to it."""
    model = about.config.model
    dtype = trained_dtype(model, summary)
    form = get_quantization(model.quantization).describe(model, dtype)
    revision = f", revision `{model.revision}`" if model.revision else ""
    return [
        "## The adapter and its base",
        "",
        f"The adapter was trained on `{model.path}`{revision}, held as {form.removeprefix('base: ')}. "
        f"Fingerprint of this base: {recorded(summary.get('base_fingerprint'))}.",
        "",
        *_other_base(about),
        "",
        "The adapter on the base it was trained on:",
        "",
        "```python",
        loading_code(about, dtype).rstrip(),
        "```",
        "",
    ]


def _other_base(about: Export) -> list[str]:
    """What to expect of the adapter on weights that it was not trained on."""
    if not about.quantised:
        return [
            "On a base with other weights (another revision, a quantised copy) its scores are other ones."
        ]
    kind = about.config.model.quantization.upper()
    general = (
        f"The adapter was fitted to the {kind} weights, rounding errors included. On the unquantised "
        "weights it gives other scores: the NLL of targets can differ by more than a nat. "
        f"`python -m eval.run --run {about.run} model.quantization=none` measures them."
    )
    if about.base == "trained":
        return [f"{general} This folder holds the dequantised {kind} weights, so its scores are the run's."]
    return [
        f"{general} This folder holds the unquantised weights: evaluate it before you use it, or export "
        "again with `--base trained`."
    ]


def loading_code(about: Export, dtype: torch.dtype) -> str:
    """Python lines that load the adapter on the base it was trained on, as `model`."""
    section = about.config.model
    adapter = about.run / "adapter"
    base = read_json(adapter / "adapter_config.json").get("base_model_name_or_path") or section.path
    place = repr(str(base))
    if section.revision:
        place += f", revision={section.revision!r}"
    names = {"base": place, "adapter": repr(str(adapter)), "dtype": dtype_name(dtype)}
    if section.quantization == "none":
        return PLAIN_LOADING.format(**names)
    if section.quantization == "nf4":
        storage = dtype_name(storage_dtype(section))
        return NF4_LOADING.format(**names, double_quant=section.double_quant, storage=storage)
    return OWN_LOADING.format(run=repr(str(about.run)))


def trained_dtype(section: ModelSection, summary: dict[str, Any]) -> torch.dtype:
    """The dtype that the run computed in: `auto` depends on the machine that it ran on."""
    if summary.get("dtype"):
        return getattr(torch, summary["dtype"])
    return compute_dtype(section.dtype, torch.device("cpu"))


def _data(about: Export, summary: dict[str, Any], results: dict[str, Any]) -> list[str]:
    # Runs of earlier versions do not record the fingerprint; their evaluations do.
    fingerprint = summary.get("data_fingerprint") or _scoring_key(results).get("corpus")
    data = about.config.data
    what = f"`{data.path}`, split by {data.split}"
    if is_row_run(about.run):
        what = ", ".join(f"`{path}`" for path in data.mixture or [data.path])
    return [
        "## Data",
        "",
        f"{what}. Fingerprint of the data: {recorded(fingerprint)}.",
        "",
    ]


def recorded(fingerprint: str | None) -> str:
    """A fingerprint as a card shows it."""
    if fingerprint:
        return f"`{fingerprint}`"
    return "not recorded by the version that trained this run"


def _metrics(about: Export, results: dict[str, Any]) -> list[str]:
    if not results:
        return [
            "## Metrics",
            "",
            f"This adapter has no full evaluation yet (`python -m eval.run --run {about.run}`).",
            "",
        ]
    items = f", {results['num_items']} items" if results.get("num_items") else ""  # rows have no items
    lines = [
        "## Metrics",
        "",
        f"Measured on base + adapter as trained: split {results.get('split')}, "
        f"{results.get('num_samples')} samples{items}.",
        "",
    ]
    return [*lines, *metric_table(results), ""]


def metric_table(results: dict[str, Any]) -> list[str]:
    """Every metric of an evaluation that has an interval, as a table of Markdown."""
    lines = ["| metric | value | 95 % interval | n |", "|---|---|---|---|"]
    for name, entry in results["metrics"].items():
        if entry.get("ci_low") is None or entry.get("value") is None:
            continue
        interval = f"{entry['ci_low']:.4f} .. {entry['ci_high']:.4f}"
        lines.append(f"| {name} | {entry['value']:.4f} | {interval} | {entry['n']} |")
    return lines


def _versions(summary: dict[str, Any]) -> list[str]:
    if not summary.get("versions"):
        return []
    named = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    return ["## Versions", "", named, ""]


def _configuration(about: Export) -> list[str]:
    config = (about.run / "config.yaml").read_text(encoding="utf-8").rstrip()
    return ["## Training configuration", "", "```yaml", config, "```", ""]


def read_json(path: Path) -> dict[str, Any]:
    """The object of a JSON file; empty if the file is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
