"""Whether the SASRec floor is a fair one: ours beside published figures on MovieLens-100k, leave-one-out.

    python benchmarks/sasrec_floor.py [--json] [--quick]

The protocol is that of the published table: the 5-core (943 users, 1,349 items), each user's last item is the
test target, the one before it the valid target, and every item of the catalogue is ranked. Histories are the
last 50 items. The grid is tuned as in every evaluation, and the trained model is cached: the second call
takes seconds. --quick trains one setting for five epochs, which is not a result.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
from machine_line import machine

from eval.floors.markov import Markov
from eval.floors.popularity import Popularity
from eval.floors.sasrec import SasrecFloor
from eval.sasrec import GRID, Setting, Training, Tuned, load_or_train, sequences_of
from eval.sasrec.cache import trained_now
from eval.sasrec.training import accuracy
from gdrt_ds.config import load_config
from gdrt_ds.data.catalogue import Catalogue
from gdrt_ds.data.corpus import load_corpus

DATA = (
    "data.path=ml-100k",
    "data.split=leave_one_out",
    "data.kcore=5",
    "data.history_length=50",
    "data.min_history=1",
)

# NDCG@10, HR@10. SASRec and GRU4Rec: github.com/kanishkaRandunu/pswrec2k26, one run of each. T5-small with
# sequential ids: github.com/agiresearch/OpenP5.
PUBLISHED = {
    "SASRec": (0.0594, 0.1198),
    "GRU4Rec": (0.0650, 0.1304),
    "OpenP5 T5-small": (0.0595, 0.1208),
}


def quick_model(sequences):
    """Five epochs of one setting: shows that the way is clear, not how good SASRec is."""
    training = Training(sequences, Setting(64, 0.2, 3e-3))
    started = time.perf_counter()
    for _ in range(5):
        training.run_epoch()
    tried = {training.setting: training.epochs}
    tuned = Tuned(training.setting, training.best_weights, training.best, tried)
    return trained_now(sequences, tuned, "", time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="JSON lines instead of a table")
    parser.add_argument("--quick", action="store_true", help="one setting, five epochs: within a minute")
    options = parser.parse_args()
    corpus = load_corpus(load_config(None, list(DATA)).data)
    catalogue = Catalogue.build(corpus)
    sequences = sequences_of(corpus, catalogue)
    if options.quick:
        trained = quick_model(sequences)
    else:
        trained = load_or_train(sequences, say=lambda line: None if options.json else print(line, flush=True))
    test = corpus.splits["test"]
    targets = np.array([catalogue.index_of[sample.target] for sample in test])
    floors = {
        "popularity": Popularity(catalogue),
        "last-item Markov": Markov(corpus, catalogue),
        "sasrec": SasrecFloor(trained, catalogue),
    }
    shape = f"{len(test)} users, {len(catalogue)} titles, {len(sequences.targets())} train targets"
    rows = []
    for name, floor in floors.items():
        measured = accuracy(floor.log_probs([sample.history for sample in test]), targets)
        for metric, values in zip(("ndcg@10", "hr@10"), measured):
            row = {
                "name": f"{name} / {metric}",
                "ours": float(values.mean()),
                "standard_error": float(values.std() / np.sqrt(len(values))),
                "shape": shape,
                "machine": machine(),
            }
            if name == "sasrec":
                row["peer"] = PUBLISHED["SASRec"][metric == "hr@10"]
                row["ratio"] = row["ours"] / row["peer"]
                row |= {"setting": trained.about["setting"], "seconds": trained.about["seconds"]}
                row["settings_tried"] = 1 if options.quick else len(GRID)
            rows.append(row)
    if options.json:
        print("\n".join(json.dumps(row) for row in rows))
        return
    print(f"\nMovieLens-100k, leave-one-out, full ranking: {shape}\n{machine()}")
    print(f"sasrec: {floors['sasrec'].notes[0]}; trained in {trained.about['seconds']:.0f} s")
    if options.quick:
        print("--quick: not a result")
    print("\n| | NDCG@10 | HR@10 |\n|---|---|---|")
    for ndcg, hit in zip(rows[::2], rows[1::2]):
        cells = [f"{row['ours']:.4f} +- {row['standard_error']:.4f}" for row in (ndcg, hit)]
        print(f"| {ndcg['name'].split(' / ')[0]}, ours | {cells[0]} | {cells[1]} |")
    for name, (ndcg, hit) in PUBLISHED.items():
        print(f"| {name}, published | {ndcg:.4f} | {hit:.4f} |")


if __name__ == "__main__":
    main()
