"""Titles of the catalogue only, in SGLang: a custom logit processor.

    python -m sglang.launch_server --model-path MODEL --enable-custom-logit-processor
    ... "custom_logit_processor": CatalogueProcessor().to_str(),
        "sampling_params": {"custom_params": {"catalogue": "MODEL"}}

MODEL is an exported folder, which holds the trie. It needs SGLang to be imported; constrained.py has what it
does, and docs/serving.md says what is tested.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor
from torch import Tensor

from gdrt_ds.inference.constrained import constrain_requests


class CatalogueProcessor(CustomLogitProcessor):
    """Constrains the requests whose parameters name the folder of a catalogue."""

    def __call__(self, logits: Tensor, custom_param_list: list[dict[str, Any] | None] | None = None):
        """Returns logits [B, V], one row per entry of the list."""
        return constrain_requests(logits, custom_param_list or [])
