"""The losses of the last-item Markov chain are those of its definition, title by title and token by token."""

import numpy as np
import pytest

from gdrt_ds.data.trie import TokenTrie
from gdrt_ds.dro.markov import NO_HISTORY, STRENGTHS, MarkovLosses


def case(seed: int, num_entries: int = 13, num_windows: int = 300):
    """(token sequences that share beginnings, last, targets): successors are far from even."""
    rng = np.random.Generator(np.random.PCG64(seed))
    found = {tuple(rng.integers(3, 6, rng.integers(1, 5)).tolist()) + (2,) for _ in range(10 * num_entries)}
    sequences = [list(tokens) for tokens in sorted(found)]
    rng.shuffle(sequences)
    sequences = sequences[:num_entries]
    last = rng.integers(NO_HISTORY, len(sequences), num_windows)
    followed = rng.random(num_windows) < 0.5
    targets = np.where(followed, (last + 1) % len(sequences), rng.integers(0, len(sequences), num_windows))
    return sequences, last.astype(np.int32), targets.astype(np.int32)


def title_probabilities(window: int, last, targets, num_entries: int, strength: float) -> np.ndarray:
    """float64[E] by the formula, with every other window counted one by one."""
    popular, after = np.ones(num_entries), np.zeros(num_entries)
    for other in range(len(targets)):
        if other != window:
            popular[targets[other]] += 1
            if last[window] != NO_HISTORY and last[other] == last[window]:
                after[targets[other]] += 1
    weights = after + strength * popular / popular.sum()
    return weights / weights.sum()


def token_losses(sequences, last, targets, strength: float) -> np.ndarray:
    """float64[N]: minus log of the share that goes on with a token, of the titles that went on so far."""
    losses = []
    for window, target in enumerate(targets):
        p = title_probabilities(window, last, targets, len(sequences), strength)
        for place in range(len(sequences[target])):
            so_far, chosen = (
                sum(p[e] for e, other in enumerate(sequences) if other[:length] == sequences[target][:length])
                for length in (place, place + 1)
            )
            losses.append(np.log(so_far) - np.log(chosen))
    return np.array(losses)


def computed(sequences, last, targets) -> MarkovLosses:
    trie = TokenTrie.build(sequences)
    nodes = np.concatenate([trie.walk(tokens) for tokens in sequences]).astype(np.int32)
    offsets = np.cumsum([0, *map(len, sequences)])
    target_offsets = np.cumsum([0, *(len(sequences[target]) for target in targets)])
    return MarkovLosses(trie, nodes, offsets, last, targets, target_offsets)


@pytest.mark.parametrize("seed", range(5))
def test_losses_are_those_of_the_definition(seed):
    sequences, last, targets = case(seed)
    found = computed(sequences, last, targets)
    expected = token_losses(sequences, last, targets, found.strength)
    assert len(found) == len(expected)
    np.testing.assert_allclose(found[np.arange(len(found))], expected, rtol=1e-10, atol=1e-12)
    some = np.array([len(found) - 1, 0, 7, 7])
    np.testing.assert_allclose(found[some], expected[some], rtol=1e-10, atol=1e-12)


def test_the_strength_is_the_one_with_the_lowest_loss():
    sequences, last, targets = case(7)
    found = computed(sequences, last, targets)

    def mean(strength):
        own = [
            title_probabilities(window, last, targets, len(sequences), strength)[target]
            for window, target in enumerate(targets)
        ]
        return -np.log(own).mean()

    losses = {strength: mean(strength) for strength in STRENGTHS}
    assert found.strength == min(losses, key=losses.__getitem__)
    assert found.title_loss == pytest.approx(losses[found.strength], rel=1e-12)
    assert found.popularity_loss == pytest.approx(mean(1e12), rel=1e-6)
    assert found.title_loss < found.popularity_loss - 0.1  # half of the targets follow the rule


def test_a_pair_that_comes_once_is_not_certain():
    sequences = [[3, 2], [4, 2], [5, 2]]
    last, targets = np.array([0, 1, 1], dtype=np.int32), np.array([1, 2, 2], dtype=np.int32)
    found = computed(sequences, last, targets)
    assert found[np.array([0])][0] > np.log(2)  # its only witness is left out: popularity speaks
