"""`group_cross_entropy`: the loss of a language-model head, summed per group, without an [N, V] logits
tensor.

Two ways, chosen by whether the head is trained:
- frozen head (QLoRA), one pass, 2 matrix products: rows of the hidden gradient are never summed, so the
forward stores the gradient
  of each row's own loss, and the backward scales row i by dF/dS_g(i) + dF/dl_i, which may be known only
  after an all-reduce.
- trained head (full fine-tuning, bias, LoRA on the head), 3 products and those of the head's gradient: the
forward keeps one
  normaliser per row, the backward multiplies again, a block of the vocabulary at a time, so each row of dW
  is made once.
Without grad it is one product.

Shapes: N supervised tokens, H hidden, V vocabulary, G groups, r rank of a LoRA pair; C, V for the rows and
columns of one chunk.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch

from gdrt_ds.errors import UserError
from gdrt_ds.loss.allowed import AllowedChunk, AllowedPlan, AllowedTokens, plan_allowed
from gdrt_ds.loss.head import Head, product_dtype
from gdrt_ds.loss.reference import reference_group_cross_entropy
from gdrt_ds.loss.rowwise import TorchRowwise

log = logging.getLogger("gdrt_ds.loss")

# Bytes of logits alive at once. CUDA: 1,000 rows of a 256k vocabulary in bfloat16, enough for the head to be
# read once per 1,000 tokens.
# CPU: 32 MiB, and for one pass 512 rows more. Both of its products read the whole head once per chunk, which
# large heads and several threads
# on one memory bus pay for: at H = 2,304 a row in a chunk of 32 costs twice what it costs in one of 256
# (benchmarks/group_loss.py --chunk-rows).
# The other ways go over the vocabulary in blocks and read the head once whatever the budget is.
CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 512 * 2**20}
CPU_CHUNK_ROWS = 512


def default_chunk_bytes(
    device_type: str, vocabulary: int, bytes_per_logit: int, one_pass: bool = True
) -> int:
    """The budget for logits when the caller names none."""
    least = CHUNK_BYTES.get(device_type, 256 * 2**20)
    return (
        least + CPU_CHUNK_ROWS * vocabulary * bytes_per_logit if device_type == "cpu" and one_pass else least
    )


class GroupLoss(NamedTuple):
    """loss_sums[G] (float64): sum over tokens of each group; token_losses[N] (float32; float64 for a
    float64 head). Both in nats,
    both differentiable: row i's gradient is scaled by d loss_sums[group_i] + d token_losses[i]."""

    loss_sums: torch.Tensor
    token_losses: torch.Tensor


@dataclass(frozen=True)
class Settings:
    """Everything of one call that is not a tensor."""

    num_groups: int
    logit_scale: float
    softcap: float | None
    temperature: float
    lora_scale: float
    chunk_bytes: int
    implementation: str
    one_pass: bool

    @property
    def slope(self) -> float:
        """d (final logit) / d (product with the head), apart from the derivative of tanh."""
        return self.logit_scale / self.temperature


