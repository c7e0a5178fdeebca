"""Settings that are each allowed and cannot be meant together, as far as no data is needed to know it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gdrt_ds.config.sections import RunConfig


def contradictions(config: RunConfig) -> Iterator[str]:
    """One sentence for every contradiction; it names the settings, their values and the way out."""
    groups, data, train = config.groups, config.data, config.train
    if groups.by == "column" and not groups.column:
        yield "groups.by=column needs groups.column (a label of the samples)"
    if groups.by == "user_attribute" and not groups.column:
        yield "groups.by=user_attribute needs groups.column, e.g. groups.column=gender"
    needs_adapter = groups.reference == "auxiliary_sft" and groups.by in ("relevance", "random")
    if needs_adapter and not groups.reference_adapter:
        yield "groups.reference=auxiliary_sft needs groups.reference_adapter (a PEFT folder)"
    if config.dro.excess == "relevance" and groups.by not in ("relevance", "random"):
        yield (
            f"dro.excess = relevance subtracts what groups.by=relevance is made of, and groups.by is "
            f"{groups.by}: set groups.by=relevance, or dro.excess to false, markov, true or a folder"
        )
    if config.dro.excess == "relevance" and groups.reference == "live":
        yield (
            "dro.excess = relevance needs a reference that stays, and groups.reference = live is the model "
            "in training: set groups.reference to base, auxiliary_sft or corpus"
        )
    if config.dro.excess == "markov" and data.format == "sft":
        yield (
            "dro.excess = markov counts which item follows which, and rows of data.format = sft have no "
            "items; set dro.excess to relevance, true or a folder"
        )
    if data.min_history > data.history_length:
        yield (
            f"data.min_history = {data.min_history} is more than data.history_length = "
            f"{data.history_length}, the most items that a window keeps: no window could be made; lower "
            "data.min_history"
        )
    if data.mixture and data.format != "sft":
        yield (
            f"data.mixture is for rows of prompt and completion, and data.format is {data.format}: set "
            "data.format=sft, or give one data set as data.path"
        )
    if data.format == "sft" and data.windows == "growing":
        yield (
            "data.windows = growing makes windows of interactions, and data.format = sft has none; set "
            "data.windows=sliding, or take a config without it"
        )
    elif data.windows == "growing":
        yield from _growing_contradictions(config)
    yield from _tiny_contradictions(config)
    lost = train.lr * train.weight_decay
    if lost >= 1:
        yield (
            f"train.lr = {train.lr:g} times train.weight_decay = {train.weight_decay:g} is {lost:g}: a step "
            "would take away the whole weight or more; lower train.weight_decay"
        )


def _tiny_contradictions(config: RunConfig) -> Iterator[str]:
    """Sizes that attention cannot divide."""
    tiny = config.model.tiny
    if tiny.hidden % (2 * tiny.heads):
        yield (
            f"model.tiny.hidden = {tiny.hidden} is not divided by model.tiny.heads = {tiny.heads} into even "
            f"parts; take a multiple of {2 * tiny.heads}"
        )
    if tiny.heads % tiny.kv_heads:
        yield (
            f"model.tiny.heads = {tiny.heads} is no multiple of model.tiny.kv_heads = {tiny.kv_heads}; "
            "lower model.tiny.kv_heads, e.g. to 1"
        )


def _growing_contradictions(config: RunConfig) -> Iterator[str]:
    """What hangs on a sample's history cannot be kept for windows whose histories change with the epoch."""
    data = config.data
    if config.prompt.history != "keep":
        yield f"prompt.history = {config.prompt.history} leaves no history to share; set data.windows=sliding"
    if config.dro.excess is True or config.dro.excess_adapter:
        yield (
            f"dro.excess = {config.dro.excess} compares with losses of fixed histories, and those of "
            "data.windows = growing change with the epoch; set dro.excess to relevance or markov, or "
            "data.windows=sliding"
        )
    most = data.history_length - data.min_history + 1
    block = config.train.block_samples
    if block is not None and block > most:
        yield (
            f"train.block_samples = {block} gives histories of up to {data.min_history + block - 1} "
            f"items, more than data.history_length = {data.history_length}; set train.block_samples to at "
            f"most {most}"
        )
