"""Growing windows in the exactness table: a store as the product makes it, and its rows written down again.

Users have 3 to 14 items, and one user's window is missing, so that a second run begins behind the gap. An
epoch has fewer samples than two steps take, so most steps hold the turn of an epoch, where a sample can come
twice, with two histories.
"""

from __future__ import annotations

import numpy as np

from gdrt_ds.data.catalogue import Catalogue
from gdrt_ds.data.coded_windows import CodedWindows
from gdrt_ds.data.corpus import Corpus, Item, Sample
from gdrt_ds.data.growing import GrowingStore, stitch
from gdrt_ds.data.prompts import PromptEncoder
from gdrt_ds.data.templates import PromptTemplate
from gdrt_ds.data.window_store import tokenise_split

TITLES = [
    "Heat",
    "Fargo (1996)",
    "Brazil",
    "Toy Story (1995)",
    "Alien (1979)",
    "The Matrix (1999)",
    "Story",
    "The Alien Story (1985)",
    "Toy Alien",
    "The Heat",
    "Matrix Story (1979)",
]
BLOCK, MIN_HISTORY, SLIDING, SEED = 4, 1, 4, 5
"""With this seed, and steps of 48 samples, the end of each of the first steps tears a block in two."""
GAP = (5, 6)
"""(user, place of the target) of the window that is missing."""
AFTER_HISTORY = {"worded": " ) The (", "list": ","}
"""What follows the history. In a list it is the separator, so the target is the next sample's history."""


def sequences() -> list[list[int]]:
    """The items of each user, oldest first, as numbers in TITLES."""
    rng = np.random.default_rng(21)
    return [rng.integers(0, len(TITLES), length).tolist() for length in (9, 3, 14, 5, 8, 12, 4, 11, 6)]


def targets() -> list[tuple[int, int]]:
    """(user, place of the target) of each sample."""
    found = [(user, place) for user, items in enumerate(sequences()) for place in range(1, len(items))]
    return [target for target in found if target != GAP]


def growing_store(kind: str, tokenizer) -> GrowingStore:
    """The store that training would make of these users.

    Args:
        kind: "worded" or "list", see AFTER_HISTORY.
    """
    of_user = sequences()
    samples = []
    for number, (user, place) in enumerate(targets()):
        history = tuple(f"i{item}" for item in of_user[user][max(0, place - SLIDING) : place])
        samples.append(Sample(number, f"u{user}", history, f"i{of_user[user][place]}", float(place)))
    items = {f"i{number}": Item(f"i{number}", title) for number, title in enumerate(TITLES)}
    catalogue = Catalogue.build(Corpus("exactness", "movie", items, {"train": samples}))
    template = PromptTemplate(
        "file",
        "movie",
        "",
        "The Story",
        " (",
        AFTER_HISTORY[kind],
        item_format="{title}",
        target_format="{title}",
    )
    encoder = PromptEncoder(template, tokenizer, 512)
    windows = CodedWindows.of(samples, catalogue)
    sliding, _ = tokenise_split(encoder, catalogue, windows, "growing cells")
    return GrowingStore(sliding, stitch(samples, BLOCK, MIN_HISTORY, SEED), encoder, catalogue)


def runs() -> list[list[int]]:
    """The samples of each run, written down: a run for each user, and another behind the gap."""
    found: list[list[int]] = []
    last = None
    for sample, (user, place) in enumerate(targets()):
        if last != (user, place - 1):
            found.append([])
        found[-1].append(sample)
        last = (user, place)
    return found


def epoch_rows(store: GrowingStore, epoch: int) -> list[tuple[int, np.ndarray, int]]:
    """The samples of an epoch in their order, by the words of docs/windows.md and not by the code's arrays.

    Returns:
        (sample, tokens, number of the block) of each.
    """
    of_user = sequences()
    offsets = np.random.Generator(np.random.PCG64([SEED, epoch, 1])).integers(0, BLOCK, len(runs()))
    blocks: list[list[int]] = []
    oldest = []
    for run, offset in zip(runs(), offsets.tolist()):
        # The first block of a run is shorter by the offset; the others have BLOCK targets.
        cuts = [0, *range(BLOCK - offset, len(run), BLOCK), len(run)]
        first_place = targets()[run[0]][1]
        oldest_of_run = max(0, first_place - SLIDING)
        for start, stop in zip(cuts, cuts[1:]):
            blocks.append(run[start:stop])
            oldest.append(max(oldest_of_run, first_place + start - MIN_HISTORY))
    rank = np.random.Generator(np.random.PCG64([SEED, epoch, 2])).permutation(len(blocks))
    rows = []
    for block in sorted(range(len(blocks)), key=lambda number: rank[number]):
        for sample in blocks[block]:
            user, place = targets()[sample]
            history = [TITLES[item] for item in of_user[user][oldest[block] : place]]
            tokens = store.encoder.encode(history, TITLES[of_user[user][place]]).input_ids
            rows.append((sample, tokens, block))
    return rows


def stream(store: GrowingStore, stop: int) -> list[tuple[int, np.ndarray, tuple[int, int]]]:
    """The first `stop` samples of the training: (sample, tokens, (epoch, block)) of each."""
    rows: list[tuple[int, np.ndarray, tuple[int, int]]] = []
    epoch = 0
    while len(rows) < stop:
        rows += [(sample, tokens, (epoch, block)) for sample, tokens, block in epoch_rows(store, epoch)]
        epoch += 1
    return rows[:stop]


def tears_a_block(store: GrowingStore, position: int) -> bool:
    """Whether the samples before and behind this position of the training are of one block."""
    rows = stream(store, position + 1)
    return position % len(store) > 0 and rows[position - 1][2] == rows[position][2]
