"""GDRT's loss as a drop-in for transformers.Trainer and TRL's SFTTrainer.

    from gdrt_ds.integrations import GroupCollator, GroupDroLoss, bin_tokens, score_tokens

    # log p(target token | prompt without history), per row
    scores = score_tokens(base_model, rows_without_history)
    # One list of group numbers per row, aligned with the supervised labels of the row in order.
    groups, edges = bin_tokens(scores, num_groups=8)
    train = train.add_column("groups", groups)

    loss = GroupDroLoss(num_groups=8, tau=1.0)
    Trainer(model, args=TrainingArguments(..., remove_unused_columns=False), train_dataset=train,
            data_collator=GroupCollator(collator), compute_loss_func=loss, callbacks=[loss])

`GroupDroLoss` is both arguments. As the loss it weighs tokens. As a callback it ends each optimizer step with
one small all-reduce, after which the weights are the same on all ranks. SFTTrainer takes the same four
arguments.

With estimate="ema" (default) weights come from moving averages of the group losses and shares after the last
optimizer step: any accumulation, no collective in the forward. Before the first step they are 1, which is
exactly SFT. With estimate="batch" weights come from this global batch, which is the exact gradient of
tau log sum_g p_g exp(L_g / tau): one all-reduce in the forward, no accumulation.

Limits beside the trainer of this package: the model builds full logits (memory of [B, T, V]); weights need
this callback; under accumulation there is only `ema`. Averages and weights are saved in trainer_state.json,
and `Trainer.train(resume_from_checkpoint=...)` goes on with them. torch.nn.DataParallel is refused.

Shapes: B sequences, T positions, V vocabulary, N supervised tokens of the micro-batch, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import TrainerCallback

from gdrt_ds import dro
from gdrt_ds.errors import UserError
from gdrt_ds.loss.rowwise import group_sums

GROUPS_KEY, IGNORE = "groups", -100
STATE_KEY = "gdrt_ds.GroupDroLoss"
"""Where trainer_state.json keeps averages and weights, among the states of callbacks.

