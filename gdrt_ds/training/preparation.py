"""From settings to tokens: corpus, catalogue, prompt template, tokenised splits; no weight is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from gdrt_ds.batches import BatchPlan
from gdrt_ds.batches.prefix_tree import in_order, shared_lengths
from gdrt_ds.config import RunConfig
from gdrt_ds.data.catalogue import Catalogue
from gdrt_ds.data.corpus import Corpus, Sample, load_corpus
from gdrt_ds.data.growing import GrowingStore, stitch
from gdrt_ds.data.prompts import PromptEncoder, TokenStore, tokenise_split
from gdrt_ds.data.templates import PromptTemplate, template_texts
from gdrt_ds.data.trie import TokenTrie
from gdrt_ds.errors import UserError
from gdrt_ds.models.built_in import TINY_NAME
from gdrt_ds.models.source import load_tokenizer, read_model_config, resolve_model, tokenizer_source


@dataclass
class Prepared:
    """Everything before the weights. `stores` hold train and, where the split is not empty, valid."""

    corpus: Corpus
    catalogue: Catalogue
    template: PromptTemplate
    encoder: PromptEncoder
    tokenizer: object
    model_folder: Path
    model_config: object
    stores: dict[str, TokenStore]
    notes: list[str] = field(default_factory=list)

    def trie(self) -> TokenTrie:
        texts = [entry.text for entry in self.catalogue.entries]
        return TokenTrie.build([self.encoder.target_ids(text) for text in texts], texts)


def control_history(samples: list[Sample], mode: str, seed: int) -> list[Sample]:
    """Applies a training control: mask leaves the history out, shuffle takes that of another sample."""
    if mode == "keep":
        return samples
    if mode == "mask":
        return [replace(s, history=()) for s in samples]
    order = np.random.Generator(np.random.PCG64([seed, 4242])).permutation(len(samples))
    return [replace(s, history=samples[other].history) for s, other in zip(samples, order)]


def prepare(config: RunConfig) -> Prepared:
    """Loads and tokenises. Every rank calls it and gets the same.

    Raises:
        UserError: anything about data, prompt or tokenizer.
    """
    corpus = load_corpus(config.data)
    catalogue = Catalogue.build(corpus)
    texts = [entry.text for entry in catalogue.entries]
    model = config.model
    folder = resolve_model(
        model.path,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        tiny_folder=Path(config.run.dir) / "base",
        texts=_tiny_texts(config, corpus, texts),
        seed=config.train.seed,
        tiny=model.tiny,
    )
    tokenizer = load_tokenizer(tokenizer_source(model, folder), trust_remote_code=model.trust_remote_code)
    model_config = read_model_config(folder, trust_remote_code=model.trust_remote_code)
    limit = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and config.prompt.max_length > limit:
        raise UserError(
            f"prompt.max_length = {config.prompt.max_length} is more than the {limit} positions of "
            f"{folder.name}",
            f"set prompt.max_length to at most {limit}",
        )
    template = PromptTemplate.from_config(config.prompt, corpus.domain, tokenizer)
    encoder = PromptEncoder(template, tokenizer, config.prompt.max_length)
    stores, notes = {}, [*corpus.notes, *catalogue.notes()]
    for split in ("train", "valid"):
        if split == "valid" and not corpus.splits.get("valid"):
            notes.append("no validation split: no early stopping, the last checkpoint is the best")
            continue
        samples = corpus.split(split)
        if split == "train":
            samples = control_history(samples, config.prompt.history, config.train.seed)
        stores[split], lines = tokenise_split(
            encoder, catalogue, samples, mask_history=split == "train" and config.prompt.history == "mask"
        )
        notes += [f"{split}: {line}" for line in lines]
        if split == "train" and config.data.windows == "growing":
            stores[split], line = _growing(config, stores[split], encoder, catalogue, samples)
            notes.append(line)
    return Prepared(corpus, catalogue, template, encoder, tokenizer, folder, model_config, stores, notes)


def _growing(
    config: RunConfig,
    store: TokenStore,
    encoder: PromptEncoder,
    catalogue: Catalogue,
    samples: list[Sample],
) -> tuple[GrowingStore, str]:
    """The train split with windows that grow, and the line to announce."""
    data = config.data
    block = block_samples(config)
    windows = stitch(samples, block, data.min_history, config.train.seed)
    line = (
        f"train: windows grow: {len(samples):,} targets in {len(windows.runs):,} runs, blocks of {block} "
        f"targets, histories of {data.min_history} to {data.min_history + block - 1} items"
    )
    return GrowingStore.of(store, windows, encoder, catalogue, samples), line


def block_samples(config: RunConfig) -> int:
    """Targets of a block: `train.block_samples`, or as many as `data.history_length` has room for."""
    most = config.data.history_length - config.data.min_history + 1
    return config.train.block_samples or most


def target_counts(prepared: Prepared) -> np.ndarray:
    """int64[entries]: train samples whose target the entry is."""
    catalogue = prepared.catalogue
    targets = [catalogue.index_of[sample.target] for sample in prepared.corpus.split("train")]
    return np.bincount(targets, minlength=len(catalogue.entries))


def _tiny_texts(config: RunConfig, corpus: Corpus, titles: list[str]) -> list[str] | None:
    if config.model.path != TINY_NAME:
        return None
    return [*template_texts(config.prompt, corpus.domain), *titles]


def micro_batch_size(config: RunConfig, world: int) -> int:
    """Returns the samples of a rank's forward; `auto` is the whole share of a rank, at most 8."""
    if config.train.micro_batch == "auto":
        return min(8, -(-config.train.global_batch // world))
    return int(config.train.micro_batch)


def plan_batches(config: RunConfig, store: TokenStore, world: int) -> BatchPlan:
    """Decides who computes what in every step.

    Raises:
        UserError: the global batch is smaller than the ranks, or the micro-batch does not fit it.
    """
    micro = micro_batch_size(config, world)
    if (
        micro * world > config.train.global_batch
        and config.train.micro_batch != "auto"
        and micro > -(-config.train.global_batch // world)
    ):
        raise UserError(
            f"train.micro_batch = {micro} x {world} ranks = {micro * world} is more than train.global_batch "
            f"= {config.train.global_batch}",
            f"set train.micro_batch to at most {-(-config.train.global_batch // world)}, or auto",
        )
    trees = config.train.packing == "prefix_tree" or (
        config.train.packing == "auto" and config.data.windows == "growing"
    )
    return BatchPlan(
        store.lengths,
        config.train.global_batch,
        micro,
        world,
        config.train.seed,
        packed=config.train.packing != "none",
        store=store if trees or config.data.windows == "growing" else None,
        trees=trees,
    )


def total_steps(config: RunConfig, store: TokenStore) -> int:
    if config.train.max_steps is not None:
        return config.train.max_steps
    return max(1, int(np.ceil(config.train.epochs * len(store) / config.train.global_batch)))


def padding_figures(store: TokenStore, plan: BatchPlan, head: int, steps: int = 8) -> dict[str, float]:
    """Returns the tokens computed per optimizer step in each packing, averaged over the first steps.

    Args:
        head: tokens that all prompts begin with.
    """
    tokens = {"padded": 0, "packed": 0, "shared_prefix": 0, "prefix_tree": 0}
    for step in range(steps):
        for members in (members for slots in plan.step(step) for members in slots if len(members)):
            rows = [store.row(sample)[:-1] for sample in members]
            lengths = [len(row) for row in rows]
            shared = shared_lengths([rows[index] for index in in_order(rows)])
            tokens["padded"] += max(lengths) * len(rows)
            tokens["packed"] += sum(lengths)
            tokens["shared_prefix"] += sum(lengths) - head * (len(rows) - 1)
            tokens["prefix_tree"] += sum(lengths) - int(shared.sum())
    return {name: count / steps for name, count in tokens.items()}
