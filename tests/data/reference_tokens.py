"""The reference of `WindowStore`: every sample encoded on its own and kept in one flat store."""

from __future__ import annotations

from collections.abc import Sequence

from gdrt_ds.data.catalogue import Catalogue
from gdrt_ds.data.corpus import Sample
from gdrt_ds.data.prompts import PromptEncoder, TokenStore, store_of


def tokenise_split(
    encoder: PromptEncoder, catalogue: Catalogue, samples: Sequence[Sample], mask_history: bool = False
) -> tuple[TokenStore, list[str]]:
    """Tokenises samples with their targets.

    Returns:
        the store, and notes that count what had to be left out for length.

    Raises:
        UserError: a catalogue title does not fit into prompt.max_length.
    """
    encoder.reserve_for(catalogue)
    encoded = []
    for sample in samples:
        titles = [catalogue.text_of(item) for item in sample.history]
        encoded.append(encoder.encode(titles, catalogue.text_of(sample.target), mask_history))
    store = store_of(encoded)
    cut = [e.num_dropped for e in encoded if e.num_dropped]
    notes = []
    if cut:
        notes.append(
            f"{len(cut)} of {len(samples)} samples exceed prompt.max_length={encoder.max_length}: "
            f"their {sum(cut)} oldest history items are left out"
        )
    return store, notes
