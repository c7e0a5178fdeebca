"""A tuned SASRec: a transformer over item ids, trained on the same train windows as the language model.

It is chosen on the valid split, trained once per data set and kept in the cache (`eval.sasrec`). Where it is
not cached and nobody asked for it by name, it is trained only if that takes about two minutes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from eval.floors.base import Floor, LeftOut
from eval.sasrec import Trained, cached, expected_seconds, fingerprint_of, load_or_train, sequences_of
from eval.sasrec.sequences import Sequences, histories_of
from eval.sasrec.training import CPU, Setting, log_probs
from gdrt_ds.data.catalogue import Catalogue
from gdrt_ds.data.corpus import Corpus

UNASKED_SECONDS = 120
"""What a floor may take that nobody asked for by name."""


class SasrecFloor:
    """Scores of a trained model."""

    def __init__(self, trained: Trained, catalogue: Catalogue):
        self.model = trained.model
        self.index_of = catalogue.index_of
        about = trained.about
        self.notes = [
            f"floor sasrec: {Setting(**about['setting']).words()}, best epoch {about['best_epoch']}, "
            f"validation NLL {about['valid']['nll']:.3f}, NDCG@10 {about['valid']['ndcg']:.4f}; chosen among "
            f"{len(about['tried'])} settings on the valid split"
        ]

    def log_probs(self, histories: Sequence[tuple[str, ...]]) -> np.ndarray:
        entries = [[self.index_of[item] for item in history] for history in histories]
        max_history = self.model.slots.num_embeddings - 1
        return log_probs(self.model, histories_of(entries, max_history, self.model.num_items))


def lacks(corpus: Corpus) -> str | None:
    if corpus.splits["valid"]:
        return None
    return "the valid split is empty, and sasrec is chosen on it; data.split_ratio makes one"


def fit(corpus: Corpus, catalogue: Catalogue, asked: bool) -> SasrecFloor:
    """Loads or trains it.

    Raises:
        LeftOut: it was not asked for by name, is not cached, and would take longer than UNASKED_SECONDS.
    """
    sequences = sequences_of(corpus, catalogue)
    trained = cached(sequences, fingerprint_of(sequences))
    if trained is None:
        trained = _train(sequences, _device(), asked)
    return SasrecFloor(trained, catalogue)


def _train(sequences: Sequences, device: torch.device, asked: bool) -> Trained:
    seconds = expected_seconds(sequences, device=device)
    if seconds > UNASKED_SECONDS and not asked:
        raise LeftOut(
            f"floor sasrec is left out: training takes about {_duration(seconds)} here, once for this data. "
            "Add it with --floors popularity,markov,sasrec; the finished scores are kept"
        )
    print(
        f"sasrec: trained once for this data on {device.type}, {len(sequences.targets())} targets an epoch, "
        f"about {_duration(seconds)}",
        flush=True,
    )
    return load_or_train(sequences, device=device, say=lambda line: print(line, flush=True))


def _device() -> torch.device:
    """The GPU of this process where there is one."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return CPU


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min"


FLOOR = Floor(fit, order=30, lacks=lacks)
