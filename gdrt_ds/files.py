"""Where things are on disk, and how files are written: one function for each decision that recurs."""

from __future__ import annotations

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
"""The folder that holds gdrt_ds/: the checkout, or site-packages."""
