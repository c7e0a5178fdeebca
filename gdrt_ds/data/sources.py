"""Reads `data.path` as what it is: windows over a catalogue, or rows of prompt and completion."""

from __future__ import annotations

from gdrt_ds.config import RunConfig
from gdrt_ds.data.corpus import reader_of
from gdrt_ds.data.recommendation import RecommendationSource
from gdrt_ds.data.supervised import SupervisedSource
from gdrt_ds.data.training_data import Source


def read_source(config: RunConfig) -> Source:
    """Reads the data of a run.

    Raises:
        UserError: anything about files, rows or columns.
    """
    if reader_of(config.data).supervised:
        return SupervisedSource.read(config)
    return RecommendationSource.read(config)