def group_cross_entropy(
    hidden: torch.Tensor,  # [N, H]
    weight: torch.Tensor,  # [V, H]
    labels: torch.Tensor,  # [N] integer in [0, V)
    groups: torch.Tensor,  # [N] integer in [0, G)
    num_groups: int,
    *,
    bias: torch.Tensor | None = None,  # [V]
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    allowed: AllowedTokens | None = None,
    lora: tuple[torch.Tensor, torch.Tensor, float] | None = None,  # A[r, H], B[V, r], scale
    frozen_weight: bool | None = None,
    chunk_bytes: int | None = None,
    implementation: str = "auto",
) -> GroupLoss:
    """Cross-entropy of `softcap * tanh(logit_scale * (hidden W^T + bias + lora) / softcap) / temperature`,
    summed per group.

    Args:
        hidden: hidden states of supervised positions only; converted to the head's dtype if it differs. N
            may be 0: the result is then zeros that stay attached to the graph, so that ranks without
            tokens still take part in the backward.
        labels, groups: no ignore index; -100 is refused (on CUDA by a device-side assertion, without a
        host synchronisation).
        softcap: Gemma-2's final_logit_softcapping; applied after logit_scale (Cohere) and before temperature.
        allowed: softmax over these tokens only (MSL, SIGIR 2025). Keep its tensors on the CPU.
        lora: a low-rank term of the head, scale * (hidden A^T) B^T, trained if A or B requires grad. No
        dropout inside.
        frozen_weight: True skips the weight's gradient and allows one pass; None: `not
        weight.requires_grad`; False: recompute.
        chunk_bytes: budget for logits; None: on CPUs 32 MiB, and 512 rows more for one pass; 512 MiB on
            CUDA. Memory beyond the inputs is this plus N*H elements
            (plus the gradient of the head when it is trained, plus the gathered rows of the head with
            `allowed`).
        implementation: "auto" (Triton on CUDA, torch elsewhere; announced once by the logger
            gdrt_ds.loss), "torch", "triton" (also on
            CPUs under TRITON_INTERPRET=1), "reference" (plain torch with all logits, in the head's dtype).

    Returns: GroupLoss. Under ZeRO-3 call it inside the forward of the module that owns the head: the
    frozen case keeps no
        alias of the weight; the trained case saves the parameter itself, which the module's backward hook
        gathers again.
    Raises: UserError for shapes, labels, groups or settings that do not fit.
    """
    _check_shapes(hidden, weight, labels, groups, num_groups, bias, lora)
    for name, value in (
        ("temperature", temperature),
        ("softcap", 1.0 if softcap is None else softcap),
        ("logit_scale", logit_scale),
    ):
        if not value > 0:
            raise UserError(f"{name} is {value}, but must be positive", f"set {name} to a positive number")
    if implementation not in ("auto", "torch", "triton", "reference"):
        raise UserError(f"implementation is {implementation!r}", "use one of auto, torch, triton, reference")
    labels, groups = labels.long(), groups.long()
    _check_range(
        "labels",
        labels,
        weight.shape[0],
        "pass supervised positions only: the op has no ignore index such as -100",
    )
    _check_range("groups", groups, num_groups, "give every token a group in [0, num_groups)")
    if implementation == "reference":
        sums, losses = reference_group_cross_entropy(
            hidden.to(weight.dtype),
            weight,
            labels,
            groups,
            num_groups,
            bias=bias,
            logit_scale=logit_scale,
            softcap=softcap,
            temperature=temperature,
            allowed=allowed,
            lora=lora,
            dtype=None,
        )
        return GroupLoss(sums, losses)
    implementation, why = _choose(implementation, weight.device.type, weight.dtype)
    _announce(implementation, why, weight.device.type, weight.dtype)
    frozen = not weight.requires_grad if frozen_weight is None else frozen_weight
    if frozen:
        weight = weight.detach() if weight.requires_grad else weight
    a_rH, b_Vr, lora_scale = lora if lora is not None else (None, None, 1.0)
    others_frozen = not any(t is not None and t.requires_grad for t in (bias, a_rH, b_Vr))
    one_pass = frozen and others_frozen and hidden.requires_grad and torch.is_grad_enabled()
    if chunk_bytes is None:
        chunk_bytes = default_chunk_bytes(
            weight.device.type, weight.shape[0], weight.element_size(), one_pass and allowed is None
        )
    settings = Settings(
        num_groups=num_groups,
        logit_scale=float(logit_scale),
        softcap=None if softcap is None else float(softcap),
        temperature=float(temperature),
        lora_scale=float(lora_scale),
        chunk_bytes=chunk_bytes,
        implementation=implementation,
        one_pass=one_pass,
    )
    plan = None
    if allowed is not None:
        plan = plan_allowed(allowed, len(labels), weight.shape[0], settings.chunk_bytes, 12, weight.device)
    # Autocast would cast the operands of each product again; the dtypes are decided here.
    with torch.autocast(weight.device.type, enabled=False):
        sums, losses = _GroupCrossEntropy.apply(
            hidden.to(weight.dtype), weight, bias, a_rH, b_Vr, labels, groups, plan, settings
        )
    return GroupLoss(sums, losses)


