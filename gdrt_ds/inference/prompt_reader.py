"""Prompts are read once; any number of token trees is then hung behind their keys and values.

`PromptReader(model, prefix_ids)` prepares a causal LM for this. `read(prompts)` returns a `PromptState`: one
prompt pass for a batch of users, and the constant prefix of the prompt is computed once for all of them.
`run(...)` forwards further tokens behind a state under an explicit visibility mask.
`gdrt_ds.inference.catalogue_scoring` and `eval.scoring` are built on these two calls.

Masks: full-attention layers take the visibility as it is. Sliding-window layers (Gemma 3, Mistral) also ask
that positions differ by less than the window. Positions are always passed, so rotary and learned (GPT-2)
embeddings see the same numbers as a plain forward pass of prompt + item.

Shapes: B users, S new prompt tokens, P cached tokens, T tokens forwarded now, H hidden, K key heads, D head
size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache

from gdrt_ds.errors import UserError
from gdrt_ds.models.attention import takes_dense_masks
from gdrt_ds.models.families import (
    attention_windows,
    decoder,
    lm_head,
    lm_head_scaling,
    supports_sdpa,
    unwrap,
)
from gdrt_ds.models.token_rows import token_layer
from gdrt_ds.runtime.devices import to_device

VOCABULARY_BLOCK = 8192
"""Rows of an output head of another dtype that are converted at once."""

KeyValues = list[tuple[Tensor, Tensor]]  # per layer: keys and values [B or 1, K, P, D]


class FrozenCache(Cache):
    """A transformers cache that never grows: `update` returns past + new and stores nothing of the past anew.

    DynamicCache would keep the concatenation, i.e. copy and mutate the prompt of every user for every
    chunk of the tree.

    Args:
        past: keys and values of the cached tokens, [B or 1, K, P, D] per layer (batch 1 is expanded); None
        = nothing cached.
        record: keep the new tokens' own keys and values in `recorded`.
        grow: replace each layer's entry of `past` by past + new (the caller's list grows; a search keeps
        what it expanded).
    """

    def __init__(self, past: KeyValues | None, record: bool = False, grow: bool = False):
        super().__init__(layers=[])
        self.past, self.record, self.grow, self.recorded = past, record, grow, {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        if self.record:
            self.recorded[layer_idx] = (key_states, value_states)
        if self.past is None:
            return key_states, value_states
        batch = key_states.shape[0]
        keys, values = (t.expand(batch, -1, -1, -1) for t in self.past[layer_idx])
        whole = torch.cat([keys, key_states], dim=2), torch.cat([values, value_states], dim=2)
        if self.grow:
            self.past[layer_idx] = whole
        return whole

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self.past is None else self.past[layer_idx][0].shape[2]

    def key_values(self) -> KeyValues:
        return [self.recorded[i] for i in sorted(self.recorded)]


@dataclass
class PromptState:
    """A batch of prompts that was read.

    Attributes:
        past: keys and values per layer, [B, K, P, D].
        visible: Bool[B, P], False at padding.
        positions: Long[B, P].
        lengths: Long[B], prompt lengths in tokens; the first tree token stands at this position.
        hidden: [B, H], last hidden state of the last prompt token.
        padded: whether some of `visible` is False. Asking the device would wait for it.
    """

    past: KeyValues
    visible: Tensor
    positions: Tensor
    lengths: Tensor
    hidden: Tensor
    padded: bool

    @property
    def batch(self) -> int:
        return self.hidden.shape[0]

    def row(self, index: int) -> PromptState:
        """One user's state, without its padding columns."""
        keep = self.visible[index]
        past = [(k[index : index + 1, :, keep], v[index : index + 1, :, keep]) for k, v in self.past]
        return PromptState(
            past,
            keep[keep][None],
            self.positions[index, keep][None],
            self.lengths[index : index + 1],
            self.hidden[index : index + 1],
            padded=False,
        )


