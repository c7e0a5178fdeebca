"""The plan of a run, printed before anything heavy.

Resolved config, batch arithmetic, memory estimate per rank, refusals.
"""

from __future__ import annotations

import torch

from gdrt_ds.config import RunConfig, dump_config
from gdrt_ds.models.source import compute_dtype
from gdrt_ds.objectives import get_objective
from gdrt_ds.training.deepspeed_config import fill_deepspeed_config, read_deepspeed_config, zero_stage


def print_plan(config: RunConfig, world: int, full: bool, quiet: bool = False) -> None:
    """Prints the plan; with `full` also what needs the data (token counts, memory). Raises UserError for
    every refusal.

    quiet: check only (other ranks than 0).
    """
    say = (lambda text: None) if quiet else (lambda text: print(text, flush=True))
    get_objective(config.objective)
    raw = read_deepspeed_config(config.deepspeed)
    from gdrt_ds.planning.compatibility import check_combination

    check_combination(config, raw)
    from gdrt_ds.training.preflight import check_data, check_settings

    check_settings(config)
    say("--- resolved config\n" + dump_config(config).rstrip() + "\n---")
    if not full:
        return
    from gdrt_ds.models.inventory import take_inventory
    from gdrt_ds.models.packing import choose_packing
    from gdrt_ds.models.scoring_choice import scoring_line
    from gdrt_ds.models.skeleton import skeleton
    from gdrt_ds.training.preparation import padding_figures, plan_batches, prepare, total_steps

    prepared = prepare(config)
    for note in [*prepared.notes, *check_data(config, prepared)]:
        say(f"data: {note}")
    store = prepared.stores["train"]
    plan = plan_batches(config, store, world)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = compute_dtype(config.model.dtype, device)
    model = take_inventory(config.model, prepared.model_config)
    filled = fill_deepspeed_config(raw, config, plan, dtype, model.hidden, model.layer_elements(config.model))
    steps = total_steps(config, store)
    figures = padding_figures(store, plan, len(prepared.encoder.prefix_ids))
    packing, line = choose_packing(config, prepared.model_config)
    say(
        f"data: {len(store):,} train samples, {store.lengths.mean():.0f} tokens on average (longest "
        f"{store.lengths.max()}), "
        f"{store.num_target.mean():.1f} of them targets; {len(prepared.catalogue):,} titles"
    )
    say(
        f"batch: {plan.describe()}; {steps:,} steps = {steps * config.train.global_batch / len(store):.2f} "
        "epochs"
    )
    say(
        f"tokens per step: {figures['padded']:,.0f} padded, {figures['packed']:,.0f} packed, "
        f"{figures['shared_prefix']:,.0f} with a shared head"
    )
    say(line)
    say(scoring_line(skeleton(prepared.model_config, config.model.trust_remote_code)))
    say(
        f"engine: DeepSpeed ZeRO stage {zero_stage(filled)} on {world} rank(s), "
        f"{str(dtype).removeprefix('torch.')}"
    )
    for text in memory_of(
        config, prepared, plan, figures["padded" if packing == "none" else packing], filled, world
    ).lines():
        say(text)


def memory_of(config: RunConfig, prepared, plan, tokens_per_step: float, filled: dict, world: int):
    """The MemoryPlan of the average micro-batch of this data. Args.

    What `prepare`, `plan_batches`, `padding_figures` and `fill_deepspeed_config` return.
    """
    from gdrt_ds.planning.memory_plan import estimate

    store = prepared.stores["train"]
    memory = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    micro_batches = world * plan.accumulation
    tokens = max(1, round(tokens_per_step / micro_batches))
    targets = max(1, round(config.train.global_batch * float(store.num_target.mean()) / micro_batches))
    return estimate(
        config, prepared.model_config, world, memory, tokens=tokens, targets=targets, deepspeed_config=filled
    )
