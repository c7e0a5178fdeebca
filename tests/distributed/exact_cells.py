"""One cell of the exactness table: a real engine takes five SGD steps on a hand-made global batch; here
are its data and its run.

The data make every mistake visible: sample lengths and token counts are uneven, one group lives in a
single sample, one group is never there, and at odd steps the last rank has no tokens at all.
plain_reference.py computes the same without DeepSpeed.
"""

from __future__ import annotations

import functools
import gc
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from gdrt_ds.batches import BatchPlan
from gdrt_ds.config import ObjectiveOptions, RunConfig
from gdrt_ds.data.prompts import TokenStore
from gdrt_ds.data.row_prompts import RowEncoder
from gdrt_ds.data.supervised import Supervised
from gdrt_ds.dro import DroState
from gdrt_ds.dro.groups import apply_groups, fit_groups
from gdrt_ds.models.built_in import _word_tokenizer, make_tiny_model
from gdrt_ds.models.load import LoadedModel, load_model
from gdrt_ds.objectives import get_objective
from gdrt_ds.objectives.base import TokenTable
from gdrt_ds.runtime import Runtime
from gdrt_ds.training import checkpoint, lives
from gdrt_ds.training.deepspeed_config import fill_deepspeed_config, read_deepspeed_config
from gdrt_ds.training.model_with_loss import FusedLossModel
from gdrt_ds.training.step import StepRunner, TrainTokens
from gdrt_ds.training.zero3_units import adapted_layers_as_units
from tests.data.sft_files import text_rows
from tests.distributed.growing_cells import growing_store, tears_a_block

GLOBAL_BATCH, NUM_SAMPLES, NUM_GROUPS, PREFIX_LENGTH, STEPS, LR = 48, 60, 6, 5, 5, 0.2
RESUMED_AT = 2
TEXTS = [
    "The Matrix (1999)",
    "Toy Story (1995)",
    "Heat (1995)",
    "Alien (1979)",
    "Fargo (1996)",
    "Brazil (1985)",
]


@dataclass(frozen=True)
class Cell:
    """What one run of the table varies. `options` are overrides of the run config, e.g.

    (("dro.tau", 0.5),). With `rows` the data are rows of prompt and completion, whose groups are spans. With
    `growing` they are windows that grow (growing_cells.py says which kinds there are). A `resumed` cell
    continues from a checkpoint in an engine of its own after RESUMED_AT steps.
    """

    accumulation: int = 1
    stage: int = 3
    objective: str = "gdrt"
    estimate: str = "batch"
    base: str = "nf4"
    packing: str = "shared_prefix"
    tied: bool = False
    train_head: bool = False
    checkpointing: bool = False
    starve: bool = True
    excess: bool = False
    options: tuple = ()
    rows: bool = False
    growing: str = ""
    resumed: bool = False

    def reference_key(self) -> Cell:
        """Cells that differ in the way of computing only share one reference."""
        return Cell(
            1,
            0,
            self.objective,
            self.estimate,
            self.base,
            "none",
            self.tied,
            self.train_head,
            False,
            True,
            self.excess,
            self.options,
            self.rows,
            self.growing,
        )

    def name(self) -> str:
        names = ("tied", "train_head", "checkpointing", "excess", "rows", "resumed")
        flags = [name for name in names if getattr(self, name)]
        if self.growing:
            flags.insert(0, f"growing {self.growing}")
        return " ".join(
            [
                self.objective,
                self.estimate,
                self.base,
                self.packing,
                *flags,
                *(f"{k}={v}" for k, v in self.options),
            ]
        )


@dataclass(frozen=True)
class UnevenPlan(BatchPlan):
    """The product's plan, except that with `starve` the last rank has no sample at odd steps.

    Rank 0 takes them.
    """

    starve: bool = True

    def step(self, step: int):
        layout = super().step(step)
        if self.starve and self.world > 1 and step % 2 == 1:
            for slots in layout:
                slots[0], slots[-1] = (
                    np.sort(np.concatenate([slots[0], slots[-1]])),
                    np.zeros(0, dtype=np.int64),
                )
        return layout


