"""The plan of a run, printed before anything heavy.

It holds the resolved config, the batch arithmetic, the memory estimate per rank, and every refusal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gdrt_ds.batches import BatchPlan
from gdrt_ds.config import RunConfig, dump_config
from gdrt_ds.config.explaining import changed_settings
from gdrt_ds.errors import UserError
from gdrt_ds.models.inventory import take_inventory
from gdrt_ds.models.scoring_choice import scoring_line
from gdrt_ds.models.skeleton import skeleton
from gdrt_ds.models.source import compute_dtype, dtype_line, dtype_name
from gdrt_ds.models.stored_four_bit import check_stored
from gdrt_ds.models.token_rows import chosen_ids
from gdrt_ds.objectives import get_objective
from gdrt_ds.planning.compatibility import check_combination
from gdrt_ds.planning.largest import largest_micro_batch
from gdrt_ds.planning.memory_plan import MemoryPlan, estimate
from gdrt_ds.training.deepspeed_config import (
    fill_deepspeed_config,
    lone_rank_line,
    read_deepspeed_config,
    zero_stage,
)
from gdrt_ds.training.preflight import check_data, check_settings
from gdrt_ds.training.preparation import (
    FIRST_STEPS,
    Prepared,
    packing_of,
    padding_figures,
    plan_batches,
    prepare,
    total_steps,
)


@dataclass(frozen=True)
class PlannedDevice:
    """What a rank of the planned run computes on.

    Attributes:
        kind: `cuda` or `cpu`.
        memory_bytes: of one GPU; None on a CPU.
    """

    kind: str
    memory_bytes: int | None = None

    @property
    def device(self) -> torch.device:
        return torch.device(self.kind)


def planned_device(gpu_gib: float | None = None) -> PlannedDevice:
    """Returns the device to plan for: this machine's, or a GPU of so many GiB that it need not have.

    Raises:
        UserError: no positive number.
    """
    if gpu_gib is not None:
        if not 0 < gpu_gib < float("inf"):
            raise UserError(f"--gpu-memory {gpu_gib}: a positive number of GiB is expected", "e.g. 80")
        return PlannedDevice("cuda", int(gpu_gib * 2**30))
    if torch.cuda.is_available():
        return PlannedDevice("cuda", torch.cuda.get_device_properties(0).total_memory)
    return PlannedDevice("cpu")


def print_plan(
    config: RunConfig, world: int, full: bool, quiet: bool = False, device: PlannedDevice | None = None
) -> None:
    """Prints the plan, or raises UserError for what would be refused.

    Args:
        config: settings of the run.
        world: number of ranks.
        full: prints every setting, and what needs the data: token counts and memory. Otherwise only the
            settings that are not the defaults.
        quiet: checks only, for ranks other than 0.
        device: what to plan for; None = this machine's.
    """
    device = device or planned_device()
    say = _silent if quiet else _print_now
    get_objective(config.objective)
    check_combination(config, read_deepspeed_config(config.deepspeed), cuda=device.kind == "cuda")
    check_settings(config)
    if full:
        say("--- resolved config\n" + dump_config(config).rstrip() + "\n---")
        _print_data_and_memory(config, world, say, device)
        return
    changed = "\n".join(f"  {line}" for line in changed_settings(config))
    say(f"settings that are not the defaults (all of them: {config.run.dir}/config.yaml)\n{changed}")


def _print_data_and_memory(
    config: RunConfig, world: int, say: Callable[[str], None], device: PlannedDevice
) -> None:
    prepared = prepare(config)
    for note in [*prepared.notes, *check_data(config, prepared)]:
        say(f"data: {note}")
    for line in plan_run(config, prepared, world, device).lines():
        say(line)


@dataclass(frozen=True)
class RunPlan:
    """What a run would do, known before its weights are read.

    Attributes:
        batches: which samples every rank computes in every step.
        steps: optimizer steps of the whole run.
        tokens: tokens of an average step: padded, packed, with a shared prefix.
        packing: none, packed, shared_prefix or prefix_tree, with the line that says why.
        engine: the filled DeepSpeed config.
        memory: the predicted peak per rank.
    """

    config: RunConfig
    prepared: Prepared
    world: int
    batches: BatchPlan
    steps: int
    tokens: dict[str, float]
    packing: tuple[str, str]
    device: PlannedDevice
    dtype: torch.dtype
    engine: dict[str, Any]
    memory: MemoryPlan

    def lines(self) -> Iterator[str]:
        """What `--plan` prints of it."""
        store = self.prepared.stores["train"]
        epochs = self.steps * self.config.train.global_batch / len(store)
        yield f"data: {len(store):,} train samples, {self._rows_text()}; {self.prepared.data.describe()}"
        yield f"batch: {self.batches.describe()}; {self.steps:,} steps = {epochs:.2f} epochs"
        yield (
            f"tokens per step: {self.tokens['padded']:,.0f} padded, {self.tokens['packed']:,.0f} packed, "
            f"{self.tokens['shared_prefix']:,.0f} with a shared prefix, "
            f"{self.tokens['prefix_tree']:,.0f} as a prefix tree"
        )
        yield self.packing[1]
        if self.prepared.data.catalogue is not None:
            yield scoring_line(skeleton(self.prepared.model_config, self.config.model.trust_remote_code))
        yield (
            f"engine: DeepSpeed ZeRO stage {zero_stage(self.engine)} on {self.world} rank(s), "
            f"{dtype_name(self.dtype)}"
        )
        if line := lone_rank_line(self.engine, self.world):
            yield line
        yield dtype_line(self.config.model.dtype, self.device.device)
        yield from self.memory.lines()

    def _rows_text(self) -> str:
        """Says how long the rows are: all of them, or those of the first steps where they have to be made."""
        store = self.prepared.stores["train"]
        num_target, where = store.num_target, ""
        if store.rows_change:
            # Rows are made when they are asked for, and those of a whole epoch are too many to make here.
            steps = min(FIRST_STEPS, self.steps)
            rows = np.concatenate([self.batches.samples(step) for step in range(steps)])
            lengths = np.array([len(row) for row in store.rows(rows)])
            num_target = num_target[store.sample_of(rows)]
            where = f" in the first {steps} step(s)"
        else:
            lengths = store.lengths
        return (
            f"{lengths.mean():.0f} tokens on average (longest {lengths.max()}){where}, "
            f"{num_target.mean():.1f} of them targets"
        )


def plan_run(
    config: RunConfig, prepared: Prepared, world: int, device: PlannedDevice | None = None
) -> RunPlan:
    """Returns the plan of a run on `world` ranks for data that are prepared.

    Args:
        device: what to plan for; None = this machine's.
    Raises:
        UserError: the DeepSpeed config contradicts the settings, or transformers cannot build the model.
    """
    device = device or planned_device()
    store = prepared.stores["train"]
    packing = packing_of(config, prepared, world)
    batches = plan_batches(config, store, world, packing[0])
    dtype = compute_dtype(config.model.dtype, device.device)
    check_stored(prepared.model_config, config.model, dtype)
    model = take_inventory(config.model, prepared.model_config)
    layer = model.layer_elements(config.model)
    raw = read_deepspeed_config(config.deepspeed)
    engine = fill_deepspeed_config(raw, config, batches, dtype, model.hidden, layer)
    steps = total_steps(config, store)
    tokens = padding_figures(store, batches, prepared.data.prefix_length)
    largest = largest_micro_batch(store, batches, prepared.data.prefix_length, packing[0], steps)
    memory = memory_of(config, prepared, largest, engine, world, device)
    return RunPlan(config, prepared, world, batches, steps, tokens, packing, device, dtype, engine, memory)


def memory_of(
    config: RunConfig,
    prepared: Prepared,
    largest: tuple[int, int],
    filled: dict,
    world: int,
    device: PlannedDevice,
) -> MemoryPlan:
    """Returns the memory plan of the largest micro-batch of these data.

    Args:
        config: settings of the run.
        prepared: what `prepare` returns.
        largest: its tokens and target tokens, from `largest_micro_batch`.
        filled: what `fill_deepspeed_config` returns.
        world: number of ranks.
        device: what to plan for.
    """
    tokens, targets = largest
    chosen = config.model.lora.trainable_tokens
    rows = len(chosen_ids(prepared.tokenizer, chosen)) if chosen else 0
    return estimate(
        config,
        prepared.model_config,
        world,
        device.memory_bytes,
        tokens=tokens,
        targets=targets,
        token_rows=rows,
        deepspeed_config=filled,
        folder=prepared.model_folder,
    )


def _print_now(text: str) -> None:
    print(text, flush=True)


def _silent(text: str) -> None:
    """Ranks other than 0 check and say nothing."""
