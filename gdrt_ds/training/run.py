"""A run from its settings to its adapter. Each stage is a function that returns what it made:

open_job -> Job        the run folder is ours
prepare -> Prepared    data, catalogue, prompt, tokens
load -> Loaded         model, engine, batch plan
resume -> Resumed      where to start
group_tokens -> Grouped    the group of every target token
make_runner -> StepRunner  one optimizer step (step.py)
train -> Result        the loop
end -> exit status     adapter and summary
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from gdrt_ds import dro
from gdrt_ds.batches import BatchPlan, MicroBatch
from gdrt_ds.config import RunConfig
from gdrt_ds.data.prompts import common_head
from gdrt_ds.errors import UserError
from gdrt_ds.loss import AllowedTokens
from gdrt_ds.models.reference_adapters import EXCESS, reference
from gdrt_ds.objectives import Objective, get_objective
from gdrt_ds.runtime import Runtime
from gdrt_ds.training import run_folder
from gdrt_ds.training.ending import end
from gdrt_ds.training.grouping import Grouped, group_tokens, relevance_cache, save_groups
from gdrt_ds.training.job import Job, last_word, on_main_rank, open_job, stop_if_asked
from gdrt_ds.training.loading import Loaded, free_engine, load
from gdrt_ds.training.loop import train
from gdrt_ds.training.losses import split_losses
from gdrt_ds.training.preflight import check_data, check_settings
from gdrt_ds.training.preparation import Prepared, prepare
from gdrt_ds.training.resuming import Resumed, check_groups, live_groups, resume
from gdrt_ds.training.step import StepRunner
from gdrt_ds.training.step_inputs import (
    InTrie,
    TrainTokens,
    allowed_tokens,
    frozen_weights,
    markov_losses,
    next_tokens,
    token_weights,
)
from gdrt_ds.training.telemetry import say

SETUP_TIMEOUT_S = 600  # relevance scoring beats once per micro-batch, and the first one may take this long


def run_training(config: RunConfig, runtime: Runtime, *, keep_engine: bool = True) -> int:
    """Trains to the end or to an interruption; returns the exit status. Every rank calls it.

    Args:
        keep_engine: False frees the engine at the end, for a process that trains several runs one after
        the other.
    Raises:
        UserError: every refusal of a setting, and what went wrong with the machine, in words.
    """
    if is_finished(config, runtime):
        return 0
    objective = get_objective(config.objective)
    check_settings(config)
    runtime.max_minutes = config.run.max_minutes
    job = open_job(config, runtime)
    with last_word(job), contextlib.ExitStack() as cleanup:
        prepared = prepare_data(job)
        loaded = load(job, prepared)
        if not keep_engine:
            cleanup.callback(free_engine, loaded.engine)
        stop_if_asked(job)
        resumed, grouped, runner = make_ready(job, prepared, loaded, objective)
        with job.watchdog(config.train.timeout_s) as watchdog:
            if runtime.is_main:
                run_folder.settle(job.folder)
            result = train(job, prepared, loaded, resumed, grouped, runner, watchdog)
            return end(job, prepared, loaded, result)


def is_finished(config: RunConfig, runtime: Runtime) -> bool:
    """Whether `resume` asks for a run that has ended, which is said. Every rank calls it.

    Raises:
        UserError: it has ended, and a checkpoint or other settings are asked for.
    """
    folder = Path(config.run.dir)
    if config.resume is None or on_main_rank(runtime, lambda: run_folder.status(folder)) != "completed":
        return False
    run_folder.refuse_changes(folder, config)
    if config.resume != "auto":
        raise UserError(
            f"resume = {config.resume}: {folder} is a finished run",
            "give a new run.dir to go on from that checkpoint",
        )
    say(runtime, f"{folder} is a finished run: nothing to do")
    return True


def prepare_only(config: RunConfig, runtime: Runtime) -> None:
    """Tokenises and fills the relevance cache, so that a short job can do it before a long one starts."""
    if is_finished(config, runtime):
        return
    objective = get_objective(config.objective)
    check_settings(config)
    job = open_job(config, runtime)
    with last_word(job):
        prepared = prepare_data(job)
        loaded = load(job, prepared)
        stop_if_asked(job)
        make_ready(job, prepared, loaded, objective)
    job.say(f"prepared: {relevance_cache()}")


def prepare_data(job: Job) -> Prepared:
    """Data and prompt, and the files that evaluation needs.

    Written now, so that a broken run can be looked at too.
    """
    prepared = prepare(job.config)
    stop_if_asked(job)
    for line in [*prepared.notes, *check_data(job.config, prepared)]:
        job.say(f"data: {line}")
    if job.runtime.is_main:
        prepared.data.save(job.folder)
    return prepared


def make_ready(
    job: Job, prepared: Prepared, loaded: Loaded, objective: Objective
) -> tuple[Resumed, Grouped, StepRunner]:
    """Restores a checkpoint if there is one, gives every target token its group, and builds the step."""
    section = job.config.groups
    with job.watchdog(max(job.config.train.timeout_s, SETUP_TIMEOUT_S)) as watchdog:
        resumed = resume(job, prepared, loaded)

        def on_progress() -> None:
            watchdog.beat()
            stop_if_asked(job, resumed.first_step)

        plan, table = live_groups(resumed, section)
        grouped = group_tokens(job, prepared, loaded, on_progress, saved_plan=plan, saved_table=table)
        check_groups(resumed, grouped)
        counts = " ".join(f"{count:,}" for count in grouped.plan.counts)
        job.say(f"groups: {grouped.plan.num} by {section.by}, train tokens {counts}")
        empty = grouped.plan.counts.count(0)
        if empty:
            job.say(
                f"groups: {empty} of {grouped.plan.num} without a train token: too many have equal values"
            )
        save_groups(job, prepared, grouped)
        tokens = train_tokens(job, prepared, loaded, resumed, grouped, objective, on_progress)
        runner = make_runner(job, prepared, loaded, resumed, tokens, objective)
    return resumed, grouped, runner


def train_tokens(
    job: Job,
    prepared: Prepared,
    loaded: Loaded,
    resumed: Resumed,
    grouped: Grouped,
    objective: Objective,
    beat: Callable[[], None],
) -> TrainTokens:
    """Groups, and what this objective asks for beside losses."""
    facts = {}
    in_trie = None
    excess = job.config.dro.excess
    if not objective.needs_losses or job.config.dro.frozen_weights is not None:
        excess = False  # the weights do not hang on losses
    if prepared.data.catalogue is not None and (
        objective.masked_softmax or objective.token_weights or excess == "markov"
    ):
        in_trie = InTrie.of(prepared)
    if objective.masked_softmax:
        facts["trie_node"] = in_trie.node
        facts["trie_offsets"], facts["trie_tokens"] = next_tokens(in_trie.trie)
    if objective.token_weights is not None:
        facts["weights"] = token_weights(prepared, in_trie, objective, job.config.options)
    if objective.history_free_pass:
        facts["history_free"] = prepared.data.without_evidence()
    if excess == "relevance":
        facts["reference"] = grouped.train_relevance.map(lambda relevance: -relevance.astype(np.float64))
    elif excess == "markov":
        facts["reference"] = markov_losses(prepared, in_trie, job.config)
        job.say(facts["reference"].describe())
    elif excess:
        among = None
        if objective.masked_softmax:
            among = partial(allowed_tokens, facts["trie_node"], facts["trie_offsets"], facts["trie_tokens"])
        facts["reference"] = losses_to_exceed(job, prepared, loaded, beat, among)
    return TrainTokens(prepared.stores["train"], grouped.groups["train"], grouped.plan.num, **facts)


def samples_ahead(plan: BatchPlan, num_samples: int, first_step: int, total_steps: int) -> np.ndarray:
    """int64, ascending: the samples that the steps from `first_step` on take.

    A run that goes on within an epoch sees the rest of it, and then all samples in another order. Only two
    epochs on end hold every sample wherever they begin, and no more steps than theirs have to be looked at.
    """
    steps_per_epoch = -(-num_samples // plan.global_batch)
    last_step = min(total_steps, first_step + 2 * steps_per_epoch + 1)
    steps = [plan.samples(step) for step in range(first_step, last_step)]
    return np.unique(np.concatenate(steps or [[]])).astype(np.int64)


def losses_to_exceed(
    job: Job,
    prepared: Prepared,
    loaded: Loaded,
    beat: Callable[[], None],
    among: Callable[[MicroBatch], AllowedTokens] | None,
) -> np.ndarray:
    """float64[train target tokens]: the losses of a reference that sees the history (dro.excess).

    NaN in samples that no step will use, so that a use that was not foreseen cannot pass unnoticed.

    Args:
        among: the tokens that each target token competes with under a masked softmax. The reference is
            scored as the objective is: a loss minus one over other tokens or at another temperature would
            be no excess.
    """
    store = prepared.stores["train"]
    # Of the whole run, also where it goes on in its middle: in other micro-batches, as other samples would
    # make them, a loss can differ in its last digits, and the run would not be the same to the bit.
    used = samples_ahead(loaded.plan, len(store), 0, loaded.total_steps)
    loaded.engine.eval()
    with reference(loaded.base.model, EXCESS if job.config.dro.excess_adapter else None):
        losses = split_losses(
            job,
            prepared,
            loaded,
            "train",
            beat=beat,
            samples=used,
            announce=f"excess losses: {len(used):,} samples under the reference",
            allowed_of=among,
            temperature=1.0 if among is None else job.config.options.msl_temperature,
        )
    loaded.engine.train()
    owner = np.repeat(np.arange(len(store)), store.num_target)
    losses[~np.isin(owner, used)] = np.nan
    return losses


def make_runner(
    job: Job,
    prepared: Prepared,
    loaded: Loaded,
    resumed: Resumed,
    tokens: TrainTokens,
    objective: Objective,
) -> StepRunner:
    """The step, with the group-DRO state that a checkpoint remembers."""
    state = dro.DroState(tokens.num_groups).to(job.runtime.device)
    if resumed.dro_state is not None:
        state.load_state_dict(resumed.dro_state)
    prefix_length = prepared.data.prefix_length
    if tokens.history_free is not None:  # both passes are laid out with one length of the shared prefix
        prefix_length = min(prefix_length, common_head(tokens.history_free))
    frozen_q = frozen_weights(job.config.dro.frozen_weights, tokens.num_groups, job.runtime.device)
    return StepRunner(
        loaded.engine,
        loaded.plan,
        tokens,
        objective,
        job.config,
        state,
        job.runtime,
        packing=loaded.packing,
        prefix_length=prefix_length,
        pad_id=prepared.tokenizer.pad_token_id,
        frozen_q=frozen_q,
    )
