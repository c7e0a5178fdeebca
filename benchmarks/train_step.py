"""Samples per second of a training step: ours, and per cause, against transformers.Trainer and TRL's
SFTTrainer.

    python benchmarks/train_step.py [--data ml-100k|FOLDER] [--model smollm2-135m] [--steps 3]
    [--quantization nf4|none] [--json] [--quick]
One process each, with the same base, LoRA initialisation, DeepSpeed ZeRO-3, samples per step and token
lengths, dropout 0, objective sft (what the peers train); the loss of the first step is checked equal (1e-4
relative) before anything is timed. Rows:
    trainer, trl        the peers: padded rows, logits for every position
    padded              ours, padded rows, the head on supervised positions only       -> cause: head on
    targets only packed              the same without padding                                       ->
    cause: packing shared_prefix       the prompt's constant head once per micro-batch                ->
    cause: shared prefix gdrt                shared_prefix with objective gdrt
--cpu-time counts CPU seconds of the process instead of the wall clock, for a machine that is shared.
On a GPU the same command reports tokens/s, MFU and peak memory too; --shape 7b takes a random-weight 7B
Llama.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from queue import Empty

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
from machine_line import machine

ROOT = Path(__file__).resolve().parent.parent
SHAPE_7B = dict(num_layers=32, hidden=4096, num_heads=32, num_key_value_heads=8, intermediate=14336)


class Bench:
    """Prepared data and a way to build a fresh engine for each row."""

    def __init__(self, options, folder: Path):
        from gdrt_ds.config import load_config
        from gdrt_ds.runtime import start_runtime
        from gdrt_ds.training.preparation import prepare

        self.options, self.folder = options, folder
        self.clock = time.process_time if options.cpu_time else time.perf_counter
        base = [
            f"run.dir={folder}",
            f"data.path={options.data}",
            f"model.path={options.model}",
            f"model.quantization={options.quantization}",
            "model.lora.dropout=0",
            "objective=sft",
            f"train.global_batch={options.batch}",
            f"train.micro_batch={options.batch}",
            f"data.history_length={options.history}",
            "train.warmup_steps=0",
            f"train.max_steps={options.steps + 1}",
        ]
        if options.model == "tiny-random":
            base.append("prompt.max_length=512")
        self.config = load_config(None, base)
        self.runtime = start_runtime()
        self.prepared = prepare(self.config)
        self.store = self.prepared.stores["train"]

    def load(self, attention):
        from gdrt_ds.models.load import load_model

        section = self.config.model.model_copy(update={"loading": "stock"})
        return load_model(
            section, self.runtime, train=True, path=self.prepared.model_folder, seed=0, attention=attention
        )

    def plan(self, packed: bool):
        from gdrt_ds.batches import BatchPlan

        return BatchPlan(self.store.lengths, self.options.batch, self.options.batch, 1, 0, packed)

    def samples(self) -> list[np.ndarray]:
        return [self.plan(False).samples(step) for step in range(self.options.steps + 1)]

    def ours(self, packing: str, objective: str = "sft"):
        """Seconds per step (the first left out) and the first loss."""
        import deepspeed

        from gdrt_ds import dro
        from gdrt_ds.batches.tree_attention import ATTENTION_NAME
        from gdrt_ds.objectives import get_objective
        from gdrt_ds.training.deepspeed_config import fill_deepspeed_config, read_deepspeed_config
        from gdrt_ds.training.model_with_loss import FusedLossModel
        from gdrt_ds.training.step import StepRunner, TrainTokens

        loaded = self.load(ATTENTION_NAME if packing != "none" else None)
        module, plan = FusedLossModel(loaded.model), self.plan(packing != "none")
        hidden = self.prepared.model_config.get_text_config().hidden_size
        filled = fill_deepspeed_config(
            read_deepspeed_config("ds_configs/zero3_qlora.json"), self.config, plan, loaded.dtype, hidden
        )
        trainable = [p for p in module.parameters() if p.requires_grad]
        engine, *_ = deepspeed.initialize(
            model=module,
            config=filled,
            model_parameters=trainable,
            optimizer=torch.optim.AdamW(trainable, lr=1e-4, weight_decay=0.0),
        )
        engine.train()
        num_groups = 1 if objective == "sft" else 8
        groups = (np.arange(int(self.store.target_offsets[-1])) % num_groups).astype(np.int16)
        config = self.config.model_copy(update={"objective": objective})
        runner = StepRunner(
            engine,
            plan,
            TrainTokens(self.store, groups, num_groups),
            get_objective(objective),
            config,
            dro.DroState(num_groups).to(self.runtime.device),
            self.runtime,
            packing=packing,
            prefix_length=self.prepared.data.prefix_length,
            pad_id=self.prepared.tokenizer.pad_token_id,
        )
        seconds, first, tokens = [], None, 0
        for step in range(self.options.steps + 1):
            start = self.clock()
            result = runner.run(step, 1e-4)
            first = float(result.loss) if first is None else first
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds.append(self.clock() - start)
            tokens += result.tokens
        engine.destroy()
        return seconds[1:], first, tokens

    def peer(self, name: str):
        """transformers.Trainer or TRL's SFTTrainer on the same samples, padded, with the same ZeRO-3
        settings.
        """
        from accelerate.state import AcceleratorState
        from transformers import Trainer, TrainerCallback, TrainingArguments
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        loaded = self.load(None)
        rows, store = [], self.store
        for step in self.samples():
            for sample in step:
                ids = store.input_ids[store.offsets[sample] : store.offsets[sample + 1]].astype(np.int64)
                labels = np.full_like(ids, -100)
                labels[-store.num_target[sample] :] = ids[-store.num_target[sample] :]
                rows.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
        pad = self.prepared.tokenizer.pad_token_id

        def collate(batch):
            width = max(len(row["input_ids"]) for row in batch)

            def fill(key, value):
                return torch.tensor([row[key] + [value] * (width - len(row[key])) for row in batch])

            mask = torch.tensor(
                [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in batch]
            )
            return {
                "input_ids": fill("input_ids", pad),
                "labels": fill("labels", -100),
                "attention_mask": mask,
            }

        clock, marks, losses = self.clock, [], []

        class Clock(TrainerCallback):
            def on_step_begin(self, *args, **kwargs):
                marks.append(clock())

            def on_step_end(self, *args, **kwargs):
                marks[-1] = clock() - marks[-1]

            def on_log(self, args, state, control, logs=None, **kwargs):
                if "loss" in (logs or {}):
                    losses.append(float(logs["loss"]))

        settings = dict(
            output_dir=str(self.folder / name),
            per_device_train_batch_size=self.options.batch,
            max_steps=self.options.steps + 1,
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            deepspeed=str(self._peer_deepspeed()),
            remove_unused_columns=False,
            optim="adamw_torch",
            weight_decay=0.0,
            max_grad_norm=1.0,
            bf16=loaded.dtype == torch.bfloat16,
        )
        order = torch.utils.data.SequentialSampler
        if name == "trl":
            from datasets import Dataset
            from trl import SFTConfig, SFTTrainer

            base_class = SFTTrainer
            arguments = SFTConfig(**settings, dataset_kwargs={"skip_prepare_dataset": True}, max_length=None)
            data = Dataset.from_list(rows)
            extra = {"processing_class": self.prepared.tokenizer}
        else:
            base_class, arguments, data, extra = Trainer, TrainingArguments(**settings), rows, {}

        class InOrder(base_class):
            def _get_train_sampler(self, *args, **kwargs):
                return order(data)

        trainer = InOrder(
            model=loaded.model,
            args=arguments,
            train_dataset=data,
            data_collator=collate,
            callbacks=[Clock()],
            **extra,
        )
        trainer.train()
        if getattr(trainer, "deepspeed", None) is not None:
            trainer.deepspeed.destroy()
        unset_hf_deepspeed_config()  # a later row must load its model without transformers' ZeRO-3 switch
        AcceleratorState._reset_state(reset_partial_state=True)
        return marks[1:], losses[0], 0

    def _peer_deepspeed(self) -> Path:
        path = self.folder / "peer_zero3.json"
        config = json.loads((ROOT / "ds_configs" / "zero3_qlora.json").read_text())
        config.pop("optimizer", None)
        config["zero_optimization"]["overlap_comm"] = torch.cuda.is_available()
        path.write_text(json.dumps(config))
        return path


def measure(options, folder: str, row: str, queue) -> None:
    """One row in a process of its own.

    Engines and heaps that earlier rows leave would slow the later ones.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    bench = Bench(options, Path(folder))
    result = (
        bench.peer(row)
        if row in ("trainer", "trl")
        else bench.ours(
            {"padded": "none", "gdrt": "shared_prefix"}.get(row, row), "gdrt" if row == "gdrt" else "sft"
        )
    )
    memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    queue.put((*result, memory, float(bench.store.lengths.mean())))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="ml-100k")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--history", type=int, default=10)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--quantization", default="nf4", choices=("nf4", "none"))
    parser.add_argument("--rows", default="trainer,trl,padded,packed,shared_prefix,gdrt")
    parser.add_argument("--shape", choices=("7b",))
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="tiny random model, under a minute on 2 cores")
    options = parser.parse_args()
    if options.quick:
        options.model, options.rows, options.steps = (
            "tiny-random",
            "trainer,padded,packed,shared_prefix,gdrt",
            4,
        )
    with tempfile.TemporaryDirectory() as folder:
        if options.shape:
            from gdrt_ds.config import load_config
            from gdrt_ds.data.corpus import load_corpus
            from gdrt_ds.models.built_in import make_tiny_model

            titles = [
                item.title
                for item in load_corpus(load_config(None, [f"data.path={options.data}"]).data).items.values()
            ]
            options.model = str(
                make_tiny_model(
                    Path(folder) / "shape", titles, max_vocab=128256, vocab_multiple=128256, **SHAPE_7B
                )
            )
        found = {}
        context = multiprocessing.get_context("spawn")
        for row in options.rows.split(","):
            if row == "trl":
                import importlib.util

                if importlib.util.find_spec("trl") is None:
                    print("trl                 not installed: pip install trl==1.16.0")
                    continue
            queue = context.Queue()
            process = context.Process(target=measure, args=(options, folder, row, queue))
            process.start()
            try:
                while True:
                    with contextlib.suppress(Empty):
                        seconds, first, tokens, memory, mean_tokens = queue.get(timeout=5)
                        break
                    if process.exitcode is not None:
                        raise SystemExit(
                            f"row {row} ended with exit status {process.exitcode}; its messages are above"
                        )
            finally:
                process.kill()
                process.join()
            if not found:
                print(
                    f"# {options.data}, history {options.history}: {mean_tokens:.0f} tokens on average; "
                    f"batch {options.batch}; {options.model}, "
                    f"{options.quantization}; {machine()}{', CPU seconds' if options.cpu_time else ''}"
                )
            found[row] = (seconds, first, tokens)
            reference = next(iter(found.values()))[1]
            if (
                abs(first - reference) > 1e-4 * abs(reference) + 5e-5
            ):  # the peers round their logged loss to 4 decimals
                raise SystemExit(
                    f"{row}: loss of the first step {first:.6f} differs from {reference:.6f}: not the same "
                    "computation"
                )
            peak = f"  peak {memory / 2**30:.2f} GiB" if memory else ""
            print(
                f"{row:<16} {options.batch / min(seconds):8.2f} samples/s   first loss {first:.5f}{peak}",
                flush=True,
            )
        for ours in [row for row in found if row not in ("trainer", "trl")]:
            for peer in [row for row in found if row in ("trainer", "trl")]:
                ratio = min(found[peer][0]) / min(found[ours][0])
                record = {
                    "name": f"train_step/{ours}",
                    "ours": options.batch / min(found[ours][0]),
                    "peer": options.batch / min(found[peer][0]),
                    "peer_name": peer,
                    "ratio": ratio,
                    "shape": {
                        "model": options.model,
                        "data": options.data,
                        "history": options.history,
                        "batch": options.batch,
                        "quantization": options.quantization,
                        "mean_tokens": mean_tokens,
                    },
                    "machine": machine(),
                }
                print(json.dumps(record) if options.json else f"{ours} is {ratio:.2f} x {peer}")


if __name__ == "__main__":
    main()
