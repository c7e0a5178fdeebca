"""What can be known before weights are loaded is refused before they are loaded.

`check_settings` looks at settings, and at the folders and packages that they name. `check_data` looks at the
data too. A run does both before it loads its model, and `--plan` does both and loads nothing.
"""

from __future__ import annotations

import importlib.util

import numpy as np

from gdrt_ds.config import RunConfig
from gdrt_ds.data.corpus import reader_of
from gdrt_ds.data.token_facts import TokenFacts, whole
from gdrt_ds.dro import relevance
from gdrt_ds.dro.groups import UNSEEN, apply_groups, fit_groups
from gdrt_ds.errors import UserError
from gdrt_ds.models.reference_adapters import reference_adapters
from gdrt_ds.objectives import Objective, get_objective, objectives
from gdrt_ds.objectives.gdrt import closed_form
from gdrt_ds.training import checkpoint
from gdrt_ds.training.preparation import Prepared
from gdrt_ds.training.step_inputs import frozen_weights_given
from gdrt_ds.training.unused import unused_settings

BOARDS = {"tensorboard": "tensorboard", "wandb": "wandb"}
"""Setting of `log` -> the package that it needs."""


# -- without data
def check_settings(config: RunConfig) -> None:
    """Refuses what the settings name and what is not there.

    Raises:
        UserError: data, an adapter, a run or a checkpoint that is missing; a package that is not installed;
        frozen weights of an objective that has no weights.
    """
    if not config.data.mixture:
        reader_of(config.data)
    reference_adapters(config)
    checkpoint.check_resume(config.run.dir, config.resume)
    objective = get_objective(config.objective)
    _check_frozen_weights(config, objective)
    _check_weighing(config, objective)
    if config.data.windows == "growing" and objective.history_free_pass:
        raise UserError(
            f"data.windows = growing with objective = {config.objective}, whose second pass without history "
            "is made for fixed histories",
            "set data.windows=sliding, or choose another objective",
        )
    if config.prompt.history == "mask" and objective.history_free_pass:
        raise UserError(
            f"prompt.history = mask with objective = {config.objective}, whose second pass has no history: "
            "the first one would have none either, so both are the same",
            "leave prompt.history=keep, or choose another objective",
        )
    for setting, package in BOARDS.items():
        if getattr(config.log, setting) and not _is_installed(package):
            raise UserError(
                f"log.{setting} = true, but {package} is not installed",
                f"pip install 'gdrt-ds[{package}]', or set log.{setting}=false",
            )


def _check_weighing(config: RunConfig, objective: Objective) -> None:
    """Refuses ways to measure group losses that the objective would not follow, or would follow wrongly."""
    excess, named = config.dro.excess, f"objective = {config.objective}"
    if excess and objective.live_weights is not None:
        raise UserError(
            f"dro.excess = {excess} with {named}, which weighs tokens by their own scores and not groups by "
            "their losses",
            "leave dro.excess=false, or choose gdrt, group_dro or cvar with dro.cvar_over=groups",
        )
    if excess and objective.needs_losses and objective.token_term is not None:
        raise UserError(
            f"dro.excess = {excess} with {named}, which changes the losses of tokens, but not those of "
            "the reference",
            "leave dro.excess=false",
        )
    if objective.per_token(config.dro):
        given = f"dro.excess = {excess}" if excess else f"dro.estimate = {config.dro.estimate}"
        if excess or config.dro.estimate != "batch":
            raise UserError(
                f"{given} is about the losses of groups, and {named} weighs single tokens",
                "set dro.cvar_over=groups, or leave dro.excess=false and dro.estimate=batch",
            )
    if excess == "relevance" and objective.masked_softmax and config.groups.reference != "corpus":
        raise UserError(
            f"dro.excess = relevance with {named} and groups.reference = {config.groups.reference}: the "
            "objective's losses are among the tokens of titles, and the reference's among all tokens",
            "set groups.reference=corpus, which counts titles, or dro.excess=markov",
        )


def _is_installed(package: str) -> bool:
    """A folder of that name in the working directory, as wandb leaves one, is no installed package."""
    found = importlib.util.find_spec(package)
    return found is not None and found.origin is not None


def _check_frozen_weights(config: RunConfig, objective: Objective) -> None:
    given = config.dro.frozen_weights
    if given is None:
        return
    if objective.aggregate is not closed_form and objective.name in objectives():
        weighing = [name for name, known in objectives().items() if known.aggregate is closed_form]
        raise UserError(
            f"dro.frozen_weights = {given} with objective = {config.objective}, which does not take them",
            f"set objective to one of {', '.join(sorted(weighing))}, or leave dro.frozen_weights empty",
        )
    frozen_weights_given(given)