The Trainer restores a callback, found by the name of its class, as a new object, and the loss would stay the
old one. So this callback puts its state there under another name, and takes it from there itself.
"""


class GroupCollator:
    """Wraps a data collator: the `groups` lists of the rows become a Long[B, T] tensor beside `labels`.

    Args:
        collator: what pads the other columns; its result must hold `labels` with -100 where nothing is
            supervised.

    Raises:
        UserError: when it is called, if a row has not exactly one group per supervised label.
    """

    def __init__(self, collator: Callable[[list[dict]], dict[str, Tensor]]):
        self.collator = collator

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        if any(GROUPS_KEY not in row for row in rows):
            raise UserError(
                f"a row has no `{GROUPS_KEY}`",
                "set TrainingArguments(remove_unused_columns=False), or the Trainer drops that column; "
                "bin_tokens makes it",
            )
        groups = [row[GROUPS_KEY] for row in rows]
        batch = self.collator([{k: v for k, v in row.items() if k != GROUPS_KEY} for row in rows])
        supervised = batch["labels"] != IGNORE
        given, wanted = [len(g) for g in groups], supervised.sum(1).tolist()
        if given != wanted:
            row = next(i for i, (a, b) in enumerate(zip(given, wanted)) if a != b)
            raise UserError(
                f"a row has {given[row]} groups for {wanted[row]} supervised labels",
                "give one group per label that is not -100, in their order; the collator must not cut or "
                "pack rows",
            )
        placed = torch.zeros_like(batch["labels"])
        placed[supervised] = torch.tensor([g for row in groups for g in row], dtype=placed.dtype)
        batch[GROUPS_KEY] = placed
        return batch


class GroupDroLoss(TrainerCallback):
    """Closed-form Group DRO as `compute_loss_func` and callback of a Trainer (see the top of this file).

    Args:
        num_groups: G.
        tau: temperature; infinity is SFT with prior="token_share".
        prior: token_share or uniform.
        estimate: ema or batch.
        ema_rate: b of L <- (1-b) L + b * batch.

    Attributes:
        weights: float64[G], token weights q_g n / n_g in use.
        group_loss: float64[G] of the last optimizer step, NaN = absent.

    Raises:
        UserError: a setting is out of range, or a Trainer's settings would make the weights wrong.
    """

    def __init__(
        self,
        num_groups: int,
        tau: float = 1.0,
        prior: str = "token_share",
        estimate: str = "ema",
        ema_rate: float = 0.1,
    ):
        for name, value, allowed in (
            ("prior", prior, ("token_share", "uniform")),
            ("estimate", estimate, ("ema", "batch")),
        ):
            if value not in allowed:
                raise UserError(f"GroupDroLoss: {name} = {value!r}", f"use one of {', '.join(allowed)}")
        if num_groups < 1 or not tau > 0 or not 0 < ema_rate <= 1:
            raise UserError(
                f"GroupDroLoss: num_groups = {num_groups}, tau = {tau}, ema_rate = {ema_rate}",
                "num_groups >= 1, tau > 0, 0 < ema_rate <= 1",
            )
        self.settings = {
            "num_groups": num_groups,
            "tau": tau,
            "prior": prior,
            "estimate": estimate,
            "ema_rate": ema_rate,
        }
        self.num_groups, self.tau, self.prior, self.estimate, self.ema_rate = (
            num_groups,
            tau,
            prior,
            estimate,
            ema_rate,
        )
        self.memory = dro.DroState(num_groups)
        self.share = torch.zeros(num_groups, dtype=torch.float64)
        self.weights = torch.ones(num_groups, dtype=torch.float64)
        self.group_loss = torch.full((num_groups,), float("nan"), dtype=torch.float64)
        self.buffer: dro.StepBuffer | None = None
        self.groups: Tensor | None = None
        self.hook = None

    # -- the loss
    def __call__(self, outputs, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Scalar loss of a micro-batch, scaled like the Trainer's own: sum over local tokens / tokens of
        the whole step.

        In evaluation (no gradient) it is the plain token mean.
        """
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs.logits
        targets = labels[:, 1:].to(logits.device)
        keep = targets != IGNORE
        losses = F.cross_entropy(logits[:, :-1][keep].float(), targets[keep], reduction="none")
        count = keep.sum() if num_items_in_batch is None else num_items_in_batch
        count = torch.as_tensor(count, device=losses.device).clamp_min(1)
        if not torch.is_grad_enabled():
            return losses.sum() / count
        if self.hook is None:
            raise UserError(
                "GroupDroLoss is used as a loss only",
                "pass the same object in callbacks=[...] too: it ends the optimizer step",
            )
        if self.groups is None or self.groups.shape != labels.shape:
            raise UserError(
                "GroupDroLoss: the batch has no `groups` of the shape of its labels",
                "use data_collator=GroupCollator(...) and remove_unused_columns=False",
            )
        groups = self.groups[:, 1:].to(losses.device)[keep]
        if self.buffer is None:
            self.buffer = dro.StepBuffer(self.num_groups, losses.device)
        self.buffer.add(
            group_sums(losses.detach(), groups, self.num_groups),
            group_sums(torch.ones_like(losses), groups, self.num_groups),
        )
        if self.estimate == "batch":
            self._weights_of_this_batch()
        return (self.weights.to(losses)[groups] * losses).sum() / count + 0.0 * logits.sum()

    def _weights_of_this_batch(self) -> None:
        buffer = self.buffer.reduce().wait()
        q, _ = dro.closed_form_weights(buffer.losses, dro.prior(buffer.counts, self.prior), self.tau)
        share = buffer.counts / buffer.counts.sum().clamp_min(1)
        self.weights = torch.where(share > 0, q / share.clamp_min(1e-300), 1.0)

    # -- the callback
    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Checks the Trainer's settings and listens to the model's `groups` argument."""
        if args.n_gpu > 1:
            raise UserError(
                "GroupDroLoss does not run under torch.nn.DataParallel",
                "start one process per GPU (torchrun, deepspeed, accelerate launch)",
            )
        if args.world_size > 1 and not args.average_tokens_across_devices:
            raise UserError(
                "GroupDroLoss needs average_tokens_across_devices=True: a mean of rank means is another "
                "objective",
                "leave it at its default",
            )
        if self.estimate == "batch" and args.gradient_accumulation_steps > 1:
            raise UserError(
                "GroupDroLoss(estimate='batch') with gradient_accumulation_steps = "
                f"{args.gradient_accumulation_steps}",
                "use estimate='ema', no accumulation, or this package's trainer, which is exact under "
                "accumulation",
            )
        self.close()
        saved = (state.stateful_callbacks or {}).get(STATE_KEY)
        if saved and state.global_step > 0:
            self._restore(saved)
        self.hook = model.register_forward_pre_hook(self._take_groups, with_kwargs=True)

    def _take_groups(self, module, args, kwargs):
        self.groups = kwargs.pop(GROUPS_KEY, None)
        return args, kwargs

    def on_step_end(self, args, state, control, **kwargs):
        """The end of an optimizer step.

        One all-reduce (none with estimate='batch', which had its own), then new weights.
        """
        buffer, self.buffer = self.buffer, None
        if buffer is None:
            buffer = dro.StepBuffer(self.num_groups, args.device)
        if self.estimate == "ema":
            buffer.reduce().wait()
        losses, counts = buffer.losses.cpu(), buffer.counts.cpu()
        present = counts > 0
        self.group_loss = torch.where(present, losses, float("nan"))
        share = counts / counts.sum().clamp_min(1)
        self.share = (
            share if self.memory.steps == 0 else (1 - self.ema_rate) * self.share + self.ema_rate * share
        )
        self.memory.update_ema(losses, present, self.ema_rate)
        self.memory.steps += 1
        if self.estimate == "ema":
            losses, seen = self.memory.ema_losses()
            q, _ = dro.closed_form_weights(
                losses, dro.prior(torch.where(seen, self.share, 0.0), self.prior), self.tau
            )
            self.weights = torch.where(seen & (self.share > 0), q / self.share.clamp_min(1e-300), 1.0)
        state.stateful_callbacks = {**(state.stateful_callbacks or {}), STATE_KEY: self.state()}

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Adds the group losses and weights to the log that is printed and to trainer_state.json.

        Absent groups are left out.
        """
        if logs is not None and "loss" in logs:
            mine = {f"group_loss_{g}": round(v, 6) for g, v in enumerate(self.group_loss.tolist()) if v == v}
            mine |= {f"group_weight_{g}": round(v, 6) for g, v in enumerate(self.weights.tolist())}
            logs |= mine
            if state.log_history:
                state.log_history[-1] |= mine

    def on_train_end(self, args, state, control, **kwargs):
        self.close()

    def close(self) -> None:
        """Stops listening to the model."""
        if self.hook is not None:
            self.hook.remove()
        self.hook = self.groups = self.buffer = None

    def state(self) -> dict:
        """What trainer_state.json keeps."""
        tensors = {k: v.tolist() for k, v in self.memory.state_dict().items()}
        return {
            "settings": self.settings,
            **tensors,
            "share": self.share.tolist(),
            "weights": self.weights.tolist(),
        }

    def _restore(self, state: dict) -> None:
        """Takes what `state` gave.

        Raises:
            UserError: it is of another number of groups.
        """
        before = state["settings"]["num_groups"]
        if before != self.num_groups:
            raise UserError(
                f"GroupDroLoss: num_groups = {self.num_groups}, and the checkpoint has {before} groups",
                "take as many groups, or start without resume_from_checkpoint",
            )

        def tensor(name):
            return torch.tensor(state[name], dtype=torch.float64)

        self.memory.load_state_dict(
            {**{n: tensor(n) for n in ("ema", "ema_weight", "q")}, "steps": torch.tensor(state["steps"])}
        )
        self.share, self.weights = tensor("share"), tensor("weights")