@dataclass
class CellResult:
    """Per step: group losses, weights, counts, objective and loss as float64 arrays.

    Gradients of the first three steps.
    """

    group_loss: list = field(default_factory=list)
    group_weight: list = field(default_factory=list)
    group_count: list = field(default_factory=list)
    objective: list = field(default_factory=list)
    loss: list = field(default_factory=list)
    gradients: list = field(default_factory=list)
    parameters: dict = field(default_factory=dict)
    state: dict = field(default_factory=dict)


def make_stores() -> tuple[TokenStore, TokenStore]:
    """(samples with history, the same without).

    Head of 5 constant tokens, history 0-12 tokens, targets 1-6 tokens.
    """
    rng = np.random.default_rng(5)
    head = rng.integers(3, 250, PREFIX_LENGTH)
    bodies, free, targets = [], [], []
    for index in range(NUM_SAMPLES):
        history, tail, target = (
            rng.integers(3, 250, rng.integers(0, 13)),
            rng.integers(3, 250, 2),
            rng.integers(3, 250, 1 + index % 6),
        )
        bodies.append(np.concatenate([head, history, tail, target]))
        free.append(np.concatenate([head, tail, target]))
        targets.append(len(target))
    return _store(bodies, targets), _store(free, targets)


def _store(rows: list[np.ndarray], targets: list[int]) -> TokenStore:
    def sums(values):
        return np.concatenate([[0], np.cumsum(values)]).astype(np.int64)

    ids = np.concatenate(rows).astype(np.int32)
    return TokenStore(
        ids,
        sums([len(r) for r in rows]),
        np.zeros(len(ids), np.int8),
        np.array(targets, np.int32),
        sums(targets),
    )


