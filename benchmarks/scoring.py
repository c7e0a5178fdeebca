"""Users per second of catalogue scoring: exact, certified best-first, our beam, and transformers' own
constrained beam search.

    python benchmarks/scoring.py [--data ml-100k|FOLDER] [--model smollm2-135m] [--users 16] [--json]
        [--quick]

Everything runs in turns within one process, on the same model, users and catalogue, under the `renormalised`
objective. Before anything is timed, 20 items are scored one by one. What each line says:

    exact_equals_items_scored_one_by_one     largest difference of these items; sum of all probabilities
    exact_vs_hf_beam10                       every item scored, against transformers' generate with
                                             prefix_allowed_tokens_fn and 10 beams (best of 1 and 4 users)
    beam10_vs_hf_beam10                      the same search, the same lists
    best_first50_vs_exact                    certified top-50: time, and nodes opened
    hf_default_beam10_recall_of_exact_top10  its default search (whole vocabulary, length penalty)
    catalogue_size_N                         seconds and peak memory, 1,000 to 100,000 generated titles

The last one takes a small random model, because the number of nodes is what grows; `--size-model` shows it on
SmolLM2, slowly. benchmarks/scoring_floor.py compares with the bare matrix products.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import numpy as np
import torch
from machine_line import machine


def prefix_table(trie) -> dict[tuple[int, ...], list[int]]:
    """Allowed next tokens by prefix, the table that peers give to prefix_allowed_tokens_fn."""
    prefix, table = [()] * trie.num_nodes, {}
    for node in range(trie.num_nodes):
        if node:
            prefix[node] = prefix[trie.parent[node]] + (int(trie.token[node]),)
        table[prefix[node]] = trie.token[trie.children(node)].tolist()
    return table


def hf_beam(model, tokenizer, prompts, trie, table, terminator, renormalise=True, beams=10):
    """transformers' own beam search; lists of token tuples, best first."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), tokenizer.pad_token_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1

    def allowed(_, tokens):
        return table.get(tuple(tokens[width:].tolist())) or [terminator]

    output = model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        num_beams=beams,
        num_return_sequences=beams,
        do_sample=False,
        max_new_tokens=int(trie.depth.max()),
        prefix_allowed_tokens_fn=allowed,
        eos_token_id=terminator,
        pad_token_id=tokenizer.pad_token_id,
        **(dict(renormalize_logits=True, length_penalty=0.0) if renormalise else {}),
    )
    lists = output[:, width:].tolist()

    def cut(tokens):
        return tuple(tokens[: tokens.index(terminator) + 1]) if terminator in tokens else tuple(tokens)

    return [[cut(t) for t in lists[row * beams : (row + 1) * beams]] for row in range(len(prompts))]


_clock = time.perf_counter


