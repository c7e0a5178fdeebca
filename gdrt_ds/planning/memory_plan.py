"""Predicts the peak of tensor bytes per rank from the configs alone, and says what to change when it will not
fit.

Every part is counted per rank, for W ranks, s bytes of the compute dtype and t tokens of a micro-batch:

base        Packed 4-bit weights take half a byte each, other parameters s. ZeRO-3 divides both by W.
experts     Fused experts are no linear layers: they stay unquantised and take s. ZeRO-3 divides them by W.
quant_state One byte per 64 values and 4 per 64*256 (double quantisation), or 4 per 64. Whole on every rank.
adapter     Weights and gradients take s, float32 masters 4 and two moments 8. The stage says what is sharded.
            Trained rows of tokens count as often as there are tables of them: one if embedding and lm_head
            are tied, else two.
gathered    Whole parameters that ZeRO-3 has gathered, see `gathered_bytes`. One rank gathers nothing, but
            copies to its GPU as much of a base that lies in host memory. On CPUs gloo fills a second buffer
            of the same size and copies: the largest matrix counts twice.
dequantised The largest matrix, dense, twice: in the forward, and as blocks in the backward. Or, where it is
            more, the products of one MLP, or a dropout mask while it is made.
activations Per token and layer, see `activation_bytes_per_token`. With checkpointing they are the inputs of
            all layers and what one layer keeps.
loss        A chunk of logits (its byte budget), hidden states and row gradients of the supervised tokens.
            Trained rows of lm_head are added by a matrix of vocabulary times rows (models/token_rows.py).
block masks What FlexAttention keeps of a packed row on a GPU, see gdrt_ds/batches/flex_rows.py.

On a CPU the estimate is compared with resident memory beyond the import baseline, and engine buffers are
added. It holds for allocators that reuse freed blocks (tcmalloc, jemalloc). glibc's keeps far more
(docs/benchmarks.md), and the plan says so.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gdrt_ds.batches.flex_rows import block_mask_bytes
from gdrt_ds.config import ModelSection, RunConfig, micro_batch_size
from gdrt_ds.errors import UserError
from gdrt_ds.loss.group_loss import default_chunk_bytes
from gdrt_ds.models.attention import choose_attention
from gdrt_ds.models.families import model_class
from gdrt_ds.models.inventory import Inventory, take_inventory
from gdrt_ds.models.quantization import get_quantization
from gdrt_ds.models.sharded_loading import sharding_obstacle
from gdrt_ds.models.source import compute_dtype, dtype_name
from gdrt_ds.training.deepspeed_config import read_deepspeed_config, zero3_limits, zero_stage
from gdrt_ds.training.memory_use import cpu_allocator, format_bytes

MASK_BYTES = 6  # of a value, while its dropout mask is made (models/prefix_dropout.py)
CPU_ENGINE_BYTES = 160 << 20  # engine, gloo and autograd buffers: an allowance
MOST_WINDOWS = 2
"""Layers have full attention, one sliding window, or some of each: two block masks at most."""
GLIBC_NOTE = (
    "note: this process can hold 2 to 5 times that, because glibc's allocator keeps freed tensors. Where "
    "memory is short, start the run with LD_PRELOAD=libtcmalloc_minimal.so.4 or "
    "LD_PRELOAD=libjemalloc.so.2 (Debian: libtcmalloc-minimal4, libjemalloc2)"
)
DEVICE_RESERVE = (
    0.94  # share of a GPU that tensors can use: context, workspaces and fragmentation take the rest
)


@dataclass
class MemoryPlan:
    """Bytes per rank by cause, their sum, and advice.

    Attributes:
        parts: cause -> bytes.
        host_parts: the same for host memory when parameters or optimizer are offloaded.
        device_bytes: memory of the device, None if unknown (CPU).
        advice: what to change, in order of how little it costs; empty if it fits.
        basis: what the activations were computed for.
        notes: what the figures leave out.
        loading_bytes: what a rank holds while loading, where that is the whole model and not its slice; 0
            otherwise.
        loading_reason: why ranks cannot read slices.
    """

    parts: dict[str, int]
    host_parts: dict[str, int] = field(default_factory=dict)
    device_bytes: int | None = None
    advice: list[str] = field(default_factory=list)
    basis: str = ""
    notes: list[str] = field(default_factory=list)
    loading_bytes: int = 0
    loading_reason: str = ""

    @property
    def peak_bytes(self) -> int:
        return sum(self.parts.values())

    def lines(self) -> list[str]:
        text = ", ".join(
            f"{name} {format_bytes(value)}" for name, value in self.parts.items() if value >= 1 << 20
        )
        out = [f"memory per rank, predicted peak: {format_bytes(self.peak_bytes)} ({text}); {self.basis}"]
        if self.loading_bytes:
            out.append(
                f"while loading, per rank: {format_bytes(self.loading_bytes)}, the whole model "
                f"({self.loading_reason})"
            )
        if self.host_parts:
            out.append(
                "host memory per rank: "
                + ", ".join(f"{name} {format_bytes(value)}" for name, value in self.host_parts.items())
            )
        if self.device_bytes is not None:
            usable = int(self.device_bytes * DEVICE_RESERVE)
            verdict = "it fits"
            if self.loading_bytes > usable:
                verdict = "loading will NOT fit"
            if self.peak_bytes > usable:
                verdict = "it will NOT fit"
            out.append(
                f"the device has {format_bytes(self.device_bytes)}, {format_bytes(usable)} of it for "
                f"tensors: {verdict}"
            )
        return out + self.notes + [f"to make it fit: {line}" for line in self.advice]


def is_eager(config: RunConfig, model_config, on_gpu: bool, dtype: torch.dtype) -> bool:
    """Whether the attention will be transformers' own, which keeps every score: Gemma 2 and gpt-oss."""
    device = torch.device("cuda" if on_gpu else "cpu")
    asked = config.model.attention
    try:
        chosen, _ = choose_attention(asked, device, dtype, model_class(model_config))
    except UserError:  # the run will say what is wrong
        chosen = asked
    return chosen == "eager"


