"""The model under its DeepSpeed engine: base, adapter, packing, batch plan, optimizer."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import FunctionType

import torch
from torch import nn

from gdrt_ds.batches import BatchPlan
from gdrt_ds.config import RunConfig
from gdrt_ds.models.attention import Place, packed_attention
from gdrt_ds.models.families import model_class
from gdrt_ds.models.inventory import take_inventory
from gdrt_ds.models.load import LoadedModel, load_model
from gdrt_ds.models.prefix_dropout import other_dropout
from gdrt_ds.models.reference_adapters import load_reference_adapters
from gdrt_ds.models.scoring_choice import scoring_line
from gdrt_ds.models.source import compute_dtype
from gdrt_ds.runtime import import_muon
from gdrt_ds.training.deepspeed_config import (
    fill_deepspeed_config,
    lone_rank_line,
    read_deepspeed_config,
    zero_stage,
)
from gdrt_ds.training.job import Job
from gdrt_ds.training.leak_check import check_head, confirm_packing, pass_once
from gdrt_ds.training.memory_use import PeakMemory
from gdrt_ds.training.model_with_loss import FusedLossModel
from gdrt_ds.training.optimizer import make_optimizer
from gdrt_ds.training.preparation import Prepared, packing_of, plan_batches, total_steps
from gdrt_ds.training.zero3_units import adapted_layers_as_units


@dataclass(frozen=True)
class Loaded:
    """What can compute losses and take steps.

    Attributes:
        base: the loaded model, with the lines that were announced.
        engine: the DeepSpeed engine around it.
        plan: which samples every rank computes in every step.
        total_steps: optimizer steps of the whole run.
        packing: none, packed, shared_prefix or prefix_tree.
        memory: measures the peak from just before loading on.
    """

    base: LoadedModel
    engine: object
    plan: BatchPlan
    total_steps: int
    packing: str
    dtype: torch.dtype
    memory: PeakMemory


def load(job: Job, prepared: Prepared) -> Loaded:
    """Loads the model and starts the engine. Every rank calls it.

    Raises:
        UserError: every refusal of the model, the DeepSpeed config and their combination.
    """
    import deepspeed

    config, runtime = job.config, job.runtime
    memory = PeakMemory(runtime.device)
    packing, packing_line = packing_of(config, prepared, runtime.world)
    dtype = compute_dtype(config.model.dtype, runtime.device)
    store = prepared.stores["train"]
    plan = plan_batches(config, store, runtime.world, packing)
    hidden_size = prepared.model_config.get_text_config().hidden_size
    raw = read_deepspeed_config(config.deepspeed)
    layer = take_inventory(config.model, prepared.model_config).layer_elements(config.model)
    deepspeed_config = fill_deepspeed_config(raw, config, plan, dtype, hidden_size, layer)
    place = Place(runtime.device, dtype, model_class(prepared.model_config))
    base = load_model(
        config.model,
        runtime,
        train=True,
        path=prepared.model_folder,
        seed=config.train.seed,
        attention=packed_attention(config.model.attention, packing, place),
        deepspeed_config=deepspeed_config,
    )
    job.say(
        f"launcher: {runtime.launcher}, {runtime.world} rank(s) on {runtime.device.type}, "
        f"{runtime.threads} CPU thread(s) each"
    )
    for line in base.lines:
        job.say(line)
    job.say(packing_line)
    if prepared.data.catalogue is not None:
        job.say(scoring_line(base.model))
    job.say(f"engine: DeepSpeed ZeRO stage {zero_stage(deepspeed_config)}; {plan.describe()}")
    if line := lone_rank_line(deepspeed_config, runtime.world):
        job.say(line)
    for line in load_reference_adapters(base.model, config, base.fingerprint):
        job.say(line)
    # The seed by which masks are found breaks a compiled graph at every dropout layer.
    module = FusedLossModel(base.model, prefix_dropout=not config.model.compile)
    if line := dropout_line(config, base.model):
        job.say(line)
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = None
    if "optimizer" not in deepspeed_config:
        optimizer = make_optimizer(trainable, config.train, deepspeed_config, runtime.device)
    import_muon()
    with adapted_layers_as_units(base.model, zero_stage(deepspeed_config)):
        engine, *_ = deepspeed.initialize(
            model=module,
            model_parameters=trainable,
            config=deepspeed_config,
            optimizer=optimizer,
            dist_init_required=False,
        )
    engine.train()
    vocabulary, pad_id = prepared.model_config.get_text_config().vocab_size, prepared.tokenizer.pad_token_id
    if line := check_head(engine, packing, vocabulary, pad_id, dtype, runtime.device):
        job.say(line)
    if packing == "none":
        pass_once(engine, vocabulary, pad_id, runtime.device)
    packing, line = confirm_packing(
        config.train.packing,
        packing,
        engine,
        prepared.model_config,
        pad_id,
        dtype,
        runtime.device,
    )
    if line:
        job.say(line)
    # The measurement may have replaced the packing, and rows of another layout cost something else.
    plan = plan_batches(config, store, runtime.world, packing, plan.micro_batch)
    return Loaded(base, engine, plan, total_steps(config, store), packing, dtype, memory)


def dropout_line(config: RunConfig, model: nn.Module) -> str:
    """Says which dropout masks are not those of the prefix; empty where all are, or where there are none."""
    if config.model.compile and any(
        isinstance(module, nn.Dropout) and module.p for module in model.modules()
    ):
        return "dropout: masks depend on the packing, the micro-batch and the rank (model.compile is set)"
    return other_dropout(model)


def free_engine(engine) -> None:
    """Ends an engine and lets go of its model, for a process that goes on without it.

    After ZeRO-3 DeepSpeed (0.19.8) refers to the model from a list of a module and from caches of a class, so
    that `destroy` alone leaves every weight in memory. With them emptied, the collector of cycles frees it
    once the caller has let go of it, too.
    """
    engine.destroy()
    own = set(engine.module.modules())
    offload = sys.modules.get("deepspeed.runtime.zero.parameter_offload")
    if offload is not None:
        offload.FWD_MODULE_STACK[:] = [m for m in offload.FWD_MODULE_STACK if m not in own]
    coordinator = sys.modules.get("deepspeed.runtime.zero.partitioned_param_coordinator")
    if coordinator is not None:
        for member in vars(coordinator.PartitionedParameterCoordinator).values():
            if isinstance(member, FunctionType):  # a cached method lies in the closure of a decorator
                for cell in member.__closure__ or ():
                    getattr(cell.cell_contents, "cache_clear", lambda: None)()
