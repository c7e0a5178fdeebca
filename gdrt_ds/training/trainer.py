"""The life of a run: data, model, relevance and groups, steps, validation, checkpoints, adapter, summary.

Stages are methods in the order in which data flows (README); one optimizer step is in step.py, how weights are computed in dro.py and
objectives/, what is written in telemetry.py, checkpoint.py and run_folder.py.
"""

from __future__ import annotations

import contextlib
import math
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.numpy import save_file

from gdrt_ds import dro
from gdrt_ds.batches import BatchPlan, MicroBatch, build_micro_batch
from gdrt_ds.batches.packing import choose_packing
from gdrt_ds.batches.tree_attention import ATTENTION_NAME
from gdrt_ds.config import RunConfig
from gdrt_ds.data.prompts import tokenise_split
from gdrt_ds.dro import relevance
from gdrt_ds.dro.groups import GroupPlan, apply_groups, fit_groups, token_relevance
from gdrt_ds.errors import UserError
from gdrt_ds.files import cache_folder
from gdrt_ds.models.load import compute_dtype, load_model
from gdrt_ds.models.reference_adapters import (
    AUXILIARY,
    EXCESS,
    load_reference_adapters,
    reference,
    reference_adapters,
)
from gdrt_ds.objectives import get_objective
from gdrt_ds.runtime import EXIT_INTERRUPTED, Runtime, Watchdog, ignore_stop_signals
from gdrt_ds.training import checkpoint, run_folder
from gdrt_ds.training.deepspeed_config import (
    fill_deepspeed_config,
    learning_rate,
    read_deepspeed_config,
    zero_stage,
)
from gdrt_ds.training.memory_use import PeakMemory, format_bytes
from gdrt_ds.training.model_with_loss import FusedLossModel
from gdrt_ds.training.preparation import plan_batches, prepare, total_steps
from gdrt_ds.training.step import NonFiniteLoss, StepRunner, TrainTokens, group_sums
from gdrt_ds.training.step_inputs import add_trie_facts, frozen_weights
from gdrt_ds.training.telemetry import Telemetry, duration, say


