"""SmolLM2-135M on MovieLens-100k, both from their packages: exact scores of a real catalogue against items
scored one by one.
"""

import numpy as np
import pytest
import torch

from eval.scoring import BestFirst, per_item_scores, top_entries
from gdrt_ds.config import load_config
from gdrt_ds.data.catalogue import Catalogue
from gdrt_ds.data.corpus import load_corpus
from gdrt_ds.inference.catalogue_scoring import CatalogueScorer
from gdrt_ds.inference.recommender import assemble
from gdrt_ds.models.source import resolve_model
from gdrt_ds.runtime import Runtime

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def recommender():
    config = load_config(
        None,
        [
            "data.path=ml-100k",
            "model.quantization=none",
            "model.dtype=float32",
            "data.limit_test=16",
            "data.limit_train=16",
        ],
    )
    corpus = load_corpus(config.data)
    found = assemble(
        config,
        Runtime(),
        resolve_model(config.model.path),
        None,
        None,
        corpus.domain,
        Catalogue.build(corpus),
    )
    return found, [found.prompt_of(s.history) for s in corpus.split("test")[:2]]


def test_exact_scores_of_a_real_catalogue_equal_items_scored_one_by_one(recommender):
    found, prompts = recommender
    scorer = CatalogueScorer(found.reader, found.trie)
    scores = scorer.score(prompts)
    assert torch.allclose(scores.exp().sum(1), torch.ones(2, dtype=torch.float64), atol=1e-9, rtol=0)
    assert scorer.nodes_forwarded < 600 < len(found.catalogue)
    longest = max(
        range(len(found.catalogue)),
        key=lambda i: len(found.encoder.target_ids(found.catalogue.entries[i].text)),
    )
    ends_in_quote = next(
        i for i, e in enumerate(found.catalogue.entries) if e.text.endswith(")")
    )  # `)"` may be one token
    entries = [int(scores[1].argmax()), longest, ends_in_quote]
    assert torch.allclose(
        scores[1, entries],
        per_item_scores(found.loaded.model, found.trie, prompts[1], entries),
        atol=1e-4,
        rtol=0,
    )
    top = BestFirst(found.reader, found.trie).search(found.reader.read(prompts[:1]), 10)[0]
    assert top.certified == 10 and top.expanded < scorer.nodes_forwarded
    assert (
        top.entries.tolist() == top_entries(scores[0].numpy(), 10, np.arange(len(found.catalogue))).tolist()
    )
