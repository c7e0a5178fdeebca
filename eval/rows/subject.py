"""What is evaluated on rows: a model, the rows of a split, and the group of every target token."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from eval.loading import (
    check_names,
    choose_samples,
    config_elsewhere,
    kept_limit,
    trained_objective,
)
from gdrt_ds.data.corpus import reader_of
from gdrt_ds.data.supervised import Supervised, SupervisedSource
from gdrt_ds.data.text_rows import TextRow
from gdrt_ds.data.token_facts import whole
from gdrt_ds.dro.groups import UNSEEN, GroupPlan, apply_groups, fit_groups
from gdrt_ds.errors import UserError
from gdrt_ds.files import read_summary
from gdrt_ds.inference.recommender import base_path, names_dtype
from gdrt_ds.inference.row_model import RowModel, is_row_run, open_row_model, open_row_run

NOT_IN_TRAIN = "(not in train)"
"""The group of tokens whose label no target of train has: evaluation has it apart."""


@dataclass
class RowSubject:
    """A model with the rows that it is evaluated on.

    Attributes:
        name: for tables.
        rows: of the split, cut by `limit`.
        groups: sample id -> int16[target tokens], the group of each; empty without groups.
        group_names: one name per group.
        notes: what a reader of the numbers has to know.
    """

    name: str
    model: RowModel
    data: Supervised
    rows: list[TextRow]
    split: str
    limit: int | None
    run: Path | None = None
    groups: dict[int, np.ndarray] = field(default_factory=dict)
    group_names: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def objective(self) -> str | None:
        """The training objective; None for a base model or a model that was trained elsewhere."""
        return trained_objective(self.run, self.model)

    def train_completions(self) -> Counter[str]:
        """How often train has each completion."""
        return Counter(row.completion for row in self.data.rows["train"])


def is_about_rows(
    run: str | None, data: str | None, model: str | None, prompt: str | None, overrides: list[str]
) -> bool:
    """Whether the command line names a run on rows, or data of rows."""
    if run is not None:
        return is_row_run(run)
    if data is None:
        return False
    return bool(reader_of(config_elsewhere(model, data, prompt, overrides).data).supervised)


def load_rows(
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
) -> RowSubject:
    """Opens what the command line names; arguments as those of `eval.loading.load_subject`.

    Raises:
        UserError: contradictory options, an empty split, or whatever cannot be loaded.
    """
    overrides = list(overrides)
    check_names(run, model, adapter, prompt, data)
    if run is not None:
        opened = open_row_run(run, runtime, overrides, base=base)
        name = Path(run).name + (" (base)" if base else "")
    else:
        assert data is not None
        config = config_elsewhere(model, data, prompt, overrides)
        folder = Path(adapter) if adapter else None
        as_loaded = names_dtype(overrides) and config.model.dtype != "float32"
        path = base_path(config.model, folder)
        opened = open_row_model(config, runtime, path, folder, as_loaded=as_loaded)
        name = (folder or Path(str(model))).name
    config = opened.config.model_copy(deep=True)
    config.prompt.history = "keep"  # controls are about training
    found = SupervisedSource.read(config).rows
    if not found.splits[split]:
        raise UserError(
            f"--split {split}: the {split} split of {config.data.path} has no row",
            f"give a file named {split}, or evaluate another --split",
        )
    splits = tuple(dict.fromkeys(("train", split)))
    encoded = Supervised.of(found, opened.encoder, config, splits)
    rows = choose_samples(found.splits[split], limit)
    subject = RowSubject(
        name,
        opened,
        encoded,
        rows,
        split,
        kept_limit(limit, found.splits[split]),
        Path(run) if run else None,
    )
    _give_groups(subject, fitted_here=any(o.startswith("groups.") for o in overrides))
    return subject


def _give_groups(subject: RowSubject, fitted_here: bool) -> None:
    """Gives every target token the group that training gave such tokens.

    Args:
        fitted_here: groups are asked for by settings: they are fitted on train, if they need no model.
    """
    config = subject.model.config
    by_model = config.groups.by in ("relevance", "random")
    relevance = None
    file = None if subject.run is None else subject.run / "groups.json"
    if file is not None and file.is_file():
        plan = GroupPlan.load(file)
        if plan.by in ("relevance", "random"):
            relevance = _saved_relevance(subject)
            if relevance is None:
                return
    elif fitted_here and not by_model:
        plan = fit_groups(config.groups, subject.data, None, config.train.seed)
    else:
        return
    section = config.groups.model_copy(update={"by": plan.by, "column": plan.column})
    per_token = apply_groups(plan, section, subject.data, relevance, subject.split)
    offsets = subject.data.stores[subject.split].target_offsets
    subject.group_names = plan.names()
    if (per_token := whole(per_token)).min(initial=0) == UNSEEN:
        per_token = np.where(per_token == UNSEEN, plan.num, per_token).astype(np.int16)
        subject.group_names = [*subject.group_names, NOT_IN_TRAIN]
    for row in subject.rows:
        start, stop = offsets[row.sample_id : row.sample_id + 2]
        subject.groups[row.sample_id] = per_token[start:stop]


def _saved_relevance(subject: RowSubject) -> np.ndarray | None:
    """float32[target tokens of the split] from the run's table; None, with a note, if it is of other data."""
    from safetensors.numpy import load_file

    assert subject.run is not None
    table = load_file(subject.run / "groups.safetensors")
    auxiliary = subject.data.auxiliary()
    trained_on = read_summary(subject.run).get("data_fingerprint", subject.data.fingerprint)
    same = trained_on == subject.data.fingerprint
    if not same or not np.array_equal(table["entry_offsets"], auxiliary.store.target_offsets):
        subject.notes.append(
            "the data are not those that the run scored relevance on, so there are no relevance groups"
        )
        return None
    store = subject.data.stores[subject.split]
    return auxiliary.per_token(table["entry_r"], subject.split, store)
