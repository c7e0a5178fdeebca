"""The judge of the exactness table: the same training in plain torch, float64, one process, full logits,
one sample at a time.

Nothing of the product's loss, batches, weights or engine is used here; every objective is written down
again from its formula. Only dropout masks are the product's; test_prefix_dropout.py has them in integers.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from scipy.special import logsumexp

from gdrt_ds.batches.token_keys import step_entropy, token_keys
from gdrt_ds.models.load import load_model
from gdrt_ds.models.prefix_dropout import use_prefix_dropout
from gdrt_ds.runtime import Runtime
from tests.distributed.exact_cells import (
    GLOBAL_BATCH,
    LR,
    NUM_GROUPS,
    STEPS,
    Cell,
    CellResult,
    make_config,
    make_tokens,
    set_adapter,
)
from tests.distributed.growing_cells import stream


def plain_model(cell: Cell, folder: Path) -> torch.nn.Module:
    """The same weights and adapter in float64.

    4-bit layers become ordinary ones with the dequantised weights.
    """
    config = make_config(cell, folder, 1)
    loaded = load_model(config.model, Runtime(), train=True, path=Path(config.model.path), seed=0)
    set_adapter(loaded)
    model = loaded.model
    if cell.base == "nf4":
        import bitsandbytes as bnb

        for name, module in list(model.named_modules()):
            if isinstance(module, bnb.nn.Linear4bit):
                weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).float()
                plain = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
                plain.weight.data.copy_(weight)
                plain.weight.requires_grad_(False)
                parent = model.get_submodule(name.rpartition(".")[0])
                setattr(parent, name.rpartition(".")[2], plain)
    model = model.double().train()
    model.forwards, model.entropy = use_prefix_dropout(model), 0
    return model


def token_losses(
    model,
    row: np.ndarray,
    num_target: int,
    temperature: float = 1.0,
    allowed: list | None = None,
    minus: np.ndarray | None = None,
):
    """[num_target] losses of one sample from full logits; `minus`.

    The row whose logits are subtracted (no history).
    """

    def logits(tokens):
        ids = torch.from_numpy(tokens.astype(np.int64))[None]
        model.forwards.begin(torch.from_numpy(token_keys(tokens, model.entropy))[None])
        return model(input_ids=ids, use_cache=False).logits[0, -num_target - 1 : -1].double()

    scores = logits(row) if minus is None else logits(row) - logits(minus)
    scores = scores / temperature
    if allowed is not None:
        mask = torch.full_like(scores, -torch.inf)
        for place, tokens in enumerate(allowed):
            mask[place, tokens] = 0.0
        scores = scores + mask
    labels = torch.from_numpy(row[-num_target:].astype(np.int64))
    return -torch.log_softmax(scores, -1)[torch.arange(num_target), labels]


def batch_rows(cell: Cell, store, step: int) -> list[tuple[int, np.ndarray]]:
    """(sample, its tokens) of the global batch."""
    if cell.growing:
        rows = stream(store, (step + 1) * GLOBAL_BATCH)[step * GLOBAL_BATCH :]
        return [(sample, tokens) for sample, tokens, _ in rows]
    samples = batch_samples(step, len(store))
    return [
        (sample, store.input_ids[store.offsets[sample] : store.offsets[sample + 1]]) for sample in samples
    ]


def batch_samples(step: int, count: int) -> list[int]:
    """The global batch as the documentation of batches.py defines it: positions k*B ..

    (k+1)*B-1 of seeded permutations.
    """
    stream = np.concatenate(
        [
            np.random.Generator(np.random.PCG64([0, epoch])).permutation(count)
            for epoch in range(1 + (step + 1) * GLOBAL_BATCH // count)
        ]
    )
    return sorted(stream[step * GLOBAL_BATCH : (step + 1) * GLOBAL_BATCH].tolist())


def run_reference(cell: Cell, folder: Path, steps: int = STEPS) -> CellResult:
    tokens, config = make_tokens(cell), make_config(cell, folder, 1)
    model, store, result = plain_model(cell, folder), tokens.store, CellResult()
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    memory = {
        "ema": np.zeros(NUM_GROUPS),
        "weight": np.zeros(NUM_GROUPS),
        "q": np.full(NUM_GROUPS, 1 / NUM_GROUPS),
    }
    for step in range(steps):
        values, groups, weights, reference = [], [], [], []
        model.entropy = step_entropy(0, step)
        for sample, row in batch_rows(cell, store, step):
            span = slice(store.target_offsets[sample], store.target_offsets[sample + 1])
            values.append(_sample_values(model, tokens, config, sample, row))
            groups.append(tokens.groups[span])
            weights.append(_sample_weights(model, tokens, config, sample, row))
            reference.append(
                np.zeros(span.stop - span.start)
                if tokens.reference is None
                else tokens.reference[span].astype(np.float64)
            )
        values, groups, weights, reference = (
            torch.cat(values),
            np.concatenate(groups),
            np.concatenate(weights),
            np.concatenate(reference),
        )
        member = torch.from_numpy((groups[None] == np.arange(NUM_GROUPS)[:, None]) * weights[None])
        counts = member.sum(1).numpy()
        present = counts > 0
        group_loss = (member @ values)[present] / torch.from_numpy(counts[present])
        plain_excess = torch.from_numpy(((member.numpy() @ reference)[present]) / counts[present])
        scalar, q = _objective(
            cell, config, values, group_loss - plain_excess, counts, present, groups, memory
        )
        own_value = (
            cell.objective == "cvar"
            and config.dro.cvar_over == "tokens"
            or cell.objective.startswith("gdrt")
            and cell.estimate == "batch"
        )
        objective = (
            float(scalar.detach()) if own_value else float(q @ (group_loss.detach() - plain_excess).numpy())
        )
        gradients = torch.autograd.grad(scalar, list(trainable.values()))
        result.group_loss.append(_full(group_loss.detach().numpy(), present))
        result.group_weight.append(_full(q, present))
        result.group_count.append(counts)
        result.objective.append(objective)
        result.loss.append(float((member.sum(0) * values.detach()).sum() / counts.sum()))
        if step < 3:
            result.gradients.append({n: g.numpy().copy() for n, g in zip(trainable, gradients)})
        with torch.no_grad():
            for parameter, gradient in zip(trainable.values(), gradients):
                parameter -= LR * gradient
    result.parameters = {n: p.detach().numpy().copy() for n, p in trainable.items()}
    return result


def _full(values: np.ndarray, present: np.ndarray) -> np.ndarray:
    out = np.full(len(present), np.nan)
    out[present] = values
    return out


def _sample_values(model, tokens, config, sample: int, row: np.ndarray) -> torch.Tensor:
    store, objective, options = tokens.store, config.objective, config.options
    num_target, start = int(store.num_target[sample]), int(store.target_offsets[sample])
    if objective in ("msl", "gdrt+msl", "bear"):
        offsets, flat = tokens.trie_offsets.tolist(), tokens.trie_tokens.tolist()
        return token_losses(
            model,
            row,
            num_target,
            options.msl_temperature,
            [flat[offsets[start + k] : offsets[start + k + 1]] for k in range(num_target)],
        )
    losses = token_losses(model, row, num_target)
    if objective == "focal":
        return (1 - torch.exp(-losses)) ** options.focal_gamma * losses
    if objective == "cft":
        free = tokens.history_free
        second = token_losses(
            model, row, num_target, minus=free.input_ids[free.offsets[sample] : free.offsets[sample + 1]]
        )
        weight = (
            torch.linspace(1.0, options.cft_beta, num_target).double()
            if num_target > 1
            else torch.ones(1).double()
        )
        return losses + options.cft_alpha * weight * second
    return losses


def _sample_weights(model, tokens, config, sample: int, row: np.ndarray) -> np.ndarray:
    """float64 per target token: fixed weights, BEAR's from full logits by a sort, or 1."""
    store, options = tokens.store, config.options
    start, stop = store.target_offsets[sample], store.target_offsets[sample + 1]
    if config.objective != "bear":
        return np.ones(stop - start) if tokens.weights is None else tokens.weights[start:stop]
    row = torch.from_numpy(row.astype(np.int64))
    with torch.no_grad():
        logits = model(input_ids=row[None], use_cache=False).logits[0].double() / options.msl_temperature
    offsets, flat = tokens.trie_offsets, tokens.trie_tokens
    weights = []
    for place in range(stop - start):
        choices = flat[offsets[start + place] : offsets[start + place + 1]]
        if len(choices) == 1:
            weights.append(0.0)
            continue
        token = len(row) - (stop - start) + place
        own = logits[token - 1, row[token]]
        kth = logits[token - 1, choices].sort(descending=True).values[: options.bear_k][-1]
        sign = -1 if options.bear_favours == "at_risk" else 1
        margin = float(own - kth) * sign
        weights.append(1 + options.bear_lambda / (1 + np.exp(-margin / options.bear_xi)))
    return np.array(weights)


