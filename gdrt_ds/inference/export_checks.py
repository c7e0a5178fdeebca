"""The check of an export: the written model has to give the logits of base + adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from gdrt_ds.errors import UserError

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Largest allowed difference of a logit, as a share of the largest logit. Storing the weights in a dtype
rounds them."""

PROBE_TOKENS = 12
"""Length of the row of tokens whose logits are compared."""


@dataclass(frozen=True)
class Probe:
    """What base + adapter answer, and every merged form of them has to answer too.

    Attributes:
        input_ids: [1, T] token ids.
        logits: [1, T, V] in float32.
    """

    input_ids: Tensor
    logits: Tensor

    @property
    def largest(self) -> float:
        """The largest absolute logit."""
        return float(self.logits.abs().max())

    def difference(self, model: nn.Module) -> float:
        """The largest difference between the logits of a model and the expected ones."""
        with torch.no_grad():
            return self.difference_of(model(input_ids=self.input_ids).logits)

    def difference_of(self, logits: Tensor) -> float:
        """The largest difference between logits [1, T, V] and the expected ones."""
        return float((logits - self.logits).abs().max())

    def allows(self, difference: float, dtype: torch.dtype) -> bool:
        """Whether a difference is explained by weights that are rounded to `dtype`."""
        return difference <= TOLERANCE[dtype] * max(1.0, self.largest)


@dataclass(frozen=True)
class Written:
    """What the check of a written model found.

    Attributes:
        difference: the largest difference of a logit to base + adapter.
        largest: the largest absolute logit.
        check: how the logits of the written model were computed, in words.
    """

    difference: float
    largest: float
    check: str


def probe_ids(tokenizer) -> Tensor:
    """Returns the row of tokens whose logits are compared, Long[1, T]."""
    return torch.arange(5, 5 + PROBE_TOKENS)[None] % len(tokenizer)


def check_loaded(folder: Path, probe: Probe, dtype: torch.dtype, trust_remote_code: bool) -> float:
    """Loads the written folder with transformers alone and returns the largest difference of a logit.

    Raises:
        UserError: it is more than rounding to `dtype` explains.
    """
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=trust_remote_code
    )
    difference = probe.difference(again.eval())
    check_difference(difference, probe, dtype)
    return difference


def check_difference(difference: float, probe: Probe, dtype: torch.dtype) -> None:
    """Raises UserError if logits of the written model differ more than rounding to `dtype` explains."""
    if not probe.allows(difference, dtype):
        raise UserError(
            f"the exported model's logits differ from base + adapter by {difference:.3g} (largest logit "
            f"{probe.largest:.3g})",
            "export with --dtype float32, or another --base",
        )


def check_merged(difference: float, probe: Probe) -> None:
    """Raises UserError if the merged model, still in float32, computes something else."""
    if not probe.allows(difference, torch.float32):
        raise UserError(
            f"the merged model's logits differ from base + adapter by {difference:.3g}",
            "do not use it; please report the model family",
        )
