"""What a checkpoint remembers beside the engine's state, and how a run goes on from it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from gdrt_ds.config import GroupsSection, RunConfig
from gdrt_ds.dro import DroState
from gdrt_ds.dro.groups import GroupPlan
from gdrt_ds.errors import UserError
from gdrt_ds.models.reference_adapters import AUXILIARY, EXCESS, adapter_digest, reference_adapters
from gdrt_ds.training import checkpoint
from gdrt_ds.training.grouping import Grouped
from gdrt_ds.training.job import Job, on_main_rank
from gdrt_ds.training.loading import Loaded
from gdrt_ds.training.preparation import Prepared
from gdrt_ds.training.step_inputs import frozen_weights_given
from gdrt_ds.training.validation import Best


@dataclass(frozen=True)
class Resumed:
    """Where a run starts; the defaults are a run that starts at the beginning.

    Attributes:
        first_step: optimizer steps that are done.
        best: the best validation so far, and how many validations came after it without being better.
        dro_state: moving averages and online weights, as `DroState.state_dict` wrote them.
        group_plan, live_table: the groups of that moment and the relevance they came from
            (groups.reference=live).
        groups_digest: `Grouped.digest` of that moment; empty also in checkpoints of earlier versions.
        named: `digests_of_named` of this start.
        validation_due: a signal ended the run in the validation that follows `first_step`.
    """

    first_step: int = 0
    best: Best = Best()
    dro_state: dict[str, torch.Tensor] | None = None
    group_plan: GroupPlan | None = None
    live_table: np.ndarray | None = None
    groups_digest: str = ""
    named: dict[str, str] = field(default_factory=dict)
    validation_due: bool = False


def resume(job: Job, prepared: Prepared, loaded: Loaded) -> Resumed:
    """Puts the checkpoint that `resume` names into the engine. Every rank calls it.

    Raises:
        UserError: no such checkpoint; one of other data, another prompt or another base model; an adapter or
            weights that the settings name are others than when this run began.
    """
    named = on_main_rank(job.runtime, lambda: digests_of_named(job.config))
    path, notes = on_main_rank(job.runtime, lambda: checkpoint.resolve_resume(job.folder, job.config.resume))
    for note in notes:
        job.say(f"resume: {note}")
    if path is None:
        if job.config.resume is not None:
            job.say("resume: no checkpoint yet, starting at step 0")
        return Resumed(named=named)
    restored = checkpoint.load(loaded.engine, path, fingerprint=loaded.base.fingerprint)
    saved = restored.client_state
    # RUN/checkpoints may be a link to another disk, so its own place is asked for, not that of what it is in.
    another_run = path.parent.resolve() != (job.folder / "checkpoints").resolve()
    if saved["data_fingerprint"] != prepared.stores["train"].fingerprint:
        raise UserError(
            f"{path}: the training data or the prompt changed since this checkpoint",
            "restore data.* and prompt.*, or start a new run.dir",
        )
    if another_run and saved["step"] >= loaded.total_steps:
        raise UserError(
            f"resume = {job.config.resume}: {saved['step']} steps are done there, and this run ends after "
            f"{loaded.total_steps}",
            "raise train.max_steps or train.epochs: the steps of the checkpoint count",
        )
    if not another_run:
        check_named(job.config, saved.get("named") or {}, named)
    where = ""
    if not restored.same_world:
        where = (
            f" (saved on {restored.world} ranks, now {job.runtime.world}: "
            "equal up to rounding, and to dropout inside attention)"
        )
    job.say(f"resume: step {saved['step']} from {path}{where}")
    best = Best(saved["best"], saved["bad_validations"])
    if another_run and best.figures is not None:
        # Its value may be of another figure, and its checkpoint is not here.
        job.say("resume: from another run folder, whose best validation does not count here")
        best = Best()
    for line in other_order(job.config, path.absolute().parent.parent / "config.yaml"):
        job.say(line)
    live_table = saved.get("live_table")
    return Resumed(
        first_step=saved["step"],
        best=best,
        dro_state=_dro_state(job, saved),
        group_plan=GroupPlan(**saved["group_plan"]),
        live_table=None if live_table is None else live_table.numpy(),
        groups_digest=saved.get("groups_digest", ""),
        named=named,
        validation_due=saved.get("validation_due", False) and not another_run,
    )


def _dro_state(job: Job, saved: dict[str, Any]) -> dict[str, torch.Tensor] | None:
    """Moving averages and weights of a checkpoint; None, and a line, where they are of other losses."""
    now = losses_weighed(job.config)
    before = saved.get("weighed", now)
    changed = [name for name, value in now.items() if before.get(name) != value]
    if not changed:
        return saved["dro"]
    job.say(
        f"resume: the checkpoint's run had another {' and another '.join(changed)}, so its group losses "
        "were others: moving averages and weights of groups begin anew"
    )
    return None


def live_groups(resumed: Resumed, section: GroupsSection) -> tuple[GroupPlan | None, np.ndarray | None]:
    """The groups of the last refresh and the relevance they came from, for groups.reference=live.

    (None, None) where the checkpoint has none of this kind; `check_groups` then refuses what differs.
    """
    saved = resumed.group_plan
    if saved is None or resumed.live_table is None or section.reference != "live":
        return None, None
    settings = (section.by, section.num, section.binning, section.reference)
    if (saved.by, saved.num, saved.binning, saved.reference) != settings:
        return None, None
    return saved, resumed.live_table


def losses_weighed(config: RunConfig) -> dict[str, Any]:
    """The settings that say what a group's loss is: moving averages of others mean something else."""
    return {
        "objective": config.objective,
        "dro.excess": config.dro.excess,
        "options": config.options.model_dump(mode="json"),
    }


