"""Scoring a large catalogue against the bare time of its own matrix products.

    python benchmarks/scoring_floor.py [--titles 22700] [--users 4] [--json] [--quick]

SmolLM2-135M scores generated titles in float32: all of them for one user, and the certified top-50 by
best-first search for a batch of users. While one call runs, its matrix products are written down with their
shapes. The floor is the time that these products take alone, one after the other, on other values; what is
above it is the search itself, attention's softmax, the norms and the reading of memory. Times are CPU seconds
of this process; set OMP_NUM_THREADS to the cores that are free.
"""

from __future__ import annotations

import argparse
import json

from one_rank import clock  # sets the environment of torch, so it stands before it

# isort: split
import torch
from machine_line import machine
from scoring import generated_titles
from step_floor import Floor, Products, layout


class ScoringProducts(Products):
    """Products of a pass without gradients, where linear layers and attention are not yet taken apart."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split("::")[-1].split(".")[0]
        if name in ("linear", "matmul"):
            left, right = args[0], args[1].t() if name == "linear" else args[1]
            if right.dim() == 1:
                right = right[:, None]
            if right.dim() == 2:
                left = left.reshape(-1, left.shape[-1])
            self.counts[layout(left), layout(right)] += 1
            return function(*args, **(kwargs or {}))
        if name == "scaled_dot_product_attention":
            self._attention(*args, backward=False)
            return function(*args, **(kwargs or {}))
        return super().__torch_dispatch__(function, types, args, kwargs)


def prepare(num_titles: int, num_users: int):
    """The reader of SmolLM2, the trie of the titles and the prompts of some users."""
    from transformers import AutoModelForCausalLM

    from gdrt_ds.config import PromptSection
    from gdrt_ds.data.prompts import PromptEncoder
    from gdrt_ds.data.templates import PromptTemplate
    from gdrt_ds.data.trie import TokenTrie
    from gdrt_ds.inference.prompt_reader import PromptReader
    from gdrt_ds.models.built_in import smollm2_folder
    from gdrt_ds.models.source import load_tokenizer

    tokenizer = load_tokenizer(smollm2_folder())
    model = AutoModelForCausalLM.from_pretrained(smollm2_folder(), dtype=torch.float32).eval()
    template = PromptTemplate.from_config(PromptSection(template="alpaca"), "movie", tokenizer)
    encoder = PromptEncoder(template, tokenizer, 1024)
    titles = generated_titles(num_titles)
    encoder.warm(titles)
    trie = TokenTrie.build([encoder.target_ids(title) for title in titles])
    histories = [titles[10 * user : 10 * user + 8] for user in range(num_users)]
    prompts = [encoder.encode(history).input_ids.tolist() for history in histories]
    return PromptReader(model, encoder.prefix_ids), trie, prompts


def measured(name: str, call, users: int, shape: dict) -> dict:
    """Times a call and its products alone; runs the call twice, the first time to write them down."""
    with ScoringProducts() as products:
        call()
    start = clock()
    nodes = call()
    between = clock()
    Floor(products.counts, torch.device("cpu")).run()
    alone = clock() - between
    return {
        "name": name,
        "unit": "CPU s/user",
        "ours": (between - start) / users,
        "floor": alone / users,
        "ratio": (between - start) / alone,
        "nodes_per_user": nodes / users,
        "shape": {**shape, "users": users},
        "machine": machine(),
    }


def measure(options) -> list[dict]:
    from eval.scoring import BestFirst
    from gdrt_ds.inference.catalogue_scoring import CatalogueScorer

    reader, trie, prompts = prepare(options.titles, options.users)
    shape = {"titles": options.titles, "trie_nodes": trie.num_nodes, "model": "smollm2-135m"}
    best_first, exact = BestFirst(reader, trie), CatalogueScorer(reader, trie)

    def search() -> int:
        found = best_first.search(reader.read(prompts), 50)
        assert all(one.certified >= 50 for one in found)
        return sum(one.expanded for one in found)

    def score() -> int:
        scores = exact.score(prompts[:1])
        assert abs(float(scores.exp().sum()) - 1) < 1e-6
        return exact.nodes_forwarded

    return [
        measured("certified_top50", search, len(prompts), shape),
        measured("exact", score, 1, shape),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--titles", type=int, default=22_700)
    parser.add_argument("--users", type=int, default=4, help="users of one batch of the search")
    parser.add_argument("--json", action="store_true", help="JSON lines only")
    parser.add_argument("--quick", action="store_true", help="1,000 titles")
    options = parser.parse_args()
    if options.quick:
        options.titles = min(options.titles, 1_000)
    for row in measure(options):
        if options.json:
            print(json.dumps(row))
        else:
            print(
                f"{row['name']:16s} {row['ours']:8.2f} CPU s a user, its products alone {row['floor']:8.2f}: "
                f"{row['ratio']:.2f} x; {row['nodes_per_user']:,.0f} of {row['shape']['trie_nodes']:,} nodes"
            )
    if not options.json:
        print(machine())


if __name__ == "__main__":
    main()
