r"""Titles of the catalogue only, in vLLM: a request-level logits processor of its V1 engine.

    vllm serve MODEL --generation-config vllm \
        --logits-processors gdrt_ds.inference.vllm_processor:CatalogueProcessor
    ... "vllm_xargs": {"catalogue": true}, or SamplingParams(extra_args={"catalogue": True})

MODEL is an exported folder, which holds the trie. It needs vLLM to be imported; constrained.py has what it
does, and docs/serving.md says what is tested.
"""

from __future__ import annotations

from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from gdrt_ds.inference.constrained import CatalogueConstraint, RequestConstraint, asks_for_catalogue


class CatalogueProcessor(AdapterLogitsProcessor):
    """Constrains the requests whose extra arguments say `catalogue`."""

    def __init__(self, vllm_config, device, is_pin_memory):
        super().__init__(vllm_config, device, is_pin_memory)
        self.constraint = CatalogueConstraint.load(vllm_config.model_config.model)

    @classmethod
    def validate_params(cls, params) -> None:
        """Raises ValueError for a request whose argument is neither true nor false."""
        asks_for_catalogue(params.extra_args)

    def is_argmax_invariant(self) -> bool:
        """The most probable token of all may be one that no title goes on with."""
        return False

    def new_req_logits_processor(self, params) -> RequestConstraint | None:
        """Returns what constrains a request; None for one that asks for free text."""
        if asks_for_catalogue(params.extra_args):
            return RequestConstraint(self.constraint)
        return None