class _GroupCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, a_rH, b_Vr, labels, groups, plan, settings):
        ctx.set_materialize_grads(False)
        head, rowwise = _tools(hidden, weight, bias, a_rH, b_Vr, settings)
        losses_N = hidden.new_zeros(len(labels), dtype=rowwise.accumulate)
        normaliser_2N = losses_N.new_zeros(2, len(labels))
        unit_NH = torch.zeros_like(hidden) if settings.one_pass and plan is not None else None
        if settings.one_pass and plan is None:
            unit_NH = torch.empty_like(hidden)
        if plan is not None:
            _forward_allowed(head, rowwise, plan, hidden, labels, losses_N, normaliser_2N, unit_NH)
        elif settings.one_pass:
            _forward_one_pass(head, rowwise, hidden, labels, losses_N, unit_NH)
        else:
            _forward_streaming(head, rowwise, hidden, labels, losses_N, normaliser_2N)
        sums_G = rowwise.group_sums(losses_N, groups, settings.num_groups)
        if settings.one_pass:
            ctx.save_for_backward(groups, unit_NH)
        else:
            ctx.save_for_backward(groups, labels, normaliser_2N, hidden, weight, bias, a_rH, b_Vr)
        ctx.plan, ctx.settings = plan, settings
        return sums_G, losses_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_sums_G, d_losses_N):
        nothing = (None,) * 9
        if d_sums_G is None and d_losses_N is None:
            return nothing
        # Read once: under non-reentrant activation checkpointing each read would run the forward again, and
        # the second raises.
        groups, *saved = ctx.saved_tensors
        coefficient_N = torch.zeros(len(groups), dtype=torch.float64, device=groups.device)
        if d_sums_G is not None:
            coefficient_N = d_sums_G.to(torch.float64)[groups]
        if d_losses_N is not None:
            coefficient_N = coefficient_N + d_losses_N
        with torch.autocast(groups.device.type, enabled=False):
            if ctx.settings.one_pass:
                return (_scale_rows(saved[0], coefficient_N), *nothing[1:])
            return (*_backward_recompute(ctx, saved, coefficient_N), *nothing[5:])


def _tools(hidden, weight, bias, a_rH, b_Vr, settings: Settings):
    if settings.implementation == "triton":
        from gdrt_ds.loss.kernels import (
            TritonRowwise as Rowwise,
        )  # imported here: triton is absent from CPU builds of torch
    else:
        Rowwise = TorchRowwise
    rowwise = Rowwise(settings, product_dtype(weight.dtype, weight.device.type)[0])
    lora = None if a_rH is None else (a_rH, b_Vr, settings.lora_scale)
    return Head(weight, bias, lora, rowwise.head_gain, rowwise.accumulate), rowwise


def _forward_one_pass(head: Head, rowwise, hidden_NH, labels_N, losses_N, unit_NH) -> None:
    """Chunks of complete rows: logits, softmax - onehot in place, and back through the head."""
    num_rows, vocabulary = len(hidden_NH), head.weight.shape[0]
    columns = slice(0, vocabulary)
    for rows, buffer_CV in rowwise.row_chunks(num_rows, vocabulary, hidden_NH.device, head.scratch_per_row):
        head.rows(hidden_NH[rows]).logits(columns, buffer_CV)
        losses_N[rows], _ = rowwise.finish_rows_(buffer_CV, labels_N[rows], None)
        head.backproject(buffer_CV, columns, unit_NH[rows], add=False, slope=rowwise.gradient_slope)


def _forward_streaming(head: Head, rowwise, hidden_NH, labels_N, losses_N, normaliser_2N) -> None:
    """Blocks of the vocabulary with a running log-sum-exp.

    The head is read once, nothing of size [N, V] or [N, H] is kept.
    """
    for rows in rowwise.row_blocks(len(hidden_NH)):
        prepared, labels_C = head.rows(hidden_NH[rows]), labels_N[rows]
        state = rowwise.start_rows(labels_C)
        for columns, buffer_CV in rowwise.column_blocks(len(labels_C), head.weight.shape[0], labels_C.device):
            prepared.logits(columns, buffer_CV)
            rowwise.extend_rows_(buffer_CV, labels_C, columns.start, state)
        losses_N[rows], normaliser_2N[:, rows] = rowwise.end_rows(state)


