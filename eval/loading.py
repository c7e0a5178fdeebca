"""What is evaluated: a run folder, its base model, or a model trained elsewhere; always with data, prompt and
catalogue that belong together (`gdrt_ds.inference.recommender` refuses those that do not).

    load_subject(run=FOLDER)              the run's base + adapter, its prompt.json and catalogue.jsonl
    load_subject(run=FOLDER, base=True)   its base model under the same prompt
    load_subject(model=M, adapter=A, prompt=P, data=D)
                                          any causal LM, any PEFT adapter, a template file (or the name of one
                                          that comes with the package)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from eval.precision import Precision, compare, in_training
from gdrt_ds.config import RunConfig, load_config
from gdrt_ds.data.catalogue import Catalogue
from gdrt_ds.data.coded_windows import target_entries
from gdrt_ds.data.corpus import Corpus, Sample, load_corpus
from gdrt_ds.data.popularity import count_in_histories
from gdrt_ds.errors import UserError
from gdrt_ds.inference.recommender import (
    Recommender,
    TrainedModel,
    assemble_trained,
    base_path,
    check_catalogue,
    names_dtype,
    open_trained,
)
from gdrt_ds.inference.row_model import RowModel
from gdrt_ds.models.weight_files import WeightFiles
from gdrt_ds.runtime.devices import free_bytes

Chosen = TypeVar("Chosen")


@dataclass
class Subject:
    """A recommender with the samples it is evaluated on.

    Attributes:
        name: for tables. samples: of the split, cut by `limit`. run: the run folder, if any.
        group_of_entry: relevance group of each catalogue entry, -1 where unknown; None without a relevance
            table.
        precision: what the dtype of the training changes; None where the scores keep it.
    """

    name: str
    recommender: Recommender
    corpus: Corpus
    samples: Sequence[Sample]
    split: str
    limit: int | None
    run: Path | None = None
    group_of_entry: np.ndarray | None = None
    precision: Precision | None = None

    @property
    def objective(self) -> str | None:
        """The training objective; None for a base model or a model that was trained elsewhere."""
        return trained_objective(self.run, self.recommender)

    @property
    def catalogue(self) -> Catalogue:
        return self.recommender.catalogue

    def train_history_counts(self) -> Counter[str]:
        """Occurrences in train histories by representative item id: the GH of MGU and DGU."""
        counts = count_in_histories(self.corpus.splits["train"])
        merged: Counter[str] = Counter()
        for item, count in counts.items():
            merged[self.catalogue.entries[self.catalogue.index_of[item]].item_id] += count
        return merged


def trained_objective(run: Path | None, opened: Recommender | RowModel) -> str | None:
    """The training objective; None for a base model or a model that was trained elsewhere."""
    if run is None or opened.adapter is None:
        return None
    return opened.config.objective


def check_names(
    run: str | None, model: str | None, adapter: str | None, prompt: str | None, data: str | None
) -> None:
    """Raises UserError unless the command line names either a run or a model."""
    if (run is None) == (model is None):
        raise UserError(
            "give either --run or --model" if run is None else "--run and --model exclude each other",
            "--run RUN_DIR for a run of this project, --model PATH [--adapter PATH] --prompt FILE --data "
            "PATH for another model",
        )
    if run is not None and (adapter or prompt or data):
        raise UserError(
            "--adapter, --prompt and --data belong to --model; a run folder brings its own",
            "override single settings with key.sub=value",
        )


def config_elsewhere(model: str | None, data: str, prompt: str | None, overrides: list[str]) -> RunConfig:
    """The settings for a model of another trainer, which has no config of its own here."""
    given = ["model.quantization=none", f"model.path={model}", f"data.path={data}"]
    if prompt:
        given.append(f"prompt.template={prompt}")
    return load_config(None, [*given, *overrides])


def kept_limit(limit: int | None, samples: Sequence[Any]) -> int | None:
    """The limit where it leaves samples of a split out; else None."""
    if limit and limit < len(samples):
        return limit
    return None


def choose_samples(samples: list[Chosen], limit: int | None) -> list[Chosen]:
    """All samples, or a sample of `limit` of them that is the same for every model (seed 0), in the split's
    order.

    Raises:
        UserError: limit below 1.
    """
    if limit is None or limit >= len(samples):
        return samples
    if limit < 1:
        raise UserError(f"--limit {limit} leaves nothing to evaluate", "give at least 1, or leave it out")
    chosen = np.random.default_rng(0).choice(len(samples), size=limit, replace=False)
    return [samples[i] for i in sorted(chosen.tolist())]


def relevance_groups(run: Path, corpus: Corpus, catalogue: Catalogue) -> np.ndarray | None:
    """Relevance group of every entry: mean r over the tokens of its title, in quantile bins over the train
    targets.

    0 = least predictable from auxiliary tokens alone. Token-level groups serve training; a sample needs one
    group. None if the run has no relevance table (groups.by is a label).
    """
    import json

    from safetensors.numpy import load_file

    file = run / "groups.safetensors"
    if not file.is_file() or not (run / "groups.json").is_file():
        return None
    table = load_file(file)
    if "entry_r" not in table or len(table["entry_offsets"]) != len(catalogue) + 1:
        return None
    num = int(json.loads((run / "groups.json").read_text(encoding="utf-8"))["num"])
    offsets = table["entry_offsets"]
    mean = np.add.reduceat(table["entry_r"].astype(np.float64), offsets[:-1]) / np.diff(offsets)
    targets = target_entries(corpus.splits["train"], catalogue)
    edges = np.quantile(mean[targets[targets >= 0]], np.arange(1, num) / num)
    return np.digitize(mean, edges)


def load_subject(
    runtime,
    *,
    run: str | None = None,
    base: bool = False,
    model: str | None = None,
    adapter: str | None = None,
    prompt: str | None = None,
    data: str | None = None,
    split: str = "test",
    limit: int | None = None,
    overrides: list[str] = (),
    merge: bool = True,
) -> Subject:
    """Opens what the command line names.

    Args:
        overrides: `key.sub=value` on the run's config (or on the defaults), e.g. model.dtype=float32 or
            data.history_length=10. `model.dtype=bfloat16` or float16 names the dtype of the scores, which are
            otherwise computed in float32 where it fits.
    Raises:
        UserError: contradictory options, and every refusal of gdrt_ds.inference.recommender; an empty split.
    """
    check_names(run, model, adapter, prompt, data)
    if run is not None:
        trained = open_trained(run, runtime, overrides, base=base)
        corpus = load_corpus(trained.config.data)
        name = Path(run).name + (" (base)" if base else "")
        groups = relevance_groups(Path(run), corpus, trained.catalogue)
    else:
        trained, corpus = _trained_elsewhere(runtime, base, model, adapter, prompt, data, overrides)
        name = Path(adapter or model).name
        groups = None
    samples = choose_samples(corpus.split(split), limit)
    used = {item for s in samples for item in (*s.history, s.target)}
    check_catalogue(trained.catalogue, used, f"the {split} split")
    before = in_training(trained, samples)
    trained_dtype = trained.loaded.dtype
    recommender = trained.ready(runtime, merge)
    return Subject(
        name,
        recommender,
        corpus,
        samples,
        split,
        kept_limit(limit, corpus.split(split)),
        Path(run) if run else None,
        groups,
        compare(before, trained_dtype, recommender, samples),
    )


def _trained_elsewhere(
    runtime,
    base: bool,
    model: str,
    adapter: str | None,
    prompt: str | None,
    data: str | None,
    overrides: list[str],
) -> tuple[TrainedModel, Corpus]:
    """A model of another trainer, with the data that it is evaluated on."""
    if not data:
        raise UserError("--model needs --data", "give the data folder, or ml-100k")
    if base:
        raise UserError("--base belongs to --run", "leave --adapter out to evaluate a base model")
    config = config_elsewhere(model, data, prompt, overrides)
    corpus = load_corpus(config.data)
    catalogue = Catalogue.build(corpus)
    folder = Path(adapter) if adapter else None
    if folder is not None and not (folder / "adapter_config.json").is_file():
        raise UserError(
            f"--adapter {folder} is not a PEFT adapter (no adapter_config.json)",
            "give the folder that PEFT's save_pretrained wrote",
        )
    check_catalogue(catalogue, set(), "")
    path = base_path(config.model, folder)
    named = names_dtype(overrides)
    if not named and _fits_in_float32(path, runtime):
        section = config.model.model_copy(update={"dtype": "float32"})
        config = config.model_copy(update={"model": section})
    as_loaded = named and config.model.dtype != "float32"
    trained = assemble_trained(config, runtime, path, folder, None, corpus.domain, catalogue, as_loaded)
    trained.lines.append(f"prompt: {prompt or config.prompt.template}")
    return trained, corpus


def _fits_in_float32(path: Path, runtime) -> bool:
    """Whether the weights of a folder, held in float32, take at most half of the free memory.

    How another trainer computed is not known, so nothing is rounded where it need not be.
    """
    try:
        wanted = 4 * sum(tensor.numel for tensor in WeightFiles(path).tensors.values())
    except UserError:  # the loading says what is wrong with the folder
        return False
    return wanted <= free_bytes(runtime.device) // max(1, runtime.local_world) // 2
