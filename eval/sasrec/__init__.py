"""SASRec, a transformer over item ids: the sequential recommender that reviewers ask for beside a new one.

    model.py      the network, and its softmax over the whole catalogue
    sequences.py  train windows as sequences of catalogue entries; the valid windows
    training.py   one setting: epochs, validation, the best epoch
    tuning.py     the small grid of settings, and which one is taken
    cache.py      trained once per data set

Kang & McAuley, "Self-Attentive Sequential Recommendation", ICDM 2018. The original samples one negative per
target; a softmax over the whole catalogue is stronger (Klenitskiy & Vasilev, "Turning Dross Into Gold Loss",
RecSys 2023) and gives probabilities, so that every metric exists for it.

Why own code on torch's transformer layers: RecTools 0.19 needs numpy 1.26, pandas 2 and PyTorch Lightning,
older than what this project pins; RecBole's SASRec cannot be imported without RecBole's configuration, data
loaders and logging packages.
"""

from eval.sasrec.cache import Trained, cached, fingerprint_of, load_or_train
from eval.sasrec.model import SASRec
from eval.sasrec.sequences import Sequences, sequences_of
from eval.sasrec.training import Setting, Training
from eval.sasrec.tuning import GRID, Tuned, expected_seconds, tune

__all__ = [
    "GRID",
    "SASRec",
    "Sequences",
    "Setting",
    "Trained",
    "Training",
    "Tuned",
    "cached",
    "expected_seconds",
    "fingerprint_of",
    "load_or_train",
    "sequences_of",
    "tune",
]