def _forward_allowed(
    head: Head, rowwise, plan: AllowedPlan, hidden_NH, labels_N, losses_N, normaliser_2N, unit_NH
) -> None:
    _require(
        labels_N[plan.single_rows] == plan.single_tokens,
        "a label is not the single allowed token of its trie node",
        _ALLOWED_FIX,
    )
    for chunk in plan.chunks:
        part, columns_C, buffer_CV = _allowed_logits(head, rowwise, chunk, hidden_NH, labels_N)
        losses_N[chunk.rows], normaliser_2N[:, chunk.rows] = rowwise.finish_rows_(
            buffer_CV, columns_C, _forbidden(chunk)
        )
        if unit_NH is not None:
            unit_CH = torch.empty_like(hidden_NH[chunk.rows])
            part.backproject(
                buffer_CV, slice(0, len(chunk.tokens)), unit_CH, add=False, slope=rowwise.gradient_slope
            )
            unit_NH[chunk.rows] = unit_CH


def _allowed_logits(head: Head, rowwise, chunk: AllowedChunk, hidden_NH, labels_N):
    """The gathered head, the labels' columns in it, and the chunk's logits."""
    part, labels_C = head.gathered(chunk.tokens), labels_N[chunk.rows]
    columns_C = torch.searchsorted(chunk.tokens, labels_C).clamp_(max=len(chunk.tokens) - 1)
    permitted_C = chunk.tokens[columns_C] == labels_C
    if chunk.forbidden is not None:
        permitted_C &= ~chunk.forbidden[chunk.node_slot, columns_C]
    _require(permitted_C, "a label is not among the allowed tokens of its trie node", _ALLOWED_FIX)
    buffer_CV = rowwise.buffer(len(labels_C), len(chunk.tokens), hidden_NH.device)
    part.rows(hidden_NH[chunk.rows]).logits(slice(0, len(chunk.tokens)), buffer_CV)
    return part, columns_C, buffer_CV


def _forbidden(chunk: AllowedChunk) -> torch.Tensor | None:
    return None if chunk.forbidden is None else chunk.forbidden[chunk.node_slot]


def _scale_rows(unit_NH: torch.Tensor, coefficient_N: torch.Tensor) -> torch.Tensor:
    """Row i times coefficient i, in place unless the caller keeps the graph for another backward.

    Products in float32.
    """
    keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)()
    out_NH = torch.empty_like(unit_NH) if keeps_graph else unit_NH
    scale_N1 = coefficient_N.to(torch.float64 if unit_NH.dtype == torch.float64 else torch.float32).view(
        -1, 1
    )
    if unit_NH.dtype in (torch.float32, torch.float64) or unit_NH.device.type != "cpu":
        return torch.mul(unit_NH, scale_N1, out=out_NH)
    for start in range(
        0, len(unit_NH), 1024
    ):  # torch on CPUs converts whole operands: bounded by blocks of rows
        part = slice(start, start + 1024)
        torch.mul(unit_NH[part], scale_N1[part], out=out_NH[part])
    return out_NH


def _backward_recompute(ctx, saved, coefficient_N: torch.Tensor):
    """Gradients of hidden, weight, bias, A and B.

    The logits again, a block of the vocabulary at a time (or an allowed chunk).
    """
    labels_N, normaliser_2N, hidden_NH, weight, bias, a_rH, b_Vr = saved
    settings, plan, wants = ctx.settings, ctx.plan, ctx.needs_input_grad
    head, rowwise = _tools(hidden_NH, weight, bias, a_rH, b_Vr, settings)
    row_blocks = list(rowwise.row_blocks(len(hidden_NH)))
    grads = _HeadGradients(
        head, hidden_NH, wants, rowwise.accumulate, once=plan is None and len(row_blocks) == 1
    )
    scaled_N = (coefficient_N * settings.slope).to(rowwise.accumulate)
    if plan is not None:
        for chunk in plan.chunks:
            part, columns_C, buffer_CV = _allowed_logits(head, rowwise, chunk, hidden_NH, labels_N)
            rowwise.gradient_(
                buffer_CV, columns_C, 0, normaliser_2N[:, chunk.rows], scaled_N[chunk.rows], _forbidden(chunk)
            )
            grads.add(part, buffer_CV, chunk.rows, slice(0, len(chunk.tokens)), chunk.tokens)
        return grads.finish()
    widest = max((r.stop - r.start for r in row_blocks), default=0)
    prepared = [head.rows(hidden_NH[r]) for r in row_blocks]
    for columns, buffer_CV in rowwise.column_blocks(widest, weight.shape[0], hidden_NH.device):
        for rows, rows_prepared in zip(row_blocks, prepared):
            part_CV = buffer_CV[: rows.stop - rows.start]
            rows_prepared.logits(columns, part_CV)
            rowwise.gradient_(
                part_CV, labels_N[rows], columns.start, normaliser_2N[:, rows], scaled_N[rows], None
            )
            grads.add(head, part_CV, rows, columns, columns)
    return grads.finish()


