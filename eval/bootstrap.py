"""The former place of eval.intervals; kept for a moment, while imports move."""

from eval.intervals import *  # noqa: F403  # re-exports