def eager_bytes(model: Inventory, rows: int, tokens: int, size: int) -> int:
    """What eager attention keeps of one layer: its probabilities in float32, their copy in 16 bits, the cap.

    Measured with saved_tensors_hooks: 4 bytes per score in float32, 6 in bfloat16, 8 with a cap in both.
    """
    per_score = 4 + (size if size < 4 else 0) + (size if model.capped else 0)
    return rows * model.heads * (tokens // max(1, rows)) ** 2 * per_score


def activation_bytes_per_token(model: Inventory, size: int, lora_dropout: float, dora: bool = False) -> int:
    """What autograd keeps of one layer for one token.

    Two norms keep input and normalised value in float32 (4 * H * 4); attention keeps query, key, value and
    output; the gated MLP keeps gate, silu(gate) and up; each adapted module keeps its (dropped-out) input,
    a byte mask and r values. DoRA scales the sum of both products of an adapted module, and keeps both.
    Frozen 4-bit products keep no activations.
    """
    norms = 4 * model.hidden * 4
    attention = (2 * model.query + 2 * model.key_value) * size
    mlp = 3 * model.intermediate * size
    adapter = model.lora_inputs * (size + (1 if lora_dropout else 0)) if lora_dropout else 0
    products = 2 * model.lora_outputs * size if dora else 0
    return norms + attention + mlp + adapter + products


def activation_bytes(config: RunConfig, model: Inventory, tokens: int, size: int, scores: int) -> int:
    """What autograd keeps of all layers, or of one and the inputs of the others where they are recomputed.

    Args:
        scores: bytes of attention scores that one layer keeps.
    """
    section = config.model
    layer = tokens * activation_bytes_per_token(model, size, section.lora.dropout, section.lora.dora) + scores
    if section.gradient_checkpointing:
        return tokens * model.layers * model.hidden * size + layer
    return model.layers * layer


def gathered_bytes(config: RunConfig, model: Inventory, zero: dict[str, Any], packed: int, size: int) -> int:
    """Returns the most bytes of whole parameters that ZeRO-3 holds beside the slices.

    The largest unquantised matrix (lm_head) is gathered while the layers beside it may still be there: those
    that are used again within stage3_max_reuse_distance, and those that are fetched ahead, which
    stage3_max_live_parameters bounds.

    Args:
        zero: the ZeRO section of the DeepSpeed config; "auto" is filled here.
        packed: bytes of all packed weights; 0 without quantization.
        size: bytes of one element of the compute dtype.
    """
    layer = model.layer_elements(config.model)
    limits = zero3_limits(model.hidden, layer)
    limits |= {key: value for key, value in zero.items() if key in limits and value != "auto"}
    elements = int(limits["stage3_max_reuse_distance"])
    elements += min(int(limits["stage3_prefetch_bucket_size"]), int(limits["stage3_max_live_parameters"]))
    whole = model.linear * size
    if packed:
        whole = packed
    whole += model.experts * size
    bytes_per_element = whole / max(1, layer * model.layers)
    layers = min(whole, int((elements + layer) * bytes_per_element))
    matrix = model.vocabulary * model.hidden
    matrices = 1
    if model.untied and int(limits["stage3_max_reuse_distance"]) >= matrix:
        matrices = 2  # the embedding is still there when lm_head is gathered
    return layers + matrices * matrix * size


def packed_bytes(section: ModelSection, model: Inventory, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of all packed weights and of their quant_state; none without quantization."""
    bytes_of = get_quantization(section.quantization).bytes_of
    return (0, 0) if bytes_of is None else bytes_of(section, dtype, model.quantised)


def cpu_buffers(model: Inventory, live: int, size: int) -> dict[str, int]:
    """What engine and gloo hold on CPUs; `live` and `size` are of `estimate`."""
    parts = {"engine": CPU_ENGINE_BYTES}
    if live:
        parts["copy while gathering"] = model.vocabulary * model.hidden * size
    return parts


def whole_loading_reason(section: ModelSection, model: Inventory) -> str:
    """Returns why every rank of ZeRO-3 reads the whole model first; empty where each reads its slice."""
    if section.loading == "stock":
        return "model.loading = stock"
    if not get_quantization(section.quantization).loads_sharded:
        return f"model.quantization = {section.quantization} needs whole weights"
    if model.converted:
        return "transformers merges its stored tensors while loading"
    return ""


def mlp_bytes_per_token(config: RunConfig, model: Inventory, size: int) -> int:
    """An MLP's widest product, and beside it a second one or its dropout mask while it is made."""
    mask = MASK_BYTES if config.model.lora.dropout else 0
    return model.intermediate * (size + max(size, mask))


def estimate(
    config: RunConfig,
    model_config,
    world: int,
    device_memory_bytes: int | None,
    *,
    tokens: int | None = None,
    targets: int | None = None,
    token_rows: int = 0,
    deepspeed_config: dict[str, Any] | None = None,
    folder: Path | None = None,
) -> MemoryPlan:
    """Predicted peak per rank.

    Args:
        model_config: the transformers config; no weights are read.
        device_memory_bytes: memory of one GPU; None on a CPU.
        tokens, targets: tokens and supervised tokens of the largest micro-batch; None = the longest
            allowed example, prompt.max_length tokens, 10 % of them targets, in every row.
        token_rows: tokens of `model.lora.trainable_tokens`.
        folder: of the base, to see whether ranks can read slices of its files; None: that is taken for
            granted.
    """
    on_gpu = device_memory_bytes is not None
    dtype = compute_dtype(config.model.dtype, torch.device("cuda" if on_gpu else "cpu"))
    size = torch.empty((), dtype=dtype).element_size()
    raw = deepspeed_config or read_deepspeed_config(config.deepspeed)
    zero, stage = raw.get("zero_optimization") or {}, zero_stage(raw)
    model = take_inventory(config.model, model_config)
    rows = micro_batch_size(config, world, config.train.packing)
    basis = (
        f"{tokens:,} tokens in the largest micro-batch"
        if tokens
        else f"{rows} rows of {config.prompt.max_length} tokens, the longest allowed"
    )
    tokens = tokens or rows * config.prompt.max_length
    targets = targets or max(1, tokens // 10)
    shard = world if stage == 3 else 1
    packed, state = packed_bytes(config.model, model, dtype)
    offload_param = (zero.get("offload_param") or {}).get("device", "none") != "none"
    offload_optimizer = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
    experts = model.experts * size // shard
    resident = packed // shard + model.plain * size // shard
    trained = model.lora + token_rows * model.hidden * (2 if model.untied else 1)
    optimizer = trained * 12 // (world if stage else 1)
    live = 0
    if stage == 3 and (world > 1 or (offload_param and on_gpu)):
        live = gathered_bytes(config, model, zero, packed, size)
    secondary = 0
    replicas = int(zero.get("zero_hpz_partition_size", 1) or 1)
    if stage == 3 and replicas > 1:
        secondary = (packed + model.plain * size) // replicas
    gradients = trained * size // (world if stage >= 2 else 1) + trained * size
    scores = eager_bytes(model, rows, tokens, size) if is_eager(config, model_config, on_gpu, dtype) else 0
    activations = activation_bytes(config, model, tokens, size, scores)
    budget = default_chunk_bytes("cuda" if on_gpu else "cpu", model.vocabulary, size)
    chunk = min(budget, targets * model.vocabulary * 4)
    transient = max(2 * model.largest * size, tokens * mlp_bytes_per_token(config, model, size))
    parts = {
        "base weights": 0 if offload_param else resident - experts,
        "fused experts": 0 if offload_param else experts,
        "quant_state": state,
        "adapter and gradients": trained * size // shard + gradients,
        "optimizer": 0 if offload_optimizer else optimizer,
        "gathered parameters": live,
        "secondary shards": secondary,
        "dequantised and transient": transient,
        "activations": activations,
        "loss": 2 * chunk + 2 * targets * model.hidden * size + token_rows * model.vocabulary * size,
    }
    notes = []
    if model.experts and packed:
        notes.append(
            f"{model.experts:,} of {model.quantised + model.plain:,} parameters are fused experts, which "
            f"model.quantization = {config.model.quantization} does not reach: counted in {dtype_name(dtype)}"
        )
    if on_gpu and config.train.packing != "none":
        parts["block masks"] = block_mask_bytes(tokens, MOST_WINDOWS)
    if not on_gpu:
        parts |= cpu_buffers(model, live, size)
        if cpu_allocator() == "glibc":
            notes.append(GLIBC_NOTE)
    host = {}
    if offload_param:
        host["base weights"] = resident
    if offload_optimizer:
        host["optimizer"] = optimizer
    plan = MemoryPlan(parts, host, device_memory_bytes, basis=basis, notes=notes)
    if stage == 3 and world > 1:
        plan.loading_reason = whole_loading_reason(config.model, model)
        if folder is not None and not plan.loading_reason:
            plan.loading_reason = sharding_obstacle(folder, model_config, config.model, dtype, raw)
    if plan.loading_reason:
        plan.loading_bytes = packed + state + model.plain * size
    if on_gpu and plan.peak_bytes > device_memory_bytes * DEVICE_RESERVE:
        plan.advice = advise(
            config,
            plan,
            model,
            stage,
            world,
            rows,
            live,
            activations,
            int(device_memory_bytes * DEVICE_RESERVE),
        )
    return plan


def advise(
    config: RunConfig,
    plan: MemoryPlan,
    model: Inventory,
    stage: int,
    world: int,
    rows: int,
    live: int,
    activations: int,
    usable: int,
) -> list[str]:
    """Settings that lower the peak, cheapest first, with what each is expected to save."""
    advice = []
    if config.model.quantization == "none":
        advice.append(
            f"model.quantization=nf4 (base weights {format_bytes(plan.parts['base weights'])} -> about a "
            "quarter)"
        )
    if stage != 3 and world > 1:
        advice.append(f"ds_configs/zero3_qlora.json (base weights / {world})")
    if live > usable // 4:
        advice.append(
            "stage3_max_reuse_distance and stage3_prefetch_bucket_size in the DeepSpeed config at auto or 0 "
            f"(gathered parameters {format_bytes(live)})"
        )
    if not config.model.gradient_checkpointing:
        saved = int(activations * (1 - 1 / max(2, model.layers)))
        advice.append(
            f"model.gradient_checkpointing=true (saves about {format_bytes(saved)} of activations, costs a "
            "third of the step)"
        )
    if rows > 1:
        advice.append(
            f"train.micro_batch={max(1, rows // 2)} (activations halve; accumulation keeps the global batch)"
        )
    if config.prompt.max_length > 512:
        advice.append("prompt.max_length=512 (the oldest history goes first)")
    advice.append(f"more ranks than {world}, or ds_configs/zero3_offload.json (base weights in host memory)")
    return advice
