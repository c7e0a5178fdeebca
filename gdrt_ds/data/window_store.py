"""The tokens of windows over a catalogue, laid together when they are asked for.

All tokens of a sample are pieces that occur again and again: the prompt's start, one piece per title, the
separator, the text after the history, one piece per target. Every title is tokenised once. A split of
millions of windows is then a few numbers per window; `WindowStore.row` puts the pieces of one sample end to
end. `PromptEncoder.encode` makes the same tokens piece by piece and is the reference of the tests.

Shapes: T tokens of one sample, n samples, H items of the longest history, E catalogue entries.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from gdrt_ds.data.arrow_words import array_of_words, lay
from gdrt_ds.data.catalogue import Catalogue
from gdrt_ds.data.coded_windows import CodedWindows
from gdrt_ds.data.kept import digest_of, kept_folder, mapped, save_arrays
from gdrt_ds.data.prompts import HISTORY, TARGET, TEMPLATE, PromptEncoder, PromptPieces, TokenStore
from gdrt_ds.files import write_json

CHUNK_TOKENS = 1 << 22
"""Tokens that are laid together at once where a whole split is wanted."""
CHUNK = 1 << 18
"""Windows whose lengths are computed at once."""
SMALLEST_KEPT = 1 << 19
"""Splits with fewer windows are not kept in the cache."""
VERSION = 1
"""Of the kept arrays; another number finds no folder of this one."""
ARRAYS = ("kept", "lengths", "num_target", "target_offsets")


class Pieces:
    """The pieces that samples are made of, as Arrow arrays of byte strings; `take` lays them end to end.

    Piece 0 is the start of the prompt and piece 1 the text after the history. Then come three pieces for each
    entry: the title as the oldest item, the title behind a separator, the title as a target.
    """

    START, AFTER, FIXED = 0, 1, 2

    def __init__(self, pieces: PromptPieces):
        separator = pieces.separator
        oldest, later, target = pieces.items, [separator + item for item in pieces.items], pieces.targets
        ids = [pieces.start, pieces.after, *oldest, *later, *target]
        segments = [pieces.start_segments, [TEMPLATE] * len(pieces.after)]
        segments += [[HISTORY] * len(item) for item in oldest]
        segments += [[TEMPLATE] * len(separator) + [HISTORY] * len(item) for item in oldest]
        segments += [[TARGET] * len(item) for item in target]
        self.num_entries = len(oldest)
        self.digest = hashlib.sha256(json.dumps([ids, pieces.start_segments]).encode()).hexdigest()
        self.ids = array_of_words([np.array(piece, np.int32).tobytes() for piece in ids])
        self.segments = array_of_words([np.array(piece, np.int8).tobytes() for piece in segments])

    def numbers(self, windows: CodedWindows, kept: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """int64[pieces]: the pieces of the chosen samples, one sample behind the other.

        Args:
            kept: items of each sample's history that are in its prompt, the newest.
        """
        lengths = kept[chosen].astype(np.int64)
        ends = windows.ends[chosen].astype(np.int64)
        offsets = np.concatenate([[0], np.cumsum(lengths + 3)])
        number = np.zeros(offsets[-1], dtype=np.int64)
        number[offsets[1:] - 2] = self.AFTER
        number[offsets[1:] - 1] = self.FIXED + 2 * self.num_entries + windows.targets[chosen]
        owner = np.repeat(np.arange(len(chosen)), lengths)
        place = np.arange(len(owner)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        entry = windows.entries[(ends - lengths)[owner] + place]
        number[offsets[owner] + 1 + place] = self.FIXED + self.num_entries * (place > 0) + entry
        return number


class WindowStore(TokenStore):
    """A tokenised split of windows; see `TokenStore` for what it answers.

    Attributes:
        windows: histories and targets as catalogue entries.
        kept: items of each history that fit into the prompt, the newest; as `windows.lengths` where all fit.
        lengths: int32[n], tokens of each sample.
        num_target: int32[n].
        target_offsets: int64[n + 1].
    """

    def __init__(self, windows: CodedWindows, pieces: PromptPieces, key: str = ""):
        """Args: key: fingerprint of the windows, under which a large split is kept for other processes."""
        self.windows = windows
        self._pieces = Pieces(pieces)
        self._fingerprint: str | None = None
        self._constant = len(pieces.start) + len(pieces.after)
        self._folder: Path | None = None
        arrays: dict[str, np.ndarray] = {}
        if key and len(windows) >= SMALLEST_KEPT:
            key = digest_of(VERSION, key, self._pieces.digest, pieces.room)
            self._folder, _ = kept_folder(
                "tokens", key, lambda folder: save_arrays(folder, _measure(windows, pieces, self._constant))
            )
        if self._folder is not None:
            arrays = {name: mapped(self._folder, name) for name in ARRAYS}
        else:
            arrays = _measure(windows, pieces, self._constant)
        self.kept = arrays["kept"]
        self._lengths = arrays["lengths"]
        self.num_target = arrays["num_target"]
        self.target_offsets = arrays["target_offsets"]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample, int32[n]."""
        return self._lengths

    def row(self, sample: int) -> np.ndarray:
        """Tokens of one sample, its target included, int32[T]."""
        return self.rows([sample])[0]

    def rows(self, samples: Iterable[int]) -> list[np.ndarray]:
        """The same of several samples, in their order: their tokens are laid together, and cut."""
        chosen = np.fromiter(samples, dtype=np.int64)
        numbers = self._pieces.numbers(self.windows, self.kept, chosen)
        tokens = np.frombuffer(lay(self._pieces.ids, numbers), dtype=np.int32)
        ends = np.cumsum(self._lengths[chosen], dtype=np.int64).tolist()
        return [tokens[start:end] for start, end in zip([0, *ends], ends)]

    def _chunks(self) -> Iterator[np.ndarray]:
        """Yields all samples in parts of about CHUNK_TOKENS tokens."""
        longest = int(self._lengths.max(initial=1))
        size = max(1, CHUNK_TOKENS // longest)
        for start in range(0, len(self), size):
            yield np.arange(start, min(len(self), start + size))

    def _all(self, words, dtype: type) -> Iterator[np.ndarray]:
        for chosen in self._chunks():
            yield np.frombuffer(
                lay(words, self._pieces.numbers(self.windows, self.kept, chosen)), dtype=dtype
            )

    # -- the whole split at once: for tests, for small data, and for the digest
    @property
    def input_ids(self) -> np.ndarray:
        """int32[sum T]; made when it is asked for."""
        return np.concatenate([np.zeros(0, np.int32), *self._all(self._pieces.ids, np.int32)])

    @property
    def segments(self) -> np.ndarray:
        """int8[sum T]; made when it is asked for."""
        return np.concatenate([np.zeros(0, np.int8), *self._all(self._pieces.segments, np.int8)])

    @property
    def offsets(self) -> np.ndarray:
        """int64[n + 1]; made when it is asked for."""
        offsets = np.zeros(len(self) + 1, dtype=np.int64)
        np.cumsum(self._lengths, out=offsets[1:])
        return offsets

    @property
    def fingerprint(self) -> str:
        """SHA-256 of tokens, segments and target lengths: the same as of a flat store of these samples."""
        kept = None if self._folder is None else self._folder / "fingerprint.json"
        if self._fingerprint is None and kept is not None and kept.is_file():
            self._fingerprint = json.loads(kept.read_text(encoding="ascii"))
        if self._fingerprint is None:
            digest = hashlib.sha256()
            for part in self._all(self._pieces.ids, np.int32):
                digest.update(part)
            digest.update(self.offsets)
            for part in self._all(self._pieces.segments, np.int8):
                digest.update(part)
            digest.update(np.ascontiguousarray(self.num_target))
            self._fingerprint = digest.hexdigest()
            if kept is not None:
                with contextlib.suppress(OSError):  # another process will compute it again
                    write_json(kept, self._fingerprint)
        return self._fingerprint

    @property
    def constant_prompt(self) -> int | None:
        """Tokens of the prompt where all samples have the same one, because no history has an item."""
        return None if self.kept.any() else self._constant


def _measure(windows: CodedWindows, pieces: PromptPieces, constant: int) -> dict[str, np.ndarray]:
    """The arrays of `ARRAYS`.

    Args:
        constant: tokens that all prompts have beside their history.
    """
    target_lengths = np.array([len(target) for target in pieces.targets], dtype=np.int32)
    num_target = target_lengths[windows.targets]
    target_offsets = np.zeros(len(windows) + 1, dtype=np.int64)
    np.cumsum(num_target, out=target_offsets[1:])
    kept = np.zeros(len(windows), dtype=windows.lengths.dtype)
    lengths = num_target + np.int32(constant)
    for start in range(0, len(windows), CHUNK):
        span = slice(start, start + CHUNK)
        kept[span], tokens = _fitting(windows, span, pieces)
        lengths[span] += tokens
    return {"kept": kept, "lengths": lengths, "num_target": num_target, "target_offsets": target_offsets}


def _fitting(windows: CodedWindows, span: slice, pieces: PromptPieces) -> tuple[np.ndarray, np.ndarray]:
    """(items of each history that fit, the tokens that they take), of a part of the windows.

    The oldest items are left out first.
    """
    lengths = windows.lengths[span].astype(np.int64)
    ends = windows.ends[span].astype(np.int64)
    item_tokens = np.array([len(item) for item in pieces.items], dtype=np.int64)
    kept = np.zeros(len(lengths), dtype=windows.lengths.dtype)
    tokens = np.zeros(len(lengths), dtype=np.int32)
    fits = np.ones(len(lengths), dtype=bool)
    for back in range(1, int(lengths.max(initial=0)) + 1):
        fits &= back <= lengths
        entry = windows.entries[np.where(fits, ends - back, 0)]
        cost = item_tokens[entry] + (back > 1) * len(pieces.separator)
        fits &= tokens + cost <= pieces.room
        tokens += np.where(fits, cost, 0).astype(np.int32)
        kept += fits
    return kept, tokens


def tokenise_split(
    encoder: PromptEncoder, catalogue: Catalogue, windows: CodedWindows, key: str = ""
) -> tuple[WindowStore, list[str]]:
    """Tokenises windows with their targets.

    Args:
        key: fingerprint of the windows; a large split is kept under it. Empty: it is not kept.

    Returns:
        the store, and notes that count what had to be left out for length.

    Raises:
        UserError: a catalogue title does not fit into prompt.max_length.
    """
    encoder.reserve_for(catalogue)
    store = WindowStore(windows, encoder.pieces_of([entry.text for entry in catalogue.entries]), key)
    dropped = windows.lengths - store.kept
    num_cut = int(np.count_nonzero(dropped))
    notes = []
    if num_cut:
        notes.append(
            f"{num_cut} of {len(windows)} samples exceed prompt.max_length={encoder.max_length}: "
            f"their {int(dropped.sum(dtype=np.int64))} oldest history items are left out"
        )
    return store, notes