def make_tokens(cell: Cell) -> TrainTokens:
    """Groups 0-3 by sample and place, 4 in sample 7 alone, 5 nowhere.

    Weights, reference and trie where the cell asks for them.
    """
    if cell.rows:
        return make_row_tokens(cell)
    store, history_free = make_stores()
    if cell.growing:
        store, history_free = growing_store(cell.growing, _word_tokenizer(TEXTS, 2000)), None
    owner = np.repeat(np.arange(len(store)), store.num_target)
    place = np.arange(len(owner)) - store.target_offsets[owner]
    groups = np.where(owner == 7, 4, (owner // 2 + (place > 2)) % 4).astype(np.int16)
    facts, rng = {}, np.random.default_rng(9)
    objective = get_objective(cell.objective)
    if objective.token_weights is not None:
        facts["weights"] = objective.token_weights(token_facts(len(owner), rng))
    if cell.excess:
        facts["reference"] = rng.uniform(4.0, 7.0, len(owner)).astype(np.float32)
    if objective.history_free_pass:
        facts["history_free"] = history_free
    if objective.masked_softmax:
        labels = np.concatenate(
            [
                store.input_ids[store.offsets[s + 1] - n : store.offsets[s + 1]]
                for s, n in enumerate(store.num_target)
            ]
        )
        allowed = [np.unique(np.append(rng.integers(3, 250, k % 9), label)) for k, label in enumerate(labels)]
        facts["trie_node"] = np.arange(len(owner), dtype=np.int32)
        facts["trie_offsets"] = torch.from_numpy(
            np.concatenate([[0], np.cumsum([len(a) for a in allowed])]).astype(np.int64)
        )
        facts["trie_tokens"] = torch.from_numpy(np.concatenate(allowed).astype(np.int64))
    return TrainTokens(store, groups, NUM_GROUPS, **facts)


def token_facts(num_tokens: int, rng: np.random.Generator) -> TokenTable:
    """What a catalogue would say of the target tokens: each has its own facts."""
    before = rng.integers(1, 9, num_tokens)
    return TokenTable(
        counts=np.ones(num_tokens, np.int64),
        train_count=rng.integers(0, 40, num_tokens),
        branching=rng.random(num_tokens) < 0.6,
        valid_before=before,
        valid_after=rng.integers(1, before + 1),
        options=ObjectiveOptions(),
    )


def make_row_tokens(cell: Cell) -> TrainTokens:
    """Rows of prompt and completion: groups 0-2 are the labels of spans, 3-5 are nowhere."""
    settings = {"groups": {"by": "label", "num": NUM_GROUPS}}
    config = RunConfig.model_validate(settings)
    encoder = RowEncoder(config.prompt, _word_tokenizer(TEXTS, 2000))
    data = Supervised.of(text_rows(NUM_SAMPLES), encoder, config)
    assert data.prefix_length >= PREFIX_LENGTH
    plan = fit_groups(config.groups, data, None, 0)
    groups = apply_groups(plan, config.groups, data, None, "train")
    history_free = data.without_evidence() if get_objective(cell.objective).history_free_pass else None
    return TrainTokens(data.stores["train"], groups, NUM_GROUPS, history_free=history_free)


def make_config(cell: Cell, folder: Path, world: int) -> RunConfig:
    path = tiny_model(folder, cell.tied)
    config = RunConfig.model_validate(
        {
            "objective": cell.objective,
            "dro": {"estimate": cell.estimate, "tau": 0.2, "excess": cell.excess},
            "model": {
                "path": str(path),
                "quantization": cell.base,
                "dtype": "float32",
                "train_head": cell.train_head,
                "gradient_checkpointing": cell.checkpointing,
                "lora": {"r": 4, "dropout": 0.0, "targets": ["q_proj", "v_proj", "down_proj"]},
            },
            "train": {
                "global_batch": GLOBAL_BATCH,
                "micro_batch": GLOBAL_BATCH // (world * cell.accumulation),
                "packing": cell.packing,
                "optimizer": "sgd",
                "lr": LR,
                "grad_clip": 0.0,
            },
        }
    )
    for key, value in cell.options:
        *sections, leaf = key.split(".")
        setattr(functools.reduce(getattr, sections, config), leaf, value)
    return config


def tiny_model(folder: Path, tied: bool) -> Path:
    return make_tiny_model(
        Path(folder) / ("tied" if tied else "untied"),
        TEXTS,
        0,
        hidden=32,
        num_heads=2,
        num_key_value_heads=1,
        intermediate=64,
        tie_embeddings=tied,
    )


def set_adapter(loaded: LoadedModel) -> None:
    """LoRA's B starts at zero, which would leave every gradient of A zero and unchecked.

    Seeded values instead.
    """
    generator = torch.Generator().manual_seed(11)
    for name, parameter in sorted(loaded.model.named_parameters()):
        if "lora_B" in name:
            assert parameter.numel() == getattr(parameter, "ds_numel", parameter.numel())
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))


def deepspeed_settings(cell: Cell, config: RunConfig, plan: BatchPlan) -> dict:
    raw = (
        {"zero_optimization": {"stage": 0}}
        if cell.stage == 0
        else read_deepspeed_config(f"ds_configs/zero{cell.stage}.json")
    )
    if cell.stage == 3:
        raw["zero_optimization"]["stage3_param_persistence_threshold"] = (
            40  # the norms stay whole, everything else is sharded
        )
    return fill_deepspeed_config(raw, config, plan, torch.float32, 32)


