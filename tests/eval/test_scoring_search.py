"""Certified best-first search, beam search and ranks, against exact scores and against transformers' own beam
search.
"""

import numpy as np
import pytest
import torch

from eval.scoring import BestFirst, beam_search, expected_rank, num_tied, path_scores, top_entries
from eval.scoring import best_first as best_first_module
from gdrt_ds.inference.catalogue_scoring import CatalogueScorer
from gdrt_ds.inference.prompt_reader import PromptReader
from tests.eval.scoring_models import TERMINATOR, catalogue_tokens, family, head_and_prompts, trie_of

HEAD, PROMPTS = head_and_prompts()
ITEMS = catalogue_tokens()
TRIE = trie_of(ITEMS)
NATURAL = np.arange(len(ITEMS))


def setting(name, scoring):
    reader = PromptReader(family(name), HEAD)
    return reader, CatalogueScorer(reader, TRIE, scoring).score(PROMPTS).numpy(), reader.read(PROMPTS)


@pytest.mark.parametrize("scoring", ["renormalised", "full"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_best_first_finds_the_exact_top_list_and_certifies_it(name, scoring):
    reader, exact, state = setting(name, scoring)
    for nodes_per_pass in (4, 64):
        for scores, found in zip(
            exact,
            BestFirst(reader, TRIE, scoring, nodes_per_pass=nodes_per_pass).search(state, 7),
            strict=True,
        ):
            best = top_entries(scores, 7, NATURAL)
            assert found.entries.tolist() == best.tolist() and found.certified == 7
            assert np.allclose(found.scores, scores[best], atol=1e-4, rtol=0)
            assert np.delete(scores, best).max() <= found.bound + 1e-4


def test_best_first_opens_less_than_the_whole_tree():
    reader, _, state = setting("llama", "renormalised")
    scorer = CatalogueScorer(reader, TRIE)
    found = BestFirst(reader, TRIE, nodes_per_pass=4).search(state, 3)
    assert max(result.expanded for result in found) < scorer.nodes_forwarded


def test_a_node_budget_ends_the_search_and_certifies_only_what_is_proven():
    reader, exact, state = setting("llama", "full")
    for scores, found in zip(
        exact, BestFirst(reader, TRIE, "full", max_nodes=40, nodes_per_pass=8).search(state, 7), strict=True
    ):
        best = top_entries(scores, 7, NATURAL)
        assert found.certified < 7 and found.expanded < 120
        assert found.entries[: found.certified].tolist() == best[: found.certified].tolist()
        unseen = np.setdiff1d(NATURAL, found.entries)
        assert scores[unseen].max() <= found.bound + 1e-4


def test_a_list_longer_than_the_catalogue_is_the_catalogue():
    reader, exact, state = setting("llama", "renormalised")
    for scores, found in zip(exact, BestFirst(reader, TRIE).search(state, 1000), strict=True):
        assert found.entries.tolist() == top_entries(scores, 1000, NATURAL).tolist() and len(
            found.entries
        ) == len(ITEMS)


def test_a_bound_that_ignores_the_frontier_is_caught(monkeypatch):
    monkeypatch.setattr(
        best_first_module._Search, "done", lambda self: len(self.found) == self.k or not self.frontier
    )
    reader, exact, state = setting("llama", "full")
    found = BestFirst(reader, TRIE, "full", nodes_per_pass=4).search(state, 7)
    assert any(
        f.entries.tolist() != top_entries(s, 7, NATURAL).tolist() for f, s in zip(found, exact, strict=True)
    )


@pytest.mark.parametrize("scoring", ["renormalised", "full"])
def test_the_target_alone_is_scored_as_in_the_whole_catalogue(scoring):
    for name in ("mistral", "gpt2"):
        reader, exact, state = setting(name, scoring)
        targets = [3, 41, 0, 59]
        assert np.allclose(
            path_scores(reader, TRIE, state, targets, scoring), exact[range(4), targets], atol=1e-4, rtol=0
        )


@pytest.mark.parametrize("renormalise,length_penalty", [(True, 0.0), (False, 0.0), (False, 1.0)])
def test_beam_mode_gives_the_same_list_as_transformers_constrained_beam_search(renormalise, length_penalty):
    model, scoring = family("llama"), "renormalised" if renormalise else "full"
    reader = PromptReader(model, HEAD)
    for prompt in PROMPTS:

        def allowed(_, ids, prompt=prompt):
            node = 0
            for token in ids[len(prompt) :].tolist():
                kids = TRIE.children(node)
                if not (TRIE.token[kids] == token).any():
                    return [TERMINATOR]
                node = int(kids[TRIE.token[kids] == token][0])
            return TRIE.token[TRIE.children(node)].tolist() or [TERMINATOR]

        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            num_beams=10,
            num_return_sequences=10,
            max_new_tokens=12,
            do_sample=False,
            prefix_allowed_tokens_fn=allowed,
            renormalize_logits=renormalise,
            length_penalty=length_penalty,
            output_scores=True,
            return_dict_in_generate=True,
        )
        theirs = []
        for tokens in output.sequences[:, len(prompt) :].tolist():
            theirs.append(ITEMS.index(tokens[: tokens.index(TERMINATOR) + 1]))
        entries, scores = beam_search(reader, TRIE, reader.read([prompt]), 10, scoring, length_penalty)[0]
        assert entries.tolist() == theirs
        assert np.allclose(scores, output.sequences_scores.numpy(), atol=1e-4)


def test_more_beams_than_items_reach_the_whole_catalogue():
    reader, exact, state = setting("gemma3", "renormalised")
    for scores, (entries, found) in zip(exact, beam_search(reader, TRIE, state, 200), strict=True):
        assert entries.tolist() == top_entries(scores, len(ITEMS), NATURAL).tolist()
        assert np.allclose(found, scores[entries], atol=1e-4)


def test_a_constant_scorer_ranks_like_chance():
    scores = np.full(101, -3.0)
    assert {expected_rank(scores, t) for t in range(101)} == {51.0} and num_tied(scores, 5) == 101


def test_ties_share_their_places_and_nan_is_the_worst_rank():
    scores = np.array([-1.0, -2.0, -2.0, np.nan, -5.0, -np.inf])
    assert [expected_rank(scores, t) for t in range(6)] == [1.0, 2.5, 2.5, 6.0, 4.0, 5.0]
    assert [num_tied(scores, t) for t in range(4)] == [1, 2, 2, 1]
    assert top_entries(scores, 10, np.arange(6)).tolist() == [0, 1, 2, 4, 5, 3]
    assert top_entries(scores, 2, np.array([0, 2, 1, 3, 4, 5])).tolist() == [
        0,
        2,
    ]  # equal scores by the given order
    assert expected_rank(np.array([0.1 + 0.2, 0.3, 0.0]), 1) == 1.5  # equal up to the order of a sum
    assert expected_rank(np.full(4, np.nan), 2) == 4.0


def test_a_model_that_gives_nan_is_counted_and_not_certified():
    model = family("llama")
    model.lm_head.weight.data[:] = float("nan")
    reader = PromptReader(model, HEAD)
    assert np.isnan(CatalogueScorer(reader, TRIE).score(PROMPTS[:1]).numpy()).all()
    assert BestFirst(reader, TRIE).search(reader.read(PROMPTS[:1]), 5)[0].certified == 0