class _HeadGradients:
    """Accumulates the gradients of a recomputed backward in float32 (a block of dW that only one product
    makes, in its own dtype).
    """

    def __init__(self, head: Head, hidden_NH, wants, accumulate, once: bool):
        self.head, self.hidden_NH, self.accumulate = head, hidden_NH, accumulate
        hidden, weight, bias, a_rH, b_Vr = wants[:5]

        def zeros(like, wanted):
            return torch.zeros(like.shape, dtype=accumulate, device=like.device) if wanted else None

        self.d_hidden = zeros(hidden_NH, hidden)
        # Without `scattered` or several row blocks each row of dW is made by one product: no accumulation, no
        # wider copy.
        self.weight_once = weight and once
        self.d_weight = torch.empty_like(head.weight) if self.weight_once else zeros(head.weight, weight)
        self.d_bias = zeros(head.bias, bias) if bias else None
        self.has_lora, self.wants_a = head.lora is not None, a_rH
        self.low_Nr = self.d_b = None
        if self.has_lora:
            rank = head.lora[0].shape[0]
            if hidden or a_rH:
                self.low_Nr = torch.zeros(len(hidden_NH), rank, dtype=accumulate, device=hidden_NH.device)
            self.d_b = zeros(head.lora[1], b_Vr)

    def add(self, part: Head, gradient_CV, rows, part_columns: slice, target) -> None:
        """`part`'s columns `part_columns` are rows `target` (a slice, or distinct token ids) of the whole
        head.
        """
        x_CH = self.hidden_NH[rows]
        if self.d_hidden is not None:
            if isinstance(rows, slice):
                part.backproject(gradient_CV, part_columns, self.d_hidden[rows], add=True)
            else:
                d_CH = torch.empty(x_CH.shape, dtype=self.accumulate, device=x_CH.device)
                part.backproject(gradient_CV, part_columns, d_CH, add=False)
                self.d_hidden[rows] = d_CH
        if self.weight_once:
            if part.converts:
                self.d_weight[target] = gradient_CV.T @ x_CH.to(part.dtype)
            else:
                torch.mm(gradient_CV.T, x_CH, out=self.d_weight[target])
        elif self.d_weight is not None:
            self._into(self.d_weight, target, gradient_CV.T @ x_CH.to(part.dtype))
        if self.d_bias is not None:
            self._into(self.d_bias, target, gradient_CV.sum(0, dtype=self.accumulate))
        if self.has_lora:
            a_rH, b_Vr, scale = part.lora
            if self.low_Nr is not None:
                self.low_Nr[rows] += (gradient_CV @ b_Vr[part_columns].to(part.dtype)).to(
                    self.accumulate
                ) * scale
            if self.d_b is not None:
                low_rank_Cr = (x_CH.to(self.accumulate) @ a_rH.to(self.accumulate).T) * scale
                self._into(self.d_b, target, gradient_CV.T @ low_rank_Cr.to(part.dtype))

    def _into(self, whole, target, value) -> None:
        if isinstance(target, slice):
            whole[target] += value
        else:
            whole.index_add_(
                0, target, value.to(whole.dtype)
            )  # ids are distinct within a chunk: no collision, a fixed order

    def finish(self):
        d_a = None
        if self.has_lora:
            a_rH = self.head.lora[0]
            if self.d_hidden is not None:
                self.d_hidden.addmm_(self.low_Nr, a_rH.to(self.accumulate))
            if self.wants_a:
                d_a = (self.low_Nr.T @ self.hidden_NH.to(self.accumulate)).to(a_rH.dtype)

        def like(gradient, tensor):
            return None if gradient is None else gradient.to(tensor.dtype)

        head = self.head
        d_b = None if not self.has_lora else like(self.d_b, head.lora[1])
        return (
            like(self.d_hidden, self.hidden_NH),
            like(self.d_weight, head.weight),
            like(self.d_bias, head.bias),
            d_a,
            d_b,
        )


