"""Trainable rows of the embedding for chosen tokens, e.g. semantic ids that were added to the vocabulary.

PEFT (`trainable_token_indices`) keeps the chosen rows apart and trains them; a tied lm_head uses the same
rows, and an untied one gets rows of its own here. PEFT's forward copies the whole embedding matrix with the
rows put in, and reads it outside the embedding's own forward, where ZeRO-3 has freed it. `TokenRows` looks
the embedding up as usual and then puts the trained rows where their tokens stand: the same values, no copy,
and sharded embeddings are gathered by their own hooks.

Shapes: n chosen tokens, V vocabulary, H hidden.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import Tensor, nn

from gdrt_ds.config import ModelSection
from gdrt_ds.errors import UserError

ADDED = "added"
"""Value of `model.lora.trainable_tokens` for all tokens that were added to the tokenizer."""


class TokenRows(TrainableTokensLayer):
    """PEFT's layer, apart from how an embedding's forward puts the trained rows in."""

    def forward_adapters(self, x: Tensor, active_adapters, *args, **kwargs) -> Tensor:
        """Token ids [B, T] -> embeddings [B, T, H]; what is not an embedding is computed as PEFT does."""
        plain = self.disable_adapters or self.merged or not active_adapters
        if plain or not isinstance(self.base_layer, nn.Embedding):
            return super().forward_adapters(x, active_adapters, *args, **kwargs)
        embedded = self.base_layer(x, *args, **kwargs)
        for name in active_adapters:
            place = self.places(name, x.device)[x]
            rows = self.trainable_tokens_delta[name].to(embedded.dtype)
            chosen = rows[place.clamp(min=0)]
            scale = self._get_embed_scale()  # Gemma multiplies its embeddings
            if scale is not None:
                chosen = chosen * scale.to(embedded.dtype)
            embedded = torch.where((place >= 0)[..., None], chosen, embedded)
        return embedded

    def places(self, name: str, device: torch.device) -> Tensor:
        """Long[V]: the row of each token among the chosen ones, -1 for all others."""
        known = self.__dict__.setdefault("_places", {})
        if name not in known:
            indices = torch.tensor(self.token_indices[name])
            known[name] = torch.full((self.base_layer.num_embeddings,), -1)
            known[name][indices] = torch.arange(len(indices))
        if known[name].device != device:
            known[name] = known[name].to(device)
        return known[name]


def use_token_rows(model: nn.Module) -> None:
    """Turns PEFT's layers into `TokenRows`, in place. Parameters and names stay."""
    for module in model.modules():
        if type(module) is TrainableTokensLayer:
            module.__class__ = TokenRows


def token_indices(model: nn.Module, tokenizer, section: ModelSection) -> dict[str, list[int]] | None:
    """Returns PEFT's `trainable_token_indices`: module -> token ids; None if no token is trained.

    An untied lm_head gets rows of its own, or the new tokens could be read and never be predicted.

    Raises:
        UserError: a name that is not one token of the tokenizer, or a tokenizer without added tokens.
    """
    chosen = section.lora.trainable_tokens
    if not chosen:
        return None
    ids = chosen_ids(tokenizer, chosen)
    embedding = model.get_input_embeddings()
    head = model.get_output_embeddings()
    found = {_leaf(model, embedding): ids}
    if head is not None and head.weight is not embedding.weight:
        found[_leaf(model, head)] = ids
    return found


def chosen_ids(tokenizer, chosen: list[str] | str) -> list[int]:
    """The ids of `model.lora.trainable_tokens`, ascending.

    Raises:
        UserError: see `token_indices`.
    """
    added = {token: index for token, index in tokenizer.get_added_vocab().items()}
    if chosen == ADDED:
        special = set(tokenizer.all_special_ids)
        ids = sorted(index for index in added.values() if index not in special)
        if not ids:
            raise UserError(
                "model.lora.trainable_tokens = added, and the tokenizer has no added tokens but special ones",
                "name the tokens, or leave model.lora.trainable_tokens empty",
            )
        return ids
    vocabulary = tokenizer.get_vocab()
    unknown = [token for token in chosen if token not in vocabulary]
    if unknown:
        raise UserError(
            f"model.lora.trainable_tokens names {unknown[0]!r}, which is not one token of the tokenizer "
            f"({len(unknown)} of {len(chosen)} are not)",
            "add the tokens to the tokenizer and rows to the embedding, and save both as the model folder",
        )
    return sorted({vocabulary[token] for token in chosen})


def _leaf(model: nn.Module, wanted: nn.Module) -> str:
    name = next(name for name, module in model.named_modules() if module is wanted)
    return name.rsplit(".", 1)[-1]


@contextlib.contextmanager
def whole_rows(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Gathers embedding and lm_head that ZeRO-3 has sharded: PEFT copies the chosen rows from them."""
    weights = []
    if wanted:
        weights = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    sharded = list({id(weight): weight for weight in weights if hasattr(weight, "ds_id")}.values())
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded):
        yield


def token_layer(module: nn.Module) -> TrainableTokensLayer | None:
    """PEFT's layer inside the wrapper of an embedding or lm_head; None if no row of it is trained."""
    return getattr(module, "token_adapter", None)


def head_term(layer: TrainableTokensLayer, weight: Tensor) -> tuple[Tensor, Tensor, float] | None:
    """The trained rows of lm_head as a low-rank term of the head: A [n, H], B [V, n], 1.

    A is what the trained rows differ by from the frozen ones, B has a 1 for each chosen token. None where the
    adapter is off or merged.
    """
    if layer.disable_adapters or layer.merged or not layer.active_adapters:
        return None
    name = layer.active_adapters[0]
    if name not in layer.trainable_tokens_delta:
        return None
    ids, b_Vn = _places(layer, name, weight)
    a_nH = layer.trainable_tokens_delta[name].to(weight.dtype) - weight.detach()[ids]
    return a_nH, b_Vn, 1.0


def _places(layer: TrainableTokensLayer, name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Long[n] of the chosen tokens and B [V, n].

    Both are made once and kept with the layer: in each forward the list of ids would make the host wait for
    the device, and B would be filled anew.
    """
    kept = getattr(layer, "gdrt_places", None)
    wanted = (name, weight.device, weight.dtype, weight.shape[0])
    if kept is None or kept[0] != wanted:
        with torch.inference_mode(False):  # a later backward pass may need it
            ids = torch.tensor(layer.token_indices[name], device=weight.device)
            b_Vn = torch.zeros(weight.shape[0], len(ids), dtype=weight.dtype, device=weight.device)
            b_Vn[ids, torch.arange(len(ids), device=weight.device)] = 1.0
        kept = layer.gdrt_places = (wanted, ids, b_Vn)
    return kept[1], kept[2]