@dataclass(frozen=True)
class LmHeadRows:
    """The output head as rows: logits of chosen tokens, or of the whole vocabulary, in float32.

    Reads a plain linear head, one under LoRA (its low-rank term is added to the rows asked for), or a head
    saved whole with the adapter (`modules_to_save`).
    """

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    low_rank: tuple[tuple[Tensor, Tensor, float], ...]  # (A [r, H], B [V, r], scale) of every active adapter
    scale: float
    softcap: float | None

    @classmethod
    def of(cls, model: nn.Module) -> LmHeadRows:
        module = lm_head(model)
        rows = token_layer(module)
        if rows is not None:
            scale, softcap = lm_head_scaling(decoder(model).config)
            off = rows.disable_adapters or rows.merged
            weight = rows.base_layer.weight if off else rows.get_merged_weights(rows.active_adapters)
            return cls(weight.detach(), getattr(rows.base_layer, "bias", None), (), scale, softcap)
        if hasattr(module, "modules_to_save") and hasattr(module, "active_adapters"):
            module = module.modules_to_save[module.active_adapters[0]]
        low_rank = []
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            if not getattr(module, "merged", False) and not getattr(module, "disable_adapters", False):
                if any(getattr(module, "use_dora", {}).get(name) for name in module.active_adapters):
                    raise UserError(
                        "the adapter has DoRA weights on the output head, which scoring cannot read row by "
                        "row",
                        "merge the adapter into the model first (peft's merge_and_unload) and pass it as "
                        "--model",
                    )
                low_rank = [
                    (module.lora_A[name].weight, module.lora_B[name].weight, float(module.scaling[name]))
                    for name in module.active_adapters
                    if name in module.lora_A
                ]
            module = module.base_layer
        weight = getattr(module, "weight", None)
        if weight is None or weight.dim() != 2 or not weight.is_floating_point():
            raise UserError(
                f"the output head is a {type(module).__name__}, whose rows cannot be read as floating point",
                "load the model with an unquantised head (bitsandbytes: llm_int8_skip_modules=['lm_head'])",
            )
        scale, softcap = lm_head_scaling(decoder(model).config)
        return cls(weight, getattr(module, "bias", None), tuple(low_rank), scale, softcap)

    def rows(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """Float32 weight rows [E, H] and biases [E] of `tokens` Long[E]."""
        weight = self.weight[tokens].float()
        for a, b, scale in self.low_rank:
            weight = weight + scale * (b[tokens].float() @ a.float())
        return weight, None if self.bias is None else self.bias[tokens].float()

    def finish(self, logits: Tensor) -> Tensor:
        """Scale and soft-cap of the model's config (Cohere, Granite, Gemma 2), on raw products."""
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def vocabulary_logits(self, hidden: Tensor) -> Tensor:
        """[N, H] -> float32 [N, V]; the caller bounds N.

        The product is in the dtype of `hidden`. Weights of another dtype are converted block by block.
        """
        weight = self.weight
        if weight.dtype == hidden.dtype:
            logits = F.linear(hidden, weight).float()
        else:
            blocks = weight.split(VOCABULARY_BLOCK)
            logits = torch.cat([F.linear(hidden, block.to(hidden.dtype)).float() for block in blocks], dim=-1)
        for a, b, scale in self.low_rank:
            logits += scale * F.linear(F.linear(hidden.to(a.dtype), a), b).float()
        if self.bias is not None:
            logits += self.bias.float()
        return self.finish(logits)


@dataclass
class PromptReader:
    """A causal LM that reads prompts once and token trees many times.

    Args:
        model: causal LM of transformers, with or without PEFT adapter, in eval mode.
        prefix_ids: tokens that every prompt starts with; computed once. Empty = nothing is shared.
        padding_side: where padding stands in a batch of prompts; results do not depend on it.
    Raises:
        UserError: attention that cannot take an explicit mask, recurrent or chunked layers.
    """

    model: nn.Module
    prefix_ids: list[int] = field(default_factory=list)
    padding_side: str = "right"

    def __post_init__(self):
        self.decoder, self.config = decoder(self.model), decoder(self.model).config
        self._take_masks()
        self.rows = LmHeadRows.of(self.model)
        weight = self.decoder.get_input_embeddings().weight
        self.device, self.num_layers = weight.device, self.config.num_hidden_layers
        # Hidden states, and so queries, have the dtype of what the embedding gives out (float32.py).
        with torch.no_grad():
            token = torch.zeros(1, 1, dtype=torch.long, device=self.device)
            self.mask_dtype = self.decoder.get_input_embeddings()(token).dtype
        self.max_positions = getattr(self.config, "max_position_embeddings", None)
        self._shared: KeyValues | None = None
        # The last head token is left to `read`, so that a prompt without history still has a token to
        # forward.
        self.num_shared = max(0, len(self.prefix_ids) - 1)

    def _take_masks(self) -> None:
        """Makes the attention take explicit masks, and finds the windows of the layers."""
        if not takes_dense_masks(self.config._attn_implementation):
            # Flash kernels take no explicit mask. The evaluation's report names the attention that scored.
            substitute = "sdpa" if supports_sdpa(type(unwrap(self.model))) else "eager"
            self.decoder.set_attn_implementation(substitute)
        self.windows, self.window = attention_windows(self.config)

    def check_length(self, longest: int) -> None:
        """Raises UserError if prompt + item would not fit the model's positions."""
        if self.max_positions is not None and longest > self.max_positions:
            raise UserError(
                f"prompt and longest title need {longest} positions; the model has {self.max_positions} "
                f"(max_position_embeddings)",
                "lower prompt.max_length, or shorten the titles",
            )

    def forget(self) -> None:
        """Drops the shared head (call after the weights changed, e.g. an adapter was switched)."""
        self._shared, self.rows = None, LmHeadRows.of(self.model)

    def run(
        self,
        tokens: Tensor,
        positions: Tensor,
        visible: Tensor,
        past: KeyValues | None,
        past_positions: Tensor | None,
        record: bool = False,
        grow: bool = False,
    ) -> tuple[Tensor, KeyValues]:
        """Forwards tokens behind cached ones.

        Args:
            tokens, positions: Long[B, T].
            visible: Bool[B or 1, T, P + T]; every row must see at least one column.
            past: P cached tokens per layer; past_positions: Long[B or 1, P], needed by sliding windows.
            record: also return the new tokens' keys and values.
            grow: append them to `past` in place instead.
        Returns:
            hidden [B, T, H] and, when recorded, [B, K, T, D] pairs per layer (else empty).
        """
        cache = FrozenCache(past, record, grow)
        key_positions = (
            positions
            if past is None
            else torch.cat([past_positions.expand(positions.shape[0], -1), positions], dim=1)
        )
        output = self.decoder(
            input_ids=tokens,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            attention_mask=self._mask(visible, positions, key_positions),
        )
        return output.last_hidden_state, cache.key_values()

    def _mask(self, visible: Tensor, positions: Tensor, key_positions: Tensor) -> Tensor | dict[str, Tensor]:
        def additive(allowed: Tensor) -> Tensor:
            mask = torch.zeros(allowed.shape, dtype=self.mask_dtype, device=self.device)
            return mask.masked_fill_(~allowed, torch.finfo(self.mask_dtype).min)[:, None]

        def windowed(window: int | None) -> Tensor:
            if window is None:
                return visible
            return visible & (positions[:, :, None] - key_positions[:, None, :] < window)

        if self.windows is None:
            return additive(windowed(self.window))
        return {kind: additive(windowed(window)) for kind, window in self.windows.items()}

    def _causal(self, length: int) -> Tensor:
        return torch.ones(length, length, dtype=torch.bool, device=self.device).tril()

    def shared(self) -> KeyValues | None:
        """Keys and values [1, K, P, D] of the constant head, computed at first use."""
        if self._shared is None and self.num_shared:
            tokens = to_device(torch.tensor([self.prefix_ids[: self.num_shared]]), self.device)
            positions = torch.arange(self.num_shared, device=self.device)[None]
            _, self._shared = self.run(
                tokens, positions, self._causal(self.num_shared)[None], None, None, record=True
            )
        return self._shared

    @torch.inference_mode()
    def read(self, prompts: list[list[int]]) -> PromptState:
        """Reads a batch of prompts, each a token list that starts with `prefix_ids`.

        Raises:
            ValueError: a prompt that does not start with the head, or is empty.
        """
        skip = self.num_shared
        for prompt in prompts:
            if len(prompt) <= skip or list(prompt[:skip]) != list(self.prefix_ids[:skip]):
                raise ValueError("a prompt does not start with the constant head tokens, or is empty")
        self.check_length(max(map(len, prompts)))
        batch = len(prompts)
        lengths = to_device(torch.tensor([len(p) for p in prompts]), self.device)
        width = max(map(len, prompts)) - skip
        tokens = torch.zeros(batch, width, dtype=torch.long)
        positions = torch.zeros(batch, width, dtype=torch.long)
        real = torch.zeros(batch, width, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            count = len(prompt) - skip
            span = slice(0, count) if self.padding_side == "right" else slice(width - count, width)
            tokens[row, span] = torch.as_tensor(prompt[skip:], dtype=torch.long)
            positions[row, span] = torch.arange(skip, skip + count)
            real[row, span] = True
        tokens, positions, real = (to_device(t, self.device) for t in (tokens, positions, real))
        # A padding token sees itself only and nobody sees it.
        own = (
            self._causal(width)[None] & real[:, None, :]
            | torch.eye(width, dtype=torch.bool, device=self.device)[None]
        )
        shared = self.shared()
        head_positions = torch.arange(skip, device=self.device)[None]
        visible = torch.cat([own.new_ones(batch, width, skip), own], dim=2)
        hidden, new = self.run(tokens, positions, visible, shared, head_positions, record=True)
        past = (
            new
            if shared is None
            else [
                (
                    torch.cat([k0.expand(batch, -1, -1, -1), k], 2),
                    torch.cat([v0.expand(batch, -1, -1, -1), v], 2),
                )
                for (k0, v0), (k, v) in zip(shared, new)
            ]
        )
        last = real.long().cumsum(1).argmax(1)
        return PromptState(
            past,
            torch.cat([real.new_ones(batch, skip), real], 1),
            torch.cat([head_positions.expand(batch, -1), positions], 1),
            lengths,
            hidden[torch.arange(batch, device=self.device), last],
            padded=min(map(len, prompts)) < max(map(len, prompts)),
        )
