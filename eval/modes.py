"""The ways of scoring by the names that the command line and evaluation folders use; loads no torch."""

from __future__ import annotations

from gdrt_ds.errors import UserError

EXACT = ("renormalised", "full")
SEARCHES = ("best_first", "beam")
MODES = (*EXACT, *SEARCHES)


def scoring_of(mode: str, given: str | None) -> str:
    """What probabilities are over: `renormalised` (the catalogue's tokens) or `full` (the vocabulary).

    An exact mode is named after its scoring. A search takes it from `--scoring`.

    Args:
        given: the value of `--scoring`; None where it is left out.
    Raises:
        UserError: it contradicts an exact mode.
    """
    if mode in SEARCHES:
        return given or EXACT[0]
    if given and given != mode:
        raise UserError(
            f"--scoring {given} contradicts --mode {mode}, which is a scoring by itself",
            f"use --mode {given}; --scoring belongs to --mode best_first and --mode beam",
        )
    return mode
