"""Group distributionally robust optimisation: the group of a target token, and how much each group weighs.

The way of a token: `relevance` scores it, `groups` gives it a group, `buffer` sums the losses of
its group over all ranks in the one all-reduce of a step, `weights` turns group losses into weights,
and `state` remembers between steps. `markov` has the losses of counting which title follows which, which
`dro.excess=markov` takes off before the weights.
"""

from gdrt_ds.dro.buffer import StepBuffer, assert_equal_on_all_ranks
from gdrt_ds.dro.state import DroState
from gdrt_ds.dro.weights import closed_form_weights, cvar_weights, exponentiated_gradient, prior, restrict

__all__ = [
    "DroState",
    "StepBuffer",
    "assert_equal_on_all_ranks",
    "closed_form_weights",
    "cvar_weights",
    "exponentiated_gradient",
    "prior",
    "restrict",
]
