"""`group_cross_entropy`: the loss of a language-model head, summed per group, without [N, V] logits.

There are two ways, and whether the head is trained decides between them:

- Frozen head (QLoRA): one pass, 2 matrix products. Rows of the hidden gradient are never summed. So the
  forward stores the gradient of each row's own loss, and the backward scales row i by dF/dS_g(i) + dF/dl_i,
  which may be known only after an all-reduce.
- Trained head (full fine-tuning, bias, LoRA on the head): 3 products, and those of the head's gradient. The
  forward keeps one normaliser per row. The backward multiplies again, a block of the vocabulary at a time, so
  that each row of dW is made once.

Without grad it is one product.

Shapes: N supervised tokens, H hidden, V vocabulary, G groups, r rank of a LoRA pair; C, V for the rows and
columns of one chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from gdrt_ds.loss.allowed import AllowedChunk, AllowedPlan, AllowedTokens, plan_allowed
from gdrt_ds.loss.checks import ALLOWED_FIX, check_positive, check_range, check_shapes, require
from gdrt_ds.loss.head import Head, product_dtype
from gdrt_ds.loss.head_gradients import HeadGradients
from gdrt_ds.loss.implementations import announce, check_implementation, choose
from gdrt_ds.loss.reference import reference_group_cross_entropy, reference_top_k_log_probs
from gdrt_ds.loss.rowwise import TorchRowwise
from gdrt_ds.loss.top_k import RunningTopK, largest, log_probability

CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 512 * 2**20}
"""Bytes of logits alive at once. On CUDA these are 1,000 rows of a 256k vocabulary in bfloat16, enough for
the head to be read once per 1,000 tokens."""

CPU_CHUNK_ROWS = 512
"""Rows of logits that one pass on a CPU gets besides. Both of its products read the whole head once per
chunk, which large heads and several threads on one memory bus pay for: at H = 2,304 a row in a chunk of 32
costs twice what it costs in one of 256 (benchmarks/group_loss.py --chunk-rows). The other ways go over the
vocabulary in blocks and read the head once whatever the budget is."""


def default_chunk_bytes(
    device_type: str, vocabulary: int, bytes_per_logit: int, one_pass: bool = True
) -> int:
    """Returns the budget for logits when the caller names none."""
    least = CHUNK_BYTES.get(device_type, 256 * 2**20)
    if device_type == "cpu" and one_pass:
        return least + CPU_CHUNK_ROWS * vocabulary * bytes_per_logit
    return least


class GroupLoss(NamedTuple):
    """Losses in nats, per group and per token.

    Both are differentiable: row i's gradient is scaled by d loss_sums[group_i] + d token_losses[i].
    """

    loss_sums: torch.Tensor
    """[G], float64: the sum over the tokens of each group."""
    token_losses: torch.Tensor
    """[N], float32; float64 for a float64 head."""
    top_k_log_probs: torch.Tensor | None = None
    """[N], not differentiable, in the dtype of token_losses: the K-th largest log-probability; None without
    `top_k`."""


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
    top_k: int | None = None

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
    top_k: int | None = None,
) -> GroupLoss:
    """Cross-entropy of the head's softmax, summed per group.

    The logits are `softcap * tanh(logit_scale * (hidden W^T + bias + lora) / softcap) / temperature`. Under
    ZeRO-3 call it inside the forward of the module that owns the head: the frozen case keeps no alias of the
    weight, and the trained case saves the parameter itself, which the module's backward hook gathers again.

    Args:
        hidden: hidden states of supervised positions only; converted to the head's dtype if it differs. N may
            be 0: the result is then zeros that stay attached to the graph, so that ranks without tokens still
            take part in the backward.
        weight: of the head.
        labels: target token ids. There is no ignore index: -100 is refused (on CUDA by a device-side
            assertion, without a host synchronisation).
        groups: the group of each target token, from 0 to G - 1; checked in the same way.
        num_groups: G.
        bias: of the head.
        logit_scale: multiplies the logits (Cohere).
        softcap: Gemma-2's final_logit_softcapping; applied after logit_scale and before temperature.
        temperature: divides the logits.
        allowed: softmax over these tokens only (MSL, SIGIR 2025). Keep its tensors on the CPU.
        lora: a low-rank term of the head, scale * (hidden A^T) B^T, trained if A or B requires grad. There is
            no dropout inside.
        frozen_weight: True skips the weight's gradient and allows one pass; None means `not
            weight.requires_grad`; False recomputes.
        chunk_bytes: budget for logits. None: on CPUs 32 MiB, and 512 rows more for one pass; 512 MiB on CUDA.
            Memory beyond the inputs is this plus N*H elements, plus the gradient of the head when it is
            trained, plus the gathered rows of the head with `allowed`.
        implementation: "auto" takes Triton on CUDA and torch elsewhere, and the logger gdrt_ds.loss says once
            which. "torch" and "triton" ask for one (Triton also on CPUs, under TRITON_INTERPRET=1).
            "reference" is plain torch with all logits, in the head's dtype.
        top_k: K >= 1 asks for the K-th largest log-probability of each row besides, over the tokens that it
            may choose; the smallest where there are fewer than K. It is torch.topk on each chunk, beside
            the Triton kernels too: one more read of the chunk, and no [N, V] logits.

    Returns:
        sums per group and losses per token, and the K-th log-probabilities if asked for.

    Raises:
        UserError: shapes, labels, groups or settings do not fit.
    """
    check_shapes(hidden, weight, labels, groups, num_groups, bias, lora)
    check_positive("temperature", temperature)
    check_positive("softcap", softcap)
    check_positive("logit_scale", logit_scale)
    check_positive("top_k", top_k)
    check_implementation(implementation)
    labels = labels.long()
    groups = groups.long()
    check_range(
        "labels",
        labels,
        weight.shape[0],
        "pass supervised positions only: the op has no ignore index such as -100",
    )
    check_range("groups", groups, num_groups, "give every token a group in [0, num_groups)")
    if implementation == "reference":
        settings = {
            "bias": bias,
            "logit_scale": logit_scale,
            "softcap": softcap,
            "temperature": temperature,
            "allowed": allowed,
            "lora": lora,
            "dtype": None,
        }
        rounded = hidden.to(weight.dtype)
        sums, losses = reference_group_cross_entropy(rounded, weight, labels, groups, num_groups, **settings)
        if top_k is None:
            return GroupLoss(sums, losses)
        return GroupLoss(sums, losses, reference_top_k_log_probs(rounded, weight, top_k, **settings))
    implementation, why = choose(implementation, weight.device.type, weight.dtype)
    announce(implementation, why, weight.device.type, weight.dtype)
    frozen = frozen_weight
    if frozen is None:
        frozen = not weight.requires_grad
    if frozen and weight.requires_grad:
        weight = weight.detach()
    a_rH, b_Vr, lora_scale = lora or (None, None, 1.0)
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
        top_k=top_k,
    )
    plan = None
    if allowed is not None:
        plan = plan_allowed(allowed, len(labels), weight.shape[0], settings.chunk_bytes, 12, weight.device)
    # Autocast would cast the operands of each product again; the dtypes are decided here.
    with torch.autocast(weight.device.type, enabled=False):
        sums, losses, kth = _GroupCrossEntropy.apply(
            hidden.to(weight.dtype), weight, bias, a_rH, b_Vr, labels, groups, plan, settings
        )
    return GroupLoss(sums, losses, kth)


class _GroupCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, a_rH, b_Vr, labels, groups, plan, settings):
        ctx.set_materialize_grads(False)
        head, rowwise = _tools(weight, bias, a_rH, b_Vr, settings)
        losses_N = hidden.new_zeros(len(labels), dtype=rowwise.accumulate)
        normaliser_2N = losses_N.new_zeros(2, len(labels))
        kth_N = None
        if settings.top_k is not None:
            kth_N = torch.zeros_like(losses_N)  # 0 is the log-probability of a token without alternative
            ctx.mark_non_differentiable(kth_N)
        unit_NH = None
        if settings.one_pass and plan is None:
            unit_NH = torch.empty_like(hidden)
        elif settings.one_pass:
            # Rows with a single allowed token never reach the head; their gradient stays zero.
            unit_NH = torch.zeros_like(hidden)
        if plan is not None:
            _forward_allowed(head, rowwise, plan, hidden, labels, losses_N, normaliser_2N, unit_NH, kth_N)
        elif settings.one_pass:
            _forward_one_pass(head, rowwise, hidden, labels, losses_N, unit_NH, kth_N)
        else:
            _forward_streaming(head, rowwise, hidden, labels, losses_N, normaliser_2N, kth_N)
        sums_G = rowwise.group_sums(losses_N, groups, settings.num_groups)
        if settings.one_pass:
            ctx.save_for_backward(groups, unit_NH)
        else:
            ctx.save_for_backward(groups, labels, normaliser_2N, hidden, weight, bias, a_rH, b_Vr)
        ctx.plan = plan
        ctx.settings = settings
        return sums_G, losses_N, kth_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_sums_G, d_losses_N, _):
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


def _tools(weight, bias, a_rH, b_Vr, settings: Settings):
    """Returns the head's products, and what happens to a chunk of logits between them."""
    if settings.implementation == "triton":
        # Imported here: triton is absent from CPU builds of torch.
        from gdrt_ds.loss.kernels import TritonRowwise as Rowwise
    else:
        Rowwise = TorchRowwise
    rowwise = Rowwise(settings, product_dtype(weight.dtype, weight.device.type)[0])
    lora = None
    if a_rH is not None:
        lora = (a_rH, b_Vr, settings.lora_scale)
    return Head(weight, bias, lora, rowwise.head_gain, rowwise.accumulate), rowwise


def _forward_one_pass(head: Head, rowwise, hidden_NH, labels_N, losses_N, unit_NH, kth_N) -> None:
    """Chunks of complete rows: logits, softmax - onehot in place, and back through the head."""
    num_rows = len(hidden_NH)
    vocabulary = head.weight.shape[0]
    columns = slice(0, vocabulary)
    for rows, buffer_CV in rowwise.row_chunks(num_rows, vocabulary, hidden_NH.device, head.scratch_per_row):
        head.rows(hidden_NH[rows]).logits(columns, buffer_CV)
        kth_C = None
        if kth_N is not None:
            kth_C = largest(buffer_CV, rowwise.top_k)
        losses_N[rows], normaliser_2C = rowwise.finish_rows_(buffer_CV, labels_N[rows], None)
        if kth_C is not None:
            kth_N[rows] = log_probability(rowwise, kth_C, normaliser_2C)
        head.backproject(buffer_CV, columns, unit_NH[rows], add=False, slope=rowwise.gradient_slope)


def _forward_streaming(head: Head, rowwise, hidden_NH, labels_N, losses_N, normaliser_2N, kth_N) -> None:
    """Blocks of the vocabulary with a running log-sum-exp, and running K largest logits where asked for.

    The head is read once, nothing of size [N, V] or [N, H] is kept.
    """
    for rows in rowwise.row_blocks(len(hidden_NH)):
        prepared = head.rows(hidden_NH[rows])
        labels_C = labels_N[rows]
        state = rowwise.start_rows(labels_C)
        running = None
        if kth_N is not None:
            running = RunningTopK(rowwise.top_k)
        for columns, buffer_CV in rowwise.column_blocks(len(labels_C), head.weight.shape[0], labels_C.device):
            prepared.logits(columns, buffer_CV)
            if running is not None:
                running.extend(buffer_CV)
            rowwise.extend_rows_(buffer_CV, labels_C, columns.start, state)
        losses_N[rows], normaliser_2N[:, rows] = rowwise.end_rows(state)
        if running is not None:
            kth_N[rows] = log_probability(rowwise, running.smallest(), normaliser_2N[:, rows])


def _forward_allowed(
    head: Head,
    rowwise,
    plan: AllowedPlan,
    hidden_NH,
    labels_N,
    losses_N,
    normaliser_2N,
    unit_NH,
    kth_N,
) -> None:
    """Chunks of rows with similar numbers of allowed tokens, each with the head's rows that it needs."""
    require(
        labels_N[plan.single_rows] == plan.single_tokens,
        "a label is not the single allowed token of its trie node",
        ALLOWED_FIX,
    )
    for chunk in plan.chunks:
        part, columns_C, buffer_CV = _allowed_logits(head, rowwise, chunk, hidden_NH, labels_N)
        kth_C = None
        if kth_N is not None:
            kth_C = largest(buffer_CV, rowwise.top_k, _forbidden(chunk))
        losses_N[chunk.rows], normaliser_2C = rowwise.finish_rows_(buffer_CV, columns_C, _forbidden(chunk))
        normaliser_2N[:, chunk.rows] = normaliser_2C
        if kth_C is not None:
            kth_N[chunk.rows] = log_probability(rowwise, kth_C, normaliser_2C)
        if unit_NH is not None:
            unit_CH = torch.empty_like(hidden_NH[chunk.rows])
            part.backproject(
                buffer_CV, slice(0, len(chunk.tokens)), unit_CH, add=False, slope=rowwise.gradient_slope
            )
            unit_NH[chunk.rows] = unit_CH


def _allowed_logits(head: Head, rowwise, chunk: AllowedChunk, hidden_NH, labels_N):
    """Returns the gathered head, the labels' columns in it, and the chunk's logits."""
    part = head.gathered(chunk.tokens)
    labels_C = labels_N[chunk.rows]
    columns_C = torch.searchsorted(chunk.tokens, labels_C).clamp_(max=len(chunk.tokens) - 1)
    permitted_C = chunk.tokens[columns_C] == labels_C
    if chunk.forbidden is not None:
        permitted_C &= ~chunk.forbidden[chunk.node_slot, columns_C]
    require(permitted_C, "a label is not among the allowed tokens of its trie node", ALLOWED_FIX)
    buffer_CV = rowwise.buffer(len(labels_C), len(chunk.tokens), hidden_NH.device)
    part.rows(hidden_NH[chunk.rows]).logits(slice(0, len(chunk.tokens)), buffer_CV)
    return part, columns_C, buffer_CV


def _forbidden(chunk: AllowedChunk) -> torch.Tensor | None:
    """[C, U] mask of what each row may not choose, or None."""
    if chunk.forbidden is None:
        return None
    return chunk.forbidden[chunk.node_slot]


def _scale_rows(unit_NH: torch.Tensor, coefficient_N: torch.Tensor) -> torch.Tensor:
    """Row i times coefficient i, multiplied in float32 (float64 for float64 rows).

    It is done in place unless the caller keeps the graph for another backward.
    """
    keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)()
    out_NH = torch.empty_like(unit_NH) if keeps_graph else unit_NH
    wide = torch.float64 if unit_NH.dtype == torch.float64 else torch.float32
    scale_N1 = coefficient_N.to(wide).view(-1, 1)
    if unit_NH.dtype in (torch.float32, torch.float64) or unit_NH.device.type != "cpu":
        return torch.mul(unit_NH, scale_N1, out=out_NH)
    # torch on CPUs converts whole operands to float32: blocks of rows bound that memory.
    for start in range(0, len(unit_NH), 1024):
        part = slice(start, start + 1024)
        torch.mul(unit_NH[part], scale_N1[part], out=out_NH[part])
    return out_NH


def _backward_recompute(ctx, saved, coefficient_N: torch.Tensor):
    """Returns the gradients of hidden, weight, bias, A and B.

    It makes the logits again, a block of the vocabulary (or an allowed chunk) at a time.
    """
    labels_N, normaliser_2N, hidden_NH, weight, bias, a_rH, b_Vr = saved
    settings = ctx.settings
    plan = ctx.plan
    head, rowwise = _tools(weight, bias, a_rH, b_Vr, settings)
    row_blocks = list(rowwise.row_blocks(len(hidden_NH)))
    grads = HeadGradients(
        head, hidden_NH, ctx.needs_input_grad, rowwise.accumulate, once=plan is None and len(row_blocks) == 1
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
