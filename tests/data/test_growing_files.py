"""Windows that grow out of window files: valid is carved from train, and a limit tears the users' sequences.

A title says its user and its place in the user's sequence ("Film 3 of 7" is place 3 of user 7). So the
tokens of a row say by themselves whose items they are and in which order, without anything of the code that
stitches.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from gdrt_ds.batches.plan import BatchPlan
from gdrt_ds.config import load_config
from gdrt_ds.data.growing import GrowingStore
from gdrt_ds.training.preparation import prepare

LONGEST = 3
"""History items of a window in the files."""
BLOCK, MIN_HISTORY, LIMIT = 6, 1, 60


def write_files(folder, num_users=9, seed=1):
    """A folder of the MSL family without valid.csv, its rows in no order; returns its train windows.

    Returns:
        time -> (user, place of the target); no two windows have one time.
    """
    rng = np.random.default_rng(seed)
    lengths = rng.integers(6, 16, num_users)
    events = [(user, place) for user, length in enumerate(lengths) for place in range(length)]
    # The users take turns, so the latest windows, which are carved, belong to several of them.
    times = {}
    mixed = rng.permutation(np.repeat(np.arange(num_users), lengths))
    seen = [0] * num_users
    for time, user in enumerate(mixed):
        times[int(user), seen[user]] = time
        seen[user] += 1
    rows = {split: ["user_id,item_ids,timestamp"] for split in ("train", "test")}
    train = {}
    for user, place in rng.permutation(events).tolist():
        if place == 0:
            continue
        split = "test" if place == lengths[user] - 1 else "train"
        window = [user * 100 + earlier for earlier in range(max(0, place - LONGEST), place + 1)]
        time = int(times[user, place])
        rows[split].append(f'{user},"{window}",{time}')
        if split == "train":
            train[time] = (user, place)
    for split, lines in rows.items():
        (folder / f"{split}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    names = {str(user * 100 + place): f"Film {place} of {user}" for user, place in events}
    (folder / "id2name4Rec.json").write_text(json.dumps(names), encoding="utf-8")
    return train


def settings(folder, *more):
    return load_config(
        None,
        [
            f"data.path={folder}",
            f"run.dir={folder}/run",
            "data.windows=growing",
            f"data.min_history={MIN_HISTORY}",
            f"train.block_samples={BLOCK}",
            "model.path=tiny-random",
            "prompt.template=plain",
            "objective=sft",
            "train.global_batch=7",
            "train.micro_batch=7",
            *more,
        ],
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return folder, write_files(folder)


@pytest.fixture(scope="module")
def limited(files):
    return prepare(settings(files[0], f"data.limit_train={LIMIT}"))


@pytest.fixture(scope="module")
def whole(files):
    return prepare(settings(files[0]))


def titles_of(prepared, row):
    """(user, place) of every title of a row, the target last, read from its tokens."""
    text = prepared.tokenizer.decode(prepared.stores["train"].row(int(row)).tolist())
    found = re.findall(r"Film (\d+) of (\d+)", text)
    return [(int(user), int(place)) for place, user in found]


def epochs(prepared, count=3):
    """The rows of each epoch, as (user, place) of their titles."""
    store = prepared.stores["train"]
    return [[titles_of(prepared, row) for row in store.order(epoch)] for epoch in range(count)]


def split_by_time(train):
    """(windows to train on, carved windows) of the files: the latest ninth is carved, as .1 beside .8."""
    times = sorted(train)
    size = round(len(times) / 9)
    return {train[time] for time in times[:-size]}, {train[time] for time in times[-size:]}


def test_targets_of_an_epoch_are_the_kept_train_windows_of_the_files_each_once(files, limited, whole):
    before, carved = split_by_time(files[1])
    assert carved and len(before) > LIMIT, "windows are cut here by carving and by the limit"
    for rows in epochs(whole):
        assert sorted(row[-1] for row in rows) == sorted(before)
    kept = {(int(s.user_id), int(s.target) % 100) for s in limited.data.corpus.split("train")}
    assert len(kept) == LIMIT and kept < before
    for rows in epochs(limited):
        targets = [row[-1] for row in rows]
        assert sorted(targets) == sorted(kept), "neither a carved window nor one beyond the limit"
        assert not set(targets) & carved


def test_no_history_holds_its_target_or_an_item_after_it(limited, whole):
    for prepared in (limited, whole):
        for rows in epochs(prepared):
            for *history, (user, place) in rows:
                assert history, "every history has an item"
                assert all(other == user and earlier < place for other, earlier in history)


def test_histories_are_unbroken_stretches_of_the_user_s_own_sequence(limited, whole):
    """With a limit, the target of a window that was left out is still an item that came before."""
    for prepared in (limited, whole):
        lengths = set()
        for rows in epochs(prepared):
            for *history, (user, place) in rows:
                assert history == [(user, earlier) for earlier in range(place - len(history), place)]
                lengths.add(len(history))
        assert lengths <= set(range(MIN_HISTORY, MIN_HISTORY + BLOCK)) and min(lengths) == MIN_HISTORY
        # No window of the files has so many items: these histories are stitched from several windows.
        assert max(lengths) > LONGEST


def test_windows_of_one_user_are_one_run_unless_a_limit_tears_them(limited, whole):
    users = {s.user_id for s in whole.data.corpus.split("train")}
    assert len(whole.stores["train"].windows.runs) == len(users)
    assert len(limited.stores["train"].windows.runs) > len(users)


def test_the_plan_s_steps_take_each_of_these_targets_once_an_epoch(limited):
    store = limited.stores["train"]
    plan = BatchPlan(None, 7, 7, 2, 0, store=store, trees=True)
    steps = -(-2 * LIMIT // 7)
    taken = np.concatenate([plan.samples(step) for step in range(steps)])
    for epoch in range(2):
        rows = taken[taken // LIMIT == epoch]
        assert sorted(store.sample_of(rows).tolist()) == list(range(LIMIT))


@pytest.mark.parametrize("planted", ["one too few", "one twice", "outside", "another user", "another split"])
def test_growing_windows_with_other_targets_than_the_train_windows_are_an_error(limited, whole, planted):
    """The tokens of a target come from the sliding windows, its history from the growing ones."""
    store, windows = whole.stores["train"], whole.stores["train"].windows
    place_of, run_of = windows.place_of.copy(), windows.run_of.copy()
    of_first_run = np.flatnonzero(run_of == run_of[0])
    if planted == "one twice":
        place_of[of_first_run[0]] = place_of[of_first_run[1]]
    elif planted == "outside":
        place_of[of_first_run] += 1
    elif planted == "another user":
        # Two samples of different users change places, so every target is still there once.
        other = np.flatnonzero(run_of != run_of[0])[0]
        for column in (place_of, run_of):
            column[[0, other]] = column[[other, 0]]
    wrong = replace(windows, place_of=place_of, run_of=run_of)
    if planted == "one too few":
        wrong = replace(windows, place_of=place_of[:-1], run_of=run_of[:-1])
    elif planted == "another split":
        wrong = limited.stores["train"].windows
    GrowingStore(store.sliding, windows, store.encoder, store.catalogue)
    with pytest.raises(RuntimeError, match="are not exactly the train windows"):
        GrowingStore(store.sliding, wrong, store.encoder, store.catalogue)