# -- with data
def check_data(config: RunConfig, prepared: Prepared) -> list[str]:
    """Refuses data that the settings do not fit, and returns lines that a user should know.

    Raises:
        UserError: a catalogue of one title; an objective that asks for a catalogue where there is none; a
        global batch above the train samples; a label that the data lacks; more groups than the data can
        have; frozen weights of another number of groups.
    """
    prepared.data.check()
    _check_objective(config, prepared)
    num_samples = len(prepared.stores["train"])
    if config.train.global_batch > num_samples:
        raise UserError(
            f"train.global_batch = {config.train.global_batch} is more than the {num_samples} train samples, "
            "so a step would count samples twice",
            f"set train.global_batch to at most {num_samples}, or raise data.limit_train or data.split_ratio",
        )
    num_groups, lines = _check_groups(config, prepared)
    lines += unused_settings(config)
    if num_groups < config.groups.num:
        lines.append(
            f"groups.num = {config.groups.num}, but groups.by={config.groups.by} has {num_groups} labels: "
            f"{num_groups} groups"
        )
    objective = get_objective(config.objective)
    weighs_groups = objective.needs_losses and not objective.per_token(config.dro)
    if num_groups == 1 and weighs_groups:
        lines.append(f"groups.num = 1: objective = {config.objective} with one group is the plain mean (sft)")
    if config.dro.frozen_weights is not None:
        frozen_weights_given(config.dro.frozen_weights, num_groups)
    return lines


def _check_groups(config: RunConfig, prepared: Prepared) -> tuple[int, list[str]]:
    """The number of groups, and lines about them.

    Groups that need no model are made once here, for every split.
    """
    section = config.groups
    by_model = section.by in ("relevance", "random") and section.reference != "corpus"
    if by_model:
        _refuse_too_many_groups(section.num, prepared)
        return section.num, []
    values: dict[str, TokenFacts | None] = dict.fromkeys(prepared.stores)
    if section.by in ("relevance", "random"):
        values = _corpus_relevance(prepared)
    plan = fit_groups(section, prepared.data, values["train"], config.train.seed)
    lines = []
    for split in prepared.stores:
        groups = apply_groups(plan, section, prepared.data, values[split], split)
        if plan.labels is not None and split != "train":
            lines += _unseen(section.by, plan.labels, split, whole(groups))
    return plan.num, lines


def _unseen(by: str, labels: list[str], split: str, groups: np.ndarray) -> list[str]:
    """A line about tokens whose label train lacks.

    Raises:
        UserError: they are all tokens of valid, which then has no loss of any group.
    """
    unseen = int((groups == UNSEEN).sum())
    if split == "valid" and unseen == len(groups) > 0:
        raise UserError(
            f"groups.by = {by}: no label of valid is one of train's, {', '.join(labels)}",
            "choose splits that share labels, or another groups.by",
        )
    if not unseen:
        return []
    return [
        f"{unseen} of {len(groups)} target tokens of {split} have a label that train lacks: they are in no "
        "group"
    ]


def _refuse_too_many_groups(num: int, prepared: Prepared) -> None:
    """A token's relevance depends on its title and its place in it: so many values there can be at most.

    In other data an entry, a prompt without evidence and its completion, stands for the title.
    """
    auxiliary = prepared.data.auxiliary()
    most = int(auxiliary.store.num_target[auxiliary.train_counts() > 0].sum())
    if num > most:
        one = "title" if prepared.data.catalogue is not None else "pair of auxiliary_prompt and completion"
        raise UserError(
            f"groups.num = {num} is more than the {most} different target tokens of train: a token's "
            f"relevance depends on its {one} and its place in it alone",
            f"set groups.num to at most {most}; 4 to 16 are usual",
        )


def _corpus_relevance(prepared: Prepared) -> dict[str, TokenFacts | None]:
    """split -> float32[target tokens of the split] under groups.reference=corpus, which needs no model."""
    auxiliary = prepared.data.auxiliary()
    scores = relevance.corpus_scores(auxiliary.store, auxiliary.train_counts(), auxiliary.known())
    return {split: auxiliary.facts(scores, split, store) for split, store in prepared.stores.items()}


def _check_objective(config: RunConfig, prepared: Prepared) -> None:
    """Refuses an objective that asks for what the data do not have."""
    objective = get_objective(config.objective)
    if prepared.data.catalogue is None and objective.requires_catalogue:
        usable = [name for name, known in objectives().items() if not known.requires_catalogue]
        raise UserError(
            f"objective = {config.objective} compares a target with a catalogue, and {config.data.path} is "
            "data of prompts and completions, which has none",
            f"set objective to one of {', '.join(sorted(usable))}",
        )
    if prepared.data.catalogue is None and config.train.select_by == "catalogue_nll":
        raise UserError(
            f"train.select_by = catalogue_nll, and {config.data.path} is data of prompts and completions, "
            "which has no catalogue",
            "set train.select_by=nll, worst_group or objective",
        )
    if objective.history_free_pass:
        prepared.data.auxiliary()