def timed(call, *arguments):
    start = _clock()
    result = call(*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return _clock() - start, result


def on_real_data(options) -> list[dict]:
    from eval.scoring import BestFirst, beam_search, per_item_scores, top_entries
    from gdrt_ds.config import load_config
    from gdrt_ds.data.catalogue import Catalogue
    from gdrt_ds.data.corpus import load_corpus
    from gdrt_ds.inference.catalogue_scoring import CatalogueScorer
    from gdrt_ds.inference.recommender import assemble
    from gdrt_ds.models.source import resolve_model
    from gdrt_ds.runtime import Runtime

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    config = load_config(
        None,
        [
            f"data.path={options.data}",
            f"model.path={options.model}",
            "model.quantization=none",
            "model.dtype=float32",
            *options.overrides,
        ],
    )
    corpus = load_corpus(config.data)
    recommender = assemble(
        config,
        Runtime(device=device),
        resolve_model(config.model.path),
        None,
        None,
        corpus.domain,
        Catalogue.build(corpus),
    )
    samples = corpus.split("test")
    chosen = np.random.default_rng(0).choice(
        len(samples), size=min(options.users, len(samples)), replace=False
    )
    prompts = [recommender.prompt_of(samples[i].history) for i in sorted(chosen.tolist())]
    prompts.sort(key=len)
    reader, trie, model = recommender.reader, recommender.trie, recommender.loaded.model
    tokenizer, terminator = recommender.loaded.tokenizer, int(trie.token[np.flatnonzero(trie.entry >= 0)[0]])
    table = prefix_table(trie)
    leaf_tokens = {}
    for entry, entry_of in enumerate(recommender.catalogue.entries):
        leaf_tokens[tuple(recommender.encoder.target_ids(entry_of.text))] = entry
    scorer, best_first = CatalogueScorer(reader, trie), BestFirst(reader, trie)
    warm = scorer.score(prompts[:1])[0]  # warm-up: the shared head, thread pools
    checked = np.random.default_rng(1).choice(
        len(recommender.catalogue), size=min(20, len(recommender.catalogue)), replace=False
    )
    difference = float((warm[checked] - per_item_scores(model, trie, prompts[0], checked)).abs().max())
    total = float(warm.exp().sum())
    if difference > 1e-4 or abs(total - 1) > 1e-6:
        raise SystemExit(
            f"exact scores differ by {difference:.1e} nats from items scored one by one, probabilities sum "
            f"to {total}: nothing is timed"
        )
    seconds = {name: 0.0 for name in ("exact", "best_first", "beam", "hf")}
    hf_batch, overlap, default_overlap, expanded, certified, hf_users = 1, [], [], [], 0, 0
    order = np.arange(len(recommender.catalogue))
    for start in range(0, len(prompts), options.batch_size):
        batch = prompts[start : start + options.batch_size]
        spent, scores = timed(scorer.score, batch)
        seconds["exact"] += spent
        spent, found = timed(lambda: best_first.search(reader.read(batch), 50))
        seconds["best_first"] += spent
        expanded += [f.expanded for f in found]
        certified += sum(f.certified >= min(50, len(order)) for f in found)
        spent, ours = timed(lambda: beam_search(reader, trie, reader.read(batch), 10))
        seconds["beam"] += spent
        if start == 0 and len(batch) >= 4 and not options.quick:  # the peer at its better batch size
            alone = np.mean(
                [timed(hf_beam, model, tokenizer, [p], trie, table, terminator)[0] for p in batch[:2]]
            )
            hf_batch = (
                4
                if timed(hf_beam, model, tokenizer, batch[:4], trie, table, terminator)[0] / 4 < alone
                else 1
            )
        group = batch[:1] if options.quick else batch
        for low in range(0, len(group), hf_batch):
            spent, theirs = timed(
                hf_beam, model, tokenizer, group[low : low + hf_batch], trie, table, terminator
            )
            seconds["hf"] += spent
            hf_users += len(theirs)
            for row, tokens in enumerate(theirs, low):
                mine = [int(e) for e in ours[row][0]]
                overlap.append(len(set(mine) & {leaf_tokens.get(t) for t in tokens}) / 10)
        if not options.quick or start == 0:
            usual = hf_beam(model, tokenizer, batch[:1], trie, table, terminator, renormalise=False)[0]
            best = set(top_entries(scores[0].numpy(), 10, order).tolist())
            default_overlap.append(len(best & {leaf_tokens.get(t) for t in usual}) / 10)
    rate = {name: (hf_users if name == "hf" else len(prompts)) / spent for name, spent in seconds.items()}
    shape = {
        "data": Path(options.data).name,
        "items": len(order),
        "users": len(prompts),
        "hf_users": hf_users,
        "batch": options.batch_size,
        "hf_batch": hf_batch,
        "mean_prompt_tokens": float(np.mean([len(p) for p in prompts])),
        "model": options.model,
        "dtype": "float32",
        "nodes_exact": scorer.nodes_forwarded,
        "trie_nodes": trie.num_nodes,
    }

    def row(name, ours, peer, **more):
        return {
            "name": name,
            "unit": "users/s",
            "ours": ours,
            "peer": peer,
            "ratio": ours / peer,
            **more,
            "shape": shape,
            "machine": machine(),
        }

    mean_nodes = float(np.mean(expanded))
    return [
        {
            "name": "exact_equals_items_scored_one_by_one",
            "unit": "nats",
            "ours": difference,
            "floor": 1e-4,
            "ratio": difference / 1e-4,
            "items": len(checked),
            "probabilities_sum": total,
            "shape": shape,
            "machine": machine(),
        },
        row("exact_vs_hf_beam10", rate["exact"], rate["hf"]),
        row("beam10_vs_hf_beam10", rate["beam"], rate["hf"], same_lists=float(np.mean(overlap))),
        row(
            "best_first50_vs_exact",
            rate["best_first"],
            rate["exact"],
            certified=certified / len(prompts),
            nodes_opened=mean_nodes,
            node_ratio=scorer.nodes_forwarded / mean_nodes,
        ),
        {
            "name": "hf_default_beam10_recall_of_exact_top10",
            "ours": 1.0,
            "peer": float(np.mean(default_overlap)),
            "ratio": 1.0 / max(float(np.mean(default_overlap)), 1e-9),
            "shape": {**shape, "users": len(default_overlap)},
            "machine": machine(),
        },
    ]


def generated_titles(count: int) -> list[str]:
    """Titles with the sharing of real ones: common beginnings, series, years."""
    rng, found = random.Random(0), {}
    syllables = [
        "ka",
        "lo",
        "mi",
        "ren",
        "tos",
        "vel",
        "dor",
        "shan",
        "pri",
        "gul",
        "nor",
        "bex",
        "tam",
        "wen",
        "zor",
    ]
    words = sorted(
        {"".join(rng.choice(syllables) for _ in range(rng.randrange(1, 4))).capitalize() for _ in range(3000)}
    )

    def popular():
        return words[min(int(rng.paretovariate(0.7)) - 1, len(words) - 1)]

    while len(found) < count:
        title = " ".join(popular() for _ in range(rng.randrange(1, 5)))
        title = rng.choice(["The ", "A ", "", "", "Return of the ", "Tales of "]) + title
        title += rng.choice(
            [
                f" ({rng.randrange(1930, 2024)})",
                f", Vol. {rng.randrange(1, 12)}",
                ": " + " ".join(popular() for _ in range(3)),
            ]
        )
        found[title] = None
    return list(found)


def on_generated_catalogues(options) -> list[dict]:
    from transformers import LlamaConfig, LlamaForCausalLM

    from gdrt_ds.config import PromptSection
    from gdrt_ds.data.prompts import PromptEncoder
    from gdrt_ds.data.templates import PromptTemplate
    from gdrt_ds.data.trie import TokenTrie
    from gdrt_ds.inference.catalogue_scoring import CatalogueScorer
    from gdrt_ds.inference.prompt_reader import PromptReader
    from gdrt_ds.models.built_in import smollm2_folder
    from gdrt_ds.models.source import load_tokenizer
    from gdrt_ds.training.memory_use import PeakMemory

    tokenizer = load_tokenizer(smollm2_folder())
    if options.size_model:
        model = __import__("transformers").AutoModelForCausalLM.from_pretrained(
            smollm2_folder(), dtype=torch.float32
        )
    else:
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=2048,
            )
        )
    model.eval()
    encoder = PromptEncoder(
        PromptTemplate.from_config(PromptSection(template="alpaca"), "movie", tokenizer), tokenizer, 1024
    )
    titles, rows, bound = generated_titles(100_000), [], 256 << 20
    first = None
    for size in (1_000, 10_000, 100_000) if options.quick else (1_000, 3_000, 10_000, 30_000, 100_000):
        part = titles[:size]
        encoder.warm(part)
        trie = TokenTrie.build([encoder.target_ids(t) for t in part])
        scorer = CatalogueScorer(PromptReader(model, encoder.prefix_ids), trie, max_bytes=bound)
        prompts = [encoder.encode(part[i * 10 : i * 10 + 8]).input_ids.tolist() for i in range(2)]
        memory = PeakMemory(torch.device("cpu"))
        scorer.score(prompts[:1])
        spent, scores = timed(scorer.score, prompts)
        peak = memory.bytes_here()
        assert torch.allclose(scores.exp().sum(1), torch.ones(2, dtype=torch.float64), atol=1e-6)
        per_user = spent / len(prompts)
        first = first or (size, per_user)
        rows.append(
            {
                "name": f"catalogue_size_{size}",
                "unit": "s/user",
                "ours": per_user,
                "floor": first[1],
                "ratio": per_user / first[1],
                "items_ratio": size / first[0],
                "nodes_forwarded": scorer.nodes_forwarded,
                "trie_nodes": trie.num_nodes,
                "peak_extra_bytes": peak,
                "bound_bytes": bound,
                "shape": {
                    "items": size,
                    "users": 2,
                    "model": "smollm2-135m" if options.size_model else "llama 2 x 64",
                    "vocabulary": len(tokenizer),
                },
                "machine": machine(),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", default="ml-100k", help="ml-100k, or a data folder such as that of Amazon Books"
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--users", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument(
        "--size-model",
        action="store_true",
        help="catalogue_size with SmolLM2 instead of a small random model",
    )
    parser.add_argument("--only", choices=("data", "size"))
    parser.add_argument("--quick", action="store_true", help="2 users, one of them for the peer")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="CPU seconds of one thread: for machines that others use at the same time",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key.sub=value",
        help="settings of data and prompt, e.g. data.on_bad_row=skip",
    )
    parser.add_argument("--json", action="store_true", help="JSON lines only")
    options = parser.parse_intermixed_args()
    if options.cpu_time:
        global _clock
        torch.set_num_threads(1)
        _clock = time.process_time
    if options.quick:
        options.users, options.batch_size = 2, 2
    rows = []
    if options.only != "size":
        rows += on_real_data(options)
    if options.only != "data":
        rows += on_generated_catalogues(options)
    for row in rows:
        if options.json:
            print(json.dumps(row))
        else:  # a table
            other = "peer" if "peer" in row else "floor"
            extra = {
                k: (round(v, 3) if isinstance(v, float) else v)
                for k, v in row.items()
                if k not in ("name", "ours", "peer", "floor", "ratio", "shape", "machine", "unit")
            }
            print(
                f"{row['name']:42s} ours {row['ours']:10.4g}  {other} {row[other]:10.4g}  ratio "
                f"{row['ratio']:8.2f}  {row.get('unit', '')}  {extra or ''}"
            )
    if not options.json and rows:
        print(f"shape: {rows[0]['shape']}\nmachine: {machine()}")


if __name__ == "__main__":
    import sys

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