def digests_of_named(config: RunConfig) -> dict[str, str]:
    """Setting -> SHA-256 of what it names: reference adapters and the end of another run.

    They can be written anew while a job waits, under a path that stays the same.
    """
    settings = {AUXILIARY: "groups.reference_adapter", EXCESS: "dro.excess"}
    found = {settings[name]: adapter_digest(folder) for name, folder in reference_adapters(config).items()}
    if isinstance(config.dro.frozen_weights, str):
        weights = json.dumps(frozen_weights_given(config.dro.frozen_weights))
        found["dro.frozen_weights"] = hashlib.sha256(weights.encode()).hexdigest()
    return found


def check_named(config: RunConfig, before: dict[str, str], now: dict[str, str]) -> None:
    """Refuses to go on where a setting names something else than it did before, under the same path.

    Args:
        before: of the checkpoint; empty in checkpoints of earlier versions.

    Raises:
        UserError: names the first such setting.
    """
    for setting in sorted(before.keys() & now.keys()):
        if before[setting] != now[setting]:
            section, key = setting.split(".")
            value = getattr(getattr(config, section), key)
            raise UserError(
                f"resume: {setting} = {value} holds something else than when this run began",
                "restore it, or start a run without resume",
            )


def other_order(config: RunConfig, of_checkpoint: Path) -> list[str]:
    """Says where this run deals samples out otherwise than the one of the checkpoint did.

    The number of the step is all that is known of the samples that were seen.

    Args:
        of_checkpoint: config.yaml of that run; its folder may hold a checkpoint alone.
    """
    if not of_checkpoint.is_file():
        return []
    before = (yaml.safe_load(of_checkpoint.read_text(encoding="utf-8")) or {}).get("train") or {}
    return [
        f"resume: the checkpoint's run had train.{key} = {before[key]}, this one has "
        f"{getattr(config.train, key)}: it goes on at the same step of another order, so samples are left "
        "out or come again"
        for key in ("global_batch", "seed")
        if key in before and before[key] != getattr(config.train, key)
    ]


def check_groups(resumed: Resumed, grouped: Grouped) -> None:
    """Refuses groups that are not those of the checkpoint: its moving averages and weights are about others.

    Raises:
        UserError: another kind or number of groups, other labels, or other tokens under the same labels.
    """
    saved, now = resumed.group_plan, grouped.plan
    if saved is None:
        return
    for name in ("by", "num", "binning", "labels", "reference", "column"):
        before, after = getattr(saved, name), getattr(now, name)
        if before != after:
            raise UserError(
                f"resume: the checkpoint's groups have {name} = {before}, and this run's have {after}",
                "take the groups.* and the labels of that run, or start a run without resume",
            )
    if resumed.groups_digest and grouped.digest and resumed.groups_digest != grouped.digest:
        raise UserError(
            f"resume: with groups.by = {now.by} other train tokens are in the groups than in the checkpoint",
            "restore the labels that the groups are made of, or start a run without resume",
        )


def client_state(
    config: RunConfig,
    step: int,
    best: Best,
    state: DroState,
    data_fingerprint: str,
    grouped: Grouped,
    named: dict[str, str],
    validation_due: bool = False,
) -> dict[str, Any]:
    """What `checkpoint.save` stores beside the engine.

    Nested JSON values and tensors, the same on every rank.

    Args:
        validation_due: the validation that follows `step` has not been made.
    """
    saved = {
        "step": step,
        "best": best.figures,
        "bad_validations": best.later,
        "dro": state.state_dict(),
        "data_fingerprint": data_fingerprint,
        "group_plan": asdict(grouped.plan),
        "groups_digest": grouped.digest,
        "named": named,
        "weighed": losses_weighed(config),
        "validation_due": validation_due,
    }
    if config.groups.reference == "live" and grouped.relevance is not None:
        saved["live_table"] = torch.from_numpy(grouped.relevance)
    return saved