def _objective(cell, config, values, losses, counts, present, groups, memory):
    """(scalar to differentiate, q over the groups present). losses.

    Differentiable L over the groups present.
    """
    share = counts[present] / counts.sum()
    dro, name, current = config.dro, cell.objective, losses.detach().numpy()
    if name == "group_dro":
        grown = memory["q"].copy()
        grown[present] *= np.exp(dro.eta * current)
        grown /= grown.sum()
        used = grown if cell.estimate == "batch" else memory["q"]
        memory["q"] = grown
        q = used[present] / used[present].sum()
    elif name == "cvar" and dro.cvar_over == "tokens":
        order = np.argsort(-values.detach().numpy(), kind="stable")
        token_q, left = np.zeros(len(values)), dro.alpha * len(values)
        for index in order:
            token_q[index] = min(1.0, left) / (dro.alpha * len(values))
            left -= min(1.0, left)
        q = np.array([token_q[groups == g].sum() for g in np.flatnonzero(present)])
        return (torch.from_numpy(token_q) * values).sum(), q
    elif name == "cvar":
        q, left = np.zeros(len(share)), 1.0
        for index in np.argsort(-current, kind="stable"):
            q[index] = min(share[index] / dro.alpha, left)
            left -= q[index]
    elif name == "sft_go":
        return _sft_go(cell, dro, losses, share, present, memory)
    elif name in ("gdrt", "gdrt+msl"):
        p = share if dro.prior == "token_share" else np.full(len(share), 1 / len(share))
        if cell.estimate == "batch":
            scalar = dro.tau * torch.logsumexp(
                torch.from_numpy(np.log(p)) + losses / dro.tau, 0
            )  # autograd finds q by itself
            exponent = np.log(p) + current / dro.tau
            return scalar, np.exp(exponent - logsumexp(exponent))
        seen = memory["weight"][present] > 0
        q = p
        if seen.any():
            corrected = memory["ema"][present] / np.where(seen, memory["weight"][present], 1)
            neutral = (corrected * counts[present] * seen).sum() / (counts[present] * seen).sum()
            exponent = np.log(p) + np.where(seen, corrected, neutral) / dro.tau
            q = np.exp(exponent - logsumexp(exponent))
        rate = dro.ema_rate
        memory["ema"][present] = (1 - rate) * memory["ema"][present] + rate * current
        memory["weight"][present] = (1 - rate) * memory["weight"][present] + rate
    else:
        q = share
    return (torch.from_numpy(q) * losses).sum(), q


def _sft_go(cell, dro, losses, share, present, memory):
    """Mean plus lambda times the largest group loss; with ema the worst group is that of the averages."""
    current = losses.detach().numpy()
    mean = (torch.from_numpy(share) * losses).sum()
    q = share.copy()
    if cell.estimate == "batch":
        q[current.argmax()] += dro.worst_weight
        return mean + dro.worst_weight * losses.max(), q
    seen = memory["weight"][present] > 0
    if seen.any():
        averages = memory["ema"][present] / np.where(seen, memory["weight"][present], 1)
        neutral = (averages * share * seen).sum() / (share * seen).sum()
        q[np.where(seen, averages, neutral).argmax()] += dro.worst_weight
    rate = dro.ema_rate
    memory["ema"][present] = (1 - rate) * memory["ema"][present] + rate * current
    memory["weight"][present] = (1 - rate) * memory["weight"][present] + rate
    return (torch.from_numpy(q) * losses).sum(), q