def start_runner(
    cell: Cell,
    rank: int,
    world: int,
    folder: Path,
    config: RunConfig | None = None,
    optimizer=torch.optim.SGD,
) -> StepRunner:
    """Model, engine and runner, as the trainer builds them. `runner.engine.destroy()` when done."""
    import deepspeed

    config = config or make_config(cell, folder, world)
    tokens = make_tokens(cell)
    plan = UnevenPlan(
        None if cell.packing == "prefix_tree" else tokens.store.lengths,
        GLOBAL_BATCH,
        int(config.train.micro_batch),
        world,
        0,
        packed=cell.packing != "none",
        store=tokens.store if cell.packing == "prefix_tree" else None,
        trees=cell.packing == "prefix_tree",
        starve=cell.starve,
    )
    settings = deepspeed_settings(cell, config, plan)
    runtime = Runtime(rank=rank, local_rank=rank, world=world, local_world=world)
    attention = "gdrt_tree" if cell.packing != "none" else None
    loaded = load_model(
        config.model,
        runtime,
        train=True,
        path=Path(config.model.path),
        seed=0,
        attention=attention,
        deepspeed_config=settings,
    )
    set_adapter(loaded)
    module = FusedLossModel(loaded.model)
    trainable = [p for p in module.parameters() if p.requires_grad]
    with adapted_layers_as_units(loaded.model, cell.stage):
        engine, *_ = deepspeed.initialize(
            model=module,
            model_parameters=trainable,
            optimizer=optimizer(trainable, lr=LR),
            config=settings,
            dist_init_required=False,
        )
    engine.train()
    return StepRunner(
        engine,
        plan,
        tokens,
        get_objective(cell.objective),
        config,
        DroState(NUM_GROUPS),
        runtime,
        packing=cell.packing,
        prefix_length=PREFIX_LENGTH,
        pad_id=2,
    )


def full_gradients(engine) -> dict[str, np.ndarray]:
    from deepspeed.utils import safe_get_full_grad

    gradients = {n: safe_get_full_grad(p) for n, p in engine.module.named_parameters() if p.requires_grad}
    return {n.removeprefix("model."): g.detach().double().numpy().copy() for n, g in gradients.items()}


def full_parameters(engine) -> dict[str, np.ndarray]:
    import deepspeed

    values = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                values[name.removeprefix("model.")] = parameter.detach().double().numpy().copy()
    return values


def resumed_runner(cell: Cell, runner: StepRunner, rank: int, world: int, folder: Path) -> StepRunner:
    """Saves, ends the engine, and goes on in a fresh one, whose adapter and weights are the first ones again.

    The checkpoint must bring everything: parameters, and what group-DRO remembers.
    """
    assert tears_a_block(runner.tokens.store, RESUMED_AT * GLOBAL_BATCH), "resumed in the middle of a block"
    run = Path(folder) / f"resumed_{cell.growing}_{world}_{cell.accumulation}_{cell.stage}"
    if rank == 0:
        lives.begin_life(run)
    torch.distributed.barrier()
    state = {"dro": runner.state.state_dict()}
    about = dict(life=1, fingerprint="exactness", deepspeed_files=False)
    path = checkpoint.save(runner.engine, run, RESUMED_AT, state, **about)
    runner.engine.destroy()
    fresh = start_runner(cell, rank, world, folder)
    restored = checkpoint.load(fresh.engine, path, fingerprint="exactness")
    fresh.state.load_state_dict(restored.client_state["dro"])
    return fresh


def run_cell(cell: Cell, rank: int, world: int, folder: Path, steps: int = STEPS) -> CellResult:
    runner, result = start_runner(cell, rank, world, folder), CellResult()

    def read_gradients_before_the_step(engine) -> None:
        take_step = engine.step

        def step_after_reading(*args, **kwargs):
            if len(result.gradients) < 3:
                result.gradients.append(full_gradients(engine))
            return take_step(*args, **kwargs)

        engine.step = step_after_reading

    read_gradients_before_the_step(runner.engine)
    for step in range(steps):
        if cell.resumed and step == RESUMED_AT:
            runner = resumed_runner(cell, runner, rank, world, folder)
            read_gradients_before_the_step(runner.engine)
        out = runner.run(step, LR)
        for name in ("group_loss", "group_weight", "group_count", "objective", "loss"):
            getattr(result, name).append(getattr(out, name).detach().double().numpy().copy())
    result.parameters = full_parameters(runner.engine)
    result.state = {k: v.numpy().copy() for k, v in runner.state.state_dict().items()}
    runner.engine.destroy()
    runner = None  # frees the engine before the next cell
    gc.collect()
    if (
        rank != 0
    ):  # only rank 0's tensors travel back; the others' steps are compared through q and the parameters
        result.gradients = []
    return result
