"""Numbers of a command line that are too small to mean anything: refused before anything is scored."""

from __future__ import annotations

from gdrt_ds.errors import UserError

FEWEST_RESAMPLES = 20  # of a 95 % interval: the fewest whose ends are not the same draw
USUAL_RESAMPLES = "1000 is the default"


def refuse_below(least: int, option: str, value: int | None, usual: str = "") -> None:
    """Refuses a number that is too small; None stands for an option's own default and passes.

    Args:
        option: as on the command line, e.g. `--limit`.
        usual: what else the fix says.
    Raises:
        UserError: it names the option, its value and the least that is allowed.
    """
    if value is None or value >= least:
        return
    fix = f"give at least {least}"
    if usual:
        fix += f"; {usual}"
    raise UserError(f"{option} {value} is too small", fix)
