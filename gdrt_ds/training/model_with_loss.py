"""The module that DeepSpeed drives: backbone, then the fused group loss inside the output head's own forward.

Only supervised positions reach the head, and the head's parameter is used inside the head module, so that
ZeRO-3's hooks gather it once and free it afterwards; the one-pass loss keeps no alias of it (loss/).

Shapes: N supervised tokens of the micro-batch, H hidden, V vocabulary, G groups.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import Tensor, nn

from gdrt_ds.batches import MicroBatch
from gdrt_ds.errors import UserError
from gdrt_ds.loss import AllowedTokens, group_cross_entropy
from gdrt_ds.models.families import decoder, lm_head, lm_head_scaling
from gdrt_ds.models.prefix_dropout import ForwardKeys, use_prefix_dropout
from gdrt_ds.models.token_rows import head_term, token_layer


@dataclass
class HeadRequest:
    """What the head is asked to compute on hidden states [N, H]; see `group_cross_entropy`."""

    labels: Tensor
    groups: Tensor
    num_groups: int
    temperature: float = 1.0
    allowed: AllowedTokens | None = None
    top_k: int | None = None
    difference: bool = False  # the hidden states are a difference of two: the bias of the head cancels


class FusedLossModel(nn.Module):
    """Wraps a (PEFT) causal LM.

    `forward` returns (loss sums [G], token losses [N], counterfactual losses [N] or None, K-th
    log-probabilities [N] or None).
    """

    def __init__(self, model: nn.Module, prefix_dropout: bool = True):
        """Args: model: the PEFT model or the causal LM.

        prefix_dropout: dropout masks are a function of the prefix (models/prefix_dropout.py).
        """
        super().__init__()
        self.model = model
        self.logit_scale, self.softcap = lm_head_scaling(model.config)
        self.forwards = use_prefix_dropout(model) if prefix_dropout else ForwardKeys()
        self._install_head()

    def _install_head(self) -> None:
        """Gives the output projection a second way to be called.

        With a HeadRequest it returns losses instead of logits.
        """
        module = lm_head(self.model)
        # Local names: assigned to self, these layers would be registered twice.
        rows = token_layer(module)
        layer = None
        if rows is not None:
            module = rows.base_layer
            _gather_with(module, rows.trainable_tokens_delta.values())
        elif hasattr(module, "base_layer"):
            layer = module
            module = module.base_layer
            for name in layer.lora_A:  # the trained adapter and those of reference_adapters.py
                _gather_with(module, (layer.lora_A[name].weight, layer.lora_B[name].weight))
        plain = module.forward

        def forward(hidden: Tensor, request: HeadRequest | None = None):
            if request is None:
                return plain(hidden)
            out = group_cross_entropy(
                hidden.to(module.weight.dtype),
                module.weight,
                request.labels,
                request.groups,
                request.num_groups,
                bias=None if request.difference else module.bias,
                logit_scale=self.logit_scale,
                softcap=self.softcap,
                temperature=request.temperature,
                allowed=request.allowed,
                lora=_lora_term(layer) if rows is None else head_term(rows, module.weight),
                top_k=request.top_k,
            )
            return out.loss_sums, out.token_losses, out.top_k_log_probs

        module.forward = forward
        self._head = [module]  # in a list: the head belongs to self.model, it must not be registered twice

    def hidden(self, micro: MicroBatch) -> Tensor:
        """[N, H] hidden states that predict the supervised tokens."""
        states = decoder(self.model)(**micro.inputs, use_cache=False).last_hidden_state
        return states.reshape(-1, states.shape[-1]).index_select(0, micro.supervised)

    def forward(
        self,
        micro: MicroBatch,
        groups: Tensor,
        num_groups: int,
        temperature: float = 1.0,
        allowed: AllowedTokens | None = None,
        history_free: MicroBatch | None = None,
        top_k: int | None = None,
    ):
        """Returns loss sums [G], token losses [N], and, each or None, counterfactual losses [N] and the K-th
        largest log-probabilities [N].

        Args:
            groups: Long[N].
            history_free: the same targets on prompts without history, for counterfactual terms.
            top_k: K, see `group_cross_entropy`.
        """
        request = HeadRequest(micro.labels, groups, num_groups, temperature, allowed, top_k)
        self.forwards.begin(micro.keys)
        states = self.hidden(micro)
        loss_sums, token_losses, top_k_log_probs = self._head[0](states, request)
        if history_free is None:
            return loss_sums, token_losses, None, top_k_log_probs
        if self.softcap is not None:
            raise UserError(
                "objective = cft: this model soft-caps its logits, so their difference is not the head of a "
                "difference",
                "choose another objective, or a model without final_logit_softcapping",
            )
        self.forwards.begin_beside(history_free.keys)
        without = self.hidden(history_free)
        _, counterfactual, _ = self._head[0](states - without, replace(request, difference=True, top_k=None))
        return loss_sums, token_losses, counterfactual, top_k_log_probs


def _gather_with(module: nn.Module, weights: Iterable[Tensor]) -> None:
    """Makes ZeRO-3 gather weights of other modules together with this one's."""
    import deepspeed

    for weight in weights:
        deepspeed.zero.register_external_parameter(module, weight)


def _lora_term(layer: nn.Module | None) -> tuple[Tensor, Tensor, float] | None:
    """The active LoRA pair of the head and its scale: A [r, H], B [V, r]; None without one.

    Its dropout is left out: both terms of the fused product read the same hidden states.
    """
    if layer is None or layer.disable_adapters:
        return None
    for name in layer.active_adapters:
        if name in layer.lora_A:
            return layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
    return None