_ALLOWED_FIX = (
    "the label must be a child of its trie node; build the trie and the labels from the same target_ids"
)


def _require(holds: torch.Tensor, problem: str, fix: str) -> None:
    """Raises on CPUs; asserts on the device elsewhere, where reading the answer would stop the host."""
    if holds.device.type != "cpu":
        torch._assert_async(holds.all(), f"{problem}; {fix}")
    elif not bool(holds.all()):
        row = int((~holds).nonzero()[0])
        raise UserError(f"{problem} (entry {row} of those checked)", fix)


def _check_range(name: str, values: torch.Tensor, stop: int, fix: str) -> None:
    if values.device.type != "cpu":
        torch._assert_async(((values >= 0) & (values < stop)).all(), f"{name} must lie in [0, {stop}); {fix}")
    elif len(values) and (int(values.min()) < 0 or int(values.max()) >= stop):
        raise UserError(
            f"{name} holds values {int(values.min())}..{int(values.max())}, but must lie in [0, {stop})", fix
        )


def _check_shapes(hidden, weight, labels, groups, num_groups, bias, lora) -> None:
    def expect(name, tensor, shape):
        if tuple(tensor.shape) != shape:
            expected = (
                f"with hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} it must be {shape}"
            )
            raise UserError(f"{name} has shape {tuple(tensor.shape)}", expected)

    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise UserError(
            f"hidden has shape {tuple(hidden.shape)} and weight {tuple(weight.shape)}",
            "pass hidden [N, H] and weight [V, H]; under ZeRO-3 call the op inside the forward of the "
            "module that owns the head",
        )
    expect("labels", labels, (hidden.shape[0],))
    expect("groups", groups, (hidden.shape[0],))
    if num_groups < 1:
        raise UserError(f"num_groups is {num_groups}", "use at least one group")
    if bias is not None:
        expect("bias", bias, (weight.shape[0],))
    if lora is not None:
        rank = lora[0].shape[0]
        expect("lora A", lora[0], (rank, hidden.shape[1]))
        expect("lora B", lora[1], (weight.shape[0], rank))


@cache
def _choose(implementation: str, device_type: str, dtype: torch.dtype) -> tuple[str, str]:
    if implementation == "torch":
        return "torch", "asked for"
    try:
        from gdrt_ds.loss import kernels

        problem = kernels.why_unusable(device_type, dtype)
    except ImportError as error:
        problem = f"triton cannot be imported ({error})"
    if implementation == "triton":
        if problem:
            raise UserError(
                f"implementation='triton' cannot be used: {problem}",
                "use implementation='auto' or install triton",
            )
        return "triton", "asked for"
    if device_type == "cpu":
        return "torch", "CPU tensors"
    return (
        ("torch", f"slower than the Triton kernels, but {problem}")
        if problem
        else ("triton", f"{device_type} tensors")
    )


@cache
def _announce(implementation: str, why: str, device_type: str, dtype: torch.dtype) -> str:
    product, reason = product_dtype(dtype, device_type)
    line = f"group loss: {implementation} ({why}); head {dtype} multiplied in {product} ({reason})"
    log.log(logging.WARNING if "slower" in why else logging.INFO, line)
    return line


def describe(
    device_type: str = "cpu", dtype: torch.dtype = torch.float32, implementation: str = "auto"
) -> str:
    """One line: which implementation and product dtype a head of `dtype` on this kind of device gets, and
    why.
    """
    return _announce(*_choose(implementation, device_type, dtype), device_type, dtype)