class Trainer:
    """One run on one process group. `run()` does everything; `prepare_only()` stops after the relevance pass."""

    def __init__(self, config: RunConfig, runtime: Runtime):
        self.config, self.runtime = config, runtime
        self.started = time.time()
        self.objective = get_objective(config.objective)
        self.folder: Path | None = None  # once it is claimed
        self.watchdog: Watchdog | None = None
        self.telemetry: Telemetry | None = None

    # -- stages ----------------------------------------------------------------------------------------------------------
    def run(self) -> int:
        """Trains to the end or to an interruption; returns the exit status."""
        if self.config.resume is not None and run_folder.status(Path(self.config.run.dir)) == "completed":
            say(self.runtime, f"{self.config.run.dir} is a finished run: nothing to do")
            return 0
        try:
            self.setup()
            with Watchdog(self.runtime, self.folder / "logs", self.config.train.timeout_s) as self.watchdog:
                return self._train()
        except Exception as error:
            if self.folder is not None:
                self._failed(error)
            raise

    def prepare_only(self) -> None:
        """Tokenises and fills the relevance cache, so that a short job can do it before a long one starts."""
        self.setup()
        say(self.runtime, f"prepared: {self.cache_folder}")

    def setup(self) -> None:
        self._claim()
        self._seed()
        self.prepared = prepare(self.config)
        self._stop_if_asked()
        self._write_contract()
        self._load_model()
        self._stop_if_asked()
        with Watchdog(
            self.runtime, self.folder / "logs", max(self.config.train.timeout_s, 600)
        ) as self.watchdog:
            self._resume_engine()
            self._make_groups()

    def _seed(self) -> None:
        """All global generators, for code that draws from them (an objective of one's own); ours draws from generators of its own."""
        seed = self.config.train.seed
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)

    def _claim(self) -> None:
        problem = [None, None, 0]
        if self.runtime.is_main:
            try:
                problem[0] = str(run_folder.claim(self.config))
                problem[2] = checkpoint.begin_life(self.config.run.dir)
            except UserError as error:
                problem[1] = (error.problem, error.fix)
        if dist.is_initialized() and self.runtime.world > 1:
            dist.broadcast_object_list(problem, src=0)
        if problem[1] is not None:
            raise UserError(*problem[1])
        self.folder, self.life = Path(problem[0]), problem[2]
        (self.folder / "logs").mkdir(exist_ok=True)

    def _write_contract(self) -> None:
        """What evaluation must use, written before training so that a broken run can be looked at too."""
        for line in self.prepared.notes:
            say(self.runtime, f"data: {line}")
        if self.runtime.is_main:
            self.prepared.catalogue.save(self.folder / "catalogue.jsonl")
            self.prepared.template.save(self.folder / "prompt.json")

    def _load_model(self) -> None:
        config, prepared, self.memory = self.config, self.prepared, PeakMemory(self.runtime.device)
        import deepspeed

        self.packing, line = choose_packing(config, prepared.model_config)
        self.dtype = compute_dtype(config.model.dtype, self.runtime.device)
        store = prepared.stores["train"]
        self.plan = plan_batches(config, store, self.runtime.world)
        self.total = total_steps(config, store)
        raw = read_deepspeed_config(config.deepspeed)
        hidden = prepared.model_config.get_text_config().hidden_size
        self.deepspeed_config = fill_deepspeed_config(raw, config, self.plan, self.dtype, hidden)
        attention = ATTENTION_NAME if self.packing != "none" else None
        self.loaded = load_model(
            config.model,
            self.runtime,
            train=True,
            path=prepared.model_folder,
            seed=config.train.seed,
            attention=attention,
            deepspeed_config=self.deepspeed_config,
        )
        for text in [
            f"launcher: {self.runtime.launcher}, {self.runtime.world} rank(s) on {self.runtime.device.type}, "
            f"{self.runtime.threads} CPU thread(s) each",
            *self.loaded.lines,
            line,
            f"engine: DeepSpeed ZeRO stage {zero_stage(self.deepspeed_config)}; {self.plan.describe()}",
        ]:
            say(self.runtime, text)
        for text in load_reference_adapters(self.loaded.model, config, self.loaded.fingerprint):
            say(self.runtime, text)
        module = FusedLossModel(self.loaded.model)
        trainable = [p for p in module.parameters() if p.requires_grad]
        settings = {"model": module, "config": self.deepspeed_config}
        if "optimizer" not in self.deepspeed_config:
            settings["optimizer"] = self._client_optimizer(trainable)
        self.engine, *_ = deepspeed.initialize(
            model_parameters=trainable, dist_init_required=False, **settings
        )
        self.engine.train()

    def _client_optimizer(self, parameters):
        train = self.config.train
        offload = (
            (self.deepspeed_config.get("zero_optimization") or {})
            .get("offload_optimizer", {})
            .get("device", "none")
        )
        if train.optimizer == "sgd":
            return torch.optim.SGD(parameters, lr=train.lr, weight_decay=train.weight_decay)
        if offload != "none":
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            return DeepSpeedCPUAdam(
                parameters, lr=train.lr, betas=train.betas, weight_decay=train.weight_decay, adamw_mode=True
            )
        return torch.optim.AdamW(
            parameters,
            lr=train.lr,
            betas=train.betas,
            weight_decay=train.weight_decay,
            fused=self.runtime.device.type == "cuda",
        )

    def _resume_engine(self) -> None:
        """Engine, DRO state and best figure from the newest valid checkpoint, if `resume` asks for one."""
        self.first_step, self.best, self.bad_validations, self.saved_groups = 0, None, 0, None
        self.state_to_load = None
        notes: list[str] = []
        path = checkpoint.resolve_resume(self.folder, self.config.resume, notes)
        for note in notes:
            say(self.runtime, f"resume: {note}")
        if path is None:
            if self.config.resume is not None:
                say(self.runtime, "resume: no checkpoint yet, starting at step 0")
            return
        restored = checkpoint.load(self.engine, path, fingerprint=self.loaded.fingerprint)
        client = restored.client_state
        if client["data_fingerprint"] != self.prepared.stores["train"].fingerprint:
            raise UserError(
                f"{path}: the training data or the prompt changed since this checkpoint",
                "restore data.* and prompt.*, or start a new run.dir",
            )
        self.first_step, self.best, self.bad_validations = (
            client["step"],
            client["best"],
            client["bad_validations"],
        )
        self.state_to_load, self.saved_groups = client["dro"], client
        where = (
            ""
            if restored.same_world
            else f" (saved on {restored.world} ranks, now {self.runtime.world}: equal up to rounding and dropout masks)"
        )
        say(self.runtime, f"resume: step {self.first_step} from {path}{where}")

    # -- relevance and groups -----------------------------------------------------------------------------------------------
    def token_losses(self, micro: MicroBatch) -> torch.Tensor:
        """No-grad plain losses [N] under the current adapter state."""
        with torch.no_grad():
            groups = torch.zeros(len(micro.token_index), dtype=torch.long, device=self.runtime.device)
            return self.engine(micro, groups, 1)[1]

    def _reference_losses(self, micro: MicroBatch) -> torch.Tensor:
        """The same under `groups.reference`."""
        kind = self.config.groups.reference
        if kind == "live":
            return self.token_losses(micro)
        with reference(self.loaded.model, AUXILIARY if kind == "auxiliary_sft" else None):
            return self.token_losses(micro)

    def score_relevance(self) -> np.ndarray:
        """float32[target tokens of the catalogue]: r under the reference, from the cache if nothing it depends on changed."""
        entries = [entry.text for entry in self.prepared.catalogue.entries]
        self.entry_store = relevance.entry_store(self.prepared.encoder, entries)
        section = self.config.groups
        adapter = ""
        if section.reference == "auxiliary_sft":
            adapter = checkpoint._sha256(
                reference_adapters(self.config)[AUXILIARY] / "adapter_model.safetensors"
            )
        key = relevance.fingerprint(
            self.loaded.fingerprint,
            self.prepared.template.fingerprint,
            relevance.store_digest(self.entry_store),
            section.reference,
            adapter,
        )
        num_tokens = int(self.entry_store.target_offsets[-1])
        if section.reference == "corpus":
            self.relevance_key = relevance.fingerprint(key, self.prepared.stores["train"].fingerprint)
            say(
                self.runtime,
                f"relevance: {num_tokens:,} target tokens of {len(entries):,} titles from train frequencies",
            )
            return relevance.corpus_scores(self.entry_store, self._target_counts())
        cached = (
            relevance.load_cached(self.cache_folder, key, num_tokens) if section.reference != "live" else None
        )
        found = torch.tensor([float(cached is not None)])
        if self.runtime.world > 1:
            dist.all_reduce(found := found.to(self.runtime.device), op=dist.ReduceOp.MIN)
        self.relevance_key = key
        if found.item() > 0:
            say(
                self.runtime,
                f"relevance: {num_tokens:,} target tokens of {len(entries):,} titles from the cache ({key[:12]})",
            )
            return cached
        started = time.time()
        self.engine.eval()

        def progress(done: int, total: int) -> None:
            self.watchdog.beat()
            self._stop_if_asked()
            if done == total or done % max(1, total // 4) == 0:
                say(self.runtime, f"relevance: {done}/{total} micro-batches")

        table = relevance.score_entries(
            self.entry_store,
            self._reference_losses,
            self.runtime,
            packing=self.packing,
            pad_id=self.prepared.tokenizer.pad_token_id,
            progress=progress,
        )
        self.engine.train()
        if self.runtime.is_main and section.reference != "live":
            relevance.save_cached(self.cache_folder, key, table)
        say(
            self.runtime,
            f"relevance: {num_tokens:,} target tokens of {len(entries):,} titles under `{section.reference}` in {duration(time.time() - started)}",
        )
        return table

    def _target_counts(self) -> np.ndarray:
        """int64[entries]: train samples whose target the entry is."""
        catalogue = self.prepared.catalogue
        return np.bincount(
            [catalogue.index_of[s.target] for s in self.prepared.corpus.split("train")],
            minlength=len(catalogue.entries),
        )

    def _stop_if_asked(self) -> None:
        """Before training there is nothing to save: a stop request on any rank ends all of them here, with status 75. Every rank calls it.

        Not while training refreshes its groups: there the next step boundary saves.
        """
        if self.telemetry is not None:
            return
        asked = torch.tensor([float(self.runtime.stop_signal is not None)], device=self.runtime.device)
        if self.runtime.world > 1:
            dist.all_reduce(asked)
        if asked.item() > 0:
            if self.runtime.is_main:
                run_folder.write_summary(
                    self.folder, "interrupted", step=getattr(self, "first_step", 0), life=self.life
                )
            say(self.runtime, "interrupted by a signal before training; go on with resume=auto")
            self.runtime.barrier()
            ignore_stop_signals()
            raise SystemExit(EXIT_INTERRUPTED)

    @property
    def cache_folder(self) -> Path:
        """Shared by all runs of this user ($GDRT_CACHE, default ~/.cache/gdrt_ds): the fingerprint tells tables apart."""
        return cache_folder() / "relevance"

    def _make_groups(self) -> None:
        config, prepared = self.config, self.prepared
        store = prepared.stores["train"]
        self.table = self.score_relevance() if config.groups.by in ("relevance", "random") else None
        self.group_arrays: dict[str, np.ndarray] = {}
        if self.saved_groups is not None and config.groups.reference == "live":
            self.group_plan = GroupPlan(**self.saved_groups["group_plan"])
            self.table = (
                self.saved_groups["live_table"].numpy()
                if self.saved_groups.get("live_table") is not None
                else self.table
            )
        else:
            self.group_plan = fit_groups(
                config.groups,
                prepared.corpus,
                prepared.catalogue,
                store,
                self._relevance_of("train"),
                config.train.seed,
                getattr(self, "relevance_key", ""),
            )
        self._apply_groups()
        say(
            self.runtime,
            f"groups: {self.group_plan.num} by {config.groups.by}, train tokens "
            + " ".join(f"{c:,}" for c in self.group_plan.counts),
        )
        if self.runtime.is_main:
            self._save_groups()
        self.runner = self._make_runner()

    def _relevance_of(self, split: str) -> np.ndarray | None:
        if self.table is None:
            return None
        prepared = self.prepared
        return token_relevance(
            self.table,
            self.entry_store.target_offsets,
            prepared.catalogue,
            prepared.corpus.splits[split],
            prepared.stores[split],
        )

    def _apply_groups(self) -> None:
        prepared = self.prepared
        for split, store in prepared.stores.items():
            self.group_arrays[split] = apply_groups(
                self.group_plan,
                self.config.groups,
                prepared.corpus,
                prepared.catalogue,
                prepared.corpus.splits[split],
                store,
                self._relevance_of(split),
                split,
            )

    def _save_groups(self) -> None:
        self.group_plan.save(self.folder / "groups.json")
        store, values = self.prepared.stores["train"], self._relevance_of("train")
        tensors = {
            "sample_offsets": store.offsets,
            "token_offsets": store.target_offsets,
            "group": self.group_arrays["train"],
        }
        if values is not None:
            tensors["r"] = values
        if self.table is not None:
            tensors |= {"entry_offsets": self.entry_store.target_offsets, "entry_r": self.table}
        save_file(
            {k: np.ascontiguousarray(v) for k, v in tensors.items()},
            self.folder / "groups.safetensors",
            metadata={"fingerprint": self.group_plan.fingerprint},
        )

    # -- the step's inputs ----------------------------------------------------------------------------------------------------
    def _make_runner(self) -> StepRunner:
        config, prepared, store = self.config, self.prepared, self.prepared.stores["train"]
        tokens = TrainTokens(store, self.group_arrays["train"], self.group_plan.num)
        if self.objective.masked_softmax or self.objective.token_weights is not None:
            add_trie_facts(tokens, prepared, self.objective, config.options)
        if self.objective.history_free_pass:
            tokens.history_free, _ = tokenise_split(
                prepared.encoder, prepared.catalogue, prepared.corpus.split("train"), mask_history=True
            )
        if config.dro.excess:
            tokens.reference = self._losses_to_exceed()
        state = dro.DroState(self.group_plan.num).to(self.runtime.device)
        if self.state_to_load is not None:
            state.load_state_dict(self.state_to_load)
        self.state = state
        head = len(prepared.encoder.head_ids)
        return StepRunner(
            self.engine,
            self.plan,
            tokens,
            self.objective,
            config,
            state,
            self.runtime,
            packing=self.packing,
            head_length=head,
            pad_id=prepared.tokenizer.pad_token_id,
            frozen_q=frozen_weights(config.dro.frozen_weights, self.group_plan.num, self.runtime.device),
        )

    def _losses_to_exceed(self) -> np.ndarray:
        """float64[train target tokens]: the reference's losses with the history (dro.excess); NaN in samples that no step will use."""
        store = self.prepared.stores["train"]
        epoch = -(-len(store) // self.config.train.global_batch)
        used = np.unique(
            np.concatenate(
                [
                    self.plan.samples(k)
                    for k in range(self.first_step, min(self.total, self.first_step + epoch + 1))
                ]
                or [[]]
            )
        )
        self.engine.eval()
        with reference(self.loaded.model, EXCESS if isinstance(self.config.dro.excess, str) else None):
            losses = self._score_split(
                "train", f"excess losses: {len(used):,} samples under the reference", used.astype(np.int64)
            )
        self.engine.train()
        unused = np.setdiff1d(np.arange(len(store)), used)
        losses[np.isin(np.repeat(np.arange(len(store)), store.num_target), unused)] = np.nan
        return losses

    def _score_split(
        self, split: str, what: str | None = None, samples: np.ndarray | None = None
    ) -> np.ndarray:
        """float64[target tokens] plain losses of a split (of some samples: zero elsewhere), from all ranks, the same on every rank. No grad."""
        store = self.prepared.stores[split]
        plan = BatchPlan(
            store.lengths,
            self.config.train.global_batch,
            self.plan.micro_batch * 2,
            self.runtime.world,
            0,
            self.packing != "none",
        )
        rounds = plan.split(np.arange(len(store)) if samples is None else samples)
        losses = torch.zeros(int(store.target_offsets[-1]), dtype=torch.float64)
        for index, slots in enumerate(rounds):
            micro = build_micro_batch(
                store,
                slots[self.runtime.rank],
                self.packing,
                len(self.prepared.encoder.head_ids),
                self.prepared.tokenizer.pad_token_id,
                self.runtime.device,
            )
            losses[micro.token_index] = self.token_losses(micro).double().cpu()
            self.watchdog.beat()
            if what and (index + 1) % max(1, len(rounds) // 4) == 0:
                say(self.runtime, f"{what}: {index + 1}/{len(rounds)} micro-batches")
        if self.runtime.world > 1:
            losses = losses.to(self.runtime.device)
            dist.all_reduce(losses)
        return losses.cpu().numpy()

    # -- training -------------------------------------------------------------------------------------------------------------
    def _train(self) -> int:
        config, store = self.config, self.prepared.stores["train"]
        eval_every = config.train.eval_every or max(1, -(-len(store) // config.train.global_batch))
        if self.runtime.is_main:
            run_folder.settle(self.folder)
        self.telemetry = Telemetry(self.folder, config, self.runtime, self.total, self.first_step)
        self.tokens_seen, stopped_early, step = 0, False, self.first_step
        for step in range(self.first_step, self.total):
            self.watchdog.beat()
            if (
                config.groups.reference == "live"
                and config.groups.by == "relevance"
                and step
                and step % config.groups.refresh_every == 0
            ):
                self._refresh_groups()
            lr = learning_rate(step, config, self.total)
            result = self.runner.run(step, lr)
            self.tokens_seen += result.tokens
            norm = self.engine.get_global_grad_norm() if not result.skipped else None
            self.telemetry.step(
                {
                    "step": step + 1,
                    "loss": result.loss,
                    "lr": lr,
                    "grad_norm": norm,
                    "tokens": result.tokens * self.runtime.world,
                    "group_loss": result.group_loss,
                    "group_weight": result.group_weight,
                    "group_count": result.group_count,
                    "objective": result.objective,
                    "skipped": result.skipped,
                }
            )
            done = step + 1
            is_best = False
            if "valid" in self.prepared.stores and (done % eval_every == 0 or done == self.total):
                is_best = self._validate(done)
                stopped_early = (
                    config.train.patience is not None and self.bad_validations >= config.train.patience
                )
            finished = done == self.total or stopped_early
            due = config.train.save_every is not None and done % config.train.save_every == 0
            if is_best and config.train.eval_every is not None or due or finished or result.stop:
                self._refuse_broken_weights(done, norm)
                self._save(done, is_best)
            if result.stop and not finished:
                return self._interrupted(done)
            if stopped_early:
                self.telemetry.note(
                    f"early stop at step {done}: no better validation {config.train.select_by} in {config.train.patience} validations"
                )
                break
        return self._finish(step + 1, stopped_early)

    def _refuse_broken_weights(self, step: int, norm) -> None:
        """A finite loss can have a gradient that is not: the next step would see it in its loss, but nothing may be published before that."""
        if norm is not None and not math.isfinite(float(norm)):
            raise NonFiniteLoss(
                f"step {step}: the gradient norm is {float(norm)} though the loss is finite; this step is not published",
                "resume=auto goes on from the last checkpoint; lower train.lr, or check model.dtype (float16 overflows)",
            )

    def _refresh_groups(self) -> None:
        self.telemetry.flush()
        self.table = self.score_relevance()
        self.group_plan = fit_groups(
            self.config.groups,
            self.prepared.corpus,
            self.prepared.catalogue,
            self.prepared.stores["train"],
            self._relevance_of("train"),
            self.config.train.seed,
            self.relevance_key,
        )
        self._apply_groups()
        self.runner.tokens.groups = self.group_arrays["train"]
        if self.runtime.is_main:
            self._save_groups()

    def _validate(self, step: int) -> bool:
        """Plain losses of the validation split by group; True when `train.select_by` improved."""
        self.engine.eval()
        losses = torch.from_numpy(self._score_split("valid"))
        self.engine.train()
        groups = torch.from_numpy(self.group_arrays["valid"].astype(np.int64))
        counts = torch.bincount(groups, minlength=self.group_plan.num).double()
        mean = group_sums(losses, groups, self.group_plan.num) / counts.clamp_min(1)
        mean[counts == 0] = float("nan")
        figures = {
            "nll": losses.mean().item(),
            "worst_group": mean[counts > 0].max().item(),
            "objective": dro.closed_form_weights(
                mean.nan_to_num(), dro.prior(counts, self.config.dro.prior), self.config.dro.tau
            )[1].item(),
        }
        value = figures[self.config.train.select_by]
        better = self.best is None or value < self.best["value"]
        if better:
            self.best, self.bad_validations = {"step": step, "value": value, **figures}, 0
        else:
            self.bad_validations += 1
        self.telemetry.validation({"step": step, **figures, "group_loss": mean})
        self.telemetry.note(
            f"validation at step {step}: nll {figures['nll']:.4f}  worst group {figures['worst_group']:.4f}"
            + ("  (best so far)" if better else "")
        )
        return better

    def _client_state(self, step: int) -> dict:
        from dataclasses import asdict

        state = {
            "step": step,
            "best": self.best,
            "bad_validations": self.bad_validations,
            "dro": self.state.state_dict(),
            "data_fingerprint": self.prepared.stores["train"].fingerprint,
            "group_plan": asdict(self.group_plan),
        }
        if self.config.groups.reference == "live" and self.table is not None:
            state["live_table"] = torch.from_numpy(self.table)
        return state

    def _save(self, step: int, is_best: bool) -> None:
        self.telemetry.flush()
        started = time.time()
        checkpoint.save(
            self.engine,
            self.folder,
            step,
            self._client_state(step),
            life=self.life,
            fingerprint=self.loaded.fingerprint,
            keep=self.config.train.keep_checkpoints,
            best=is_best,
        )
        self.watchdog.beat()
        self.telemetry.note(f"checkpoint: step {step} published in {time.time() - started:.1f} s")

    def _interrupted(self, step: int) -> int:
        self.telemetry.close()
        if self.runtime.is_main:
            run_folder.write_summary(
                self.folder, "interrupted", step=step, total_steps=self.total, life=self.life
            )
        say(self.runtime, f"interrupted by a signal: all ranks saved step {step}; go on with resume=auto")
        self.runtime.barrier()
        return EXIT_INTERRUPTED

    def _finish(self, step: int, stopped_early: bool) -> int:
        self.telemetry.close()
        used = step
        if (
            self.best is not None
            and self.best["step"] != step
            and (self.folder / "checkpoints" / f"step_{self.best['step']}").is_dir()
        ):
            checkpoint.load(
                self.engine, self.folder / "checkpoints" / f"step_{self.best['step']}", restore_rng=False
            )
            used = self.best["step"]
            say(
                self.runtime,
                f"adapter: from step {used}, the best by validation {self.config.train.select_by}",
            )
        checkpoint.save_adapter(self.engine, self.folder / "adapter", tokenizer=self.prepared.tokenizer)
        peak = self.memory.largest()
        say(self.runtime, f"memory per rank: peak {format_bytes(peak)}; --plan predicts it")
        if self.runtime.is_main:
            run_folder.write_summary(
                self.folder,
                "completed",
                step=step,
                total_steps=self.total,
                adapter_step=used,
                stopped_early=stopped_early,
                best=self.best,
                seconds=round(time.time() - self.started, 1),
                tokens_per_rank=self.tokens_seen,
                samples=step * self.config.train.global_batch,
                objective=self.config.objective,
                world=self.runtime.world,
                launcher=self.runtime.launcher,
                device=self.runtime.device.type,
                dtype=str(self.dtype).removeprefix("torch."),
                packing=self.packing,
                loading=self.loaded.loading,
                life=self.life,
                base_fingerprint=self.loaded.fingerprint,
                peak_memory_bytes=peak,
            )
        say(
            self.runtime,
            f"done: {self.folder} ({duration(time.time() - self.started)}); next: python -m eval.run --run {self.folder}",
        )
        self.runtime.barrier()
        return 0

    def _failed(self, error: Exception) -> None:
        """Leaves the last word and the stacks; the newest valid checkpoint stays what it was. A start that got nowhere gives the folder back."""
        with contextlib.suppress(OSError):  # a full disk must not hide the error
            watchdog = self.watchdog or Watchdog(
                self.runtime, self.folder / "logs", self.config.train.timeout_s
            )
            watchdog.dump(f"{type(error).__name__}: {error}", error)
            if self.telemetry is not None:
                self.telemetry.close()
            if (
                not self.runtime.is_main or checkpoint.current_life(self.folder) != self.life
            ):  # a newer life has the last word
                return
            if isinstance(error, UserError) and run_folder.release(self.folder):
                return
            run_folder.write_summary(
                self.folder, "failed", error=f"{type(error).__name__}: {error}"[:2000], life=self.life
            )
