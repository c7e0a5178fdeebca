"""Tests ask no network: what the hub is asked for must be on this machine, or is refused at once.

Without this, libraries of the hub try again for twenty seconds before they give up. It stands in the
environment before any of them is imported, and the processes that tests start inherit it.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