def score_tokens(
    model: torch.nn.Module, rows: Sequence[dict[str, Sequence[int]]], batch_size: int = 8, pad_id: int = 0
) -> list[np.ndarray]:
    """r: log-probabilities of the supervised tokens of rows whose prompt holds no history.

    Args:
        model: causal LM, e.g. the base before tuning; run without gradient and dropout on its own device.
        rows: {"input_ids", "labels"} each, labels -100 where nothing is supervised; the targets must be
            those of training.
        batch_size: rows per forward.
        pad_id: token id that fills short rows.

    Returns:
        float32 [supervised tokens] per row, in order.

    Raises:
        UserError: the first token of a row is supervised.
    """
    for index, row in enumerate(rows):
        if row["labels"][0] != IGNORE:
            raise UserError(
                f"row {index}: its first token is supervised, and no token before it predicts it",
                f"set the label of a row's first token to {IGNORE}",
            )
    device, training, scores = next(model.parameters()).device, model.training, []
    model.eval()
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        width = max(len(row["input_ids"]) for row in part)
        ids = _padded(part, "input_ids", pad_id, width, device)
        labels = _padded(part, "labels", IGNORE, width, device)
        mask = torch.tensor(
            [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in part],
            device=device,
        )
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask).logits
        for b in range(len(part)):
            places = (labels[b, 1:] != IGNORE).nonzero().view(-1)
            losses = F.cross_entropy(logits[b, places].float(), labels[b, places + 1], reduction="none")
            scores.append(-losses.cpu().numpy())
    model.train(training)
    return scores


def _padded(
    rows: Sequence[dict[str, Sequence[int]]], name: str, value: int, width: int, device: torch.device
) -> Tensor:
    """Long[rows, width]: one column of the rows, filled up with `value`."""
    return torch.tensor([[*row[name], *[value] * (width - len(row[name]))] for row in rows], device=device)


def bin_tokens(scores: Sequence[np.ndarray], num_groups: int) -> tuple[list[list[int]], list[float]]:
    """Returns groups per row, and G-1 edges: equal shares of all scores.

    Group 0 is the least tied to the auxiliary prompt.

    Raises:
        UserError: there are too few distinct scores to fill the groups.
    """
    from gdrt_ds.dro.groups import bin_edges

    flat = np.concatenate(list(scores)) if len(scores) else np.zeros(0)
    if len(np.unique(flat)) < num_groups:
        raise UserError(
            f"num_groups = {num_groups}: the {len(flat)} scores have only {len(np.unique(flat))} distinct "
            "values",
            "use fewer groups",
        )
    edges = bin_edges(flat, num_groups, "quantile")
    sizes = np.bincount(np.searchsorted(edges, flat, side="right"), minlength=num_groups)
    if not sizes.all():
        raise UserError(
            f"num_groups = {num_groups}: too many scores are equal, so the groups would have "
            f"{', '.join(str(size) for size in sizes)} tokens",
            "use fewer groups",
        )
    return [np.searchsorted(edges, row, side="right").tolist() for row in scores], edges
