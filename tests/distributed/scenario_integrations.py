"""Ranks behind test_integrations.py.

Real transformers.Trainer runs of a tiny Llama with GroupDroLoss, on one and on two ranks.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import torch

from tests.distributed.ranks import run_ranks

G, STEPS = 3, 3


class Rows(torch.utils.data.Dataset):
    """24 rows of uneven length; group 2 only in two of them."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.rows = []
        for index in range(24):
            prompt, target = (
                rng.integers(3, 60, rng.integers(3, 9)).tolist(),
                rng.integers(3, 60, 1 + index % 4).tolist(),
            )
            groups = [2 if index in (5, 17) else (index + place) % 2 for place in range(len(target))]
            self.rows.append(
                {"input_ids": prompt + target, "labels": [-100] * len(prompt) + target, "groups": groups}
            )

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def collate(rows):
    width = max(len(r["input_ids"]) for r in rows)

    def pad(name, value):
        return torch.tensor([r[name] + [value] * (width - len(r[name])) for r in rows])

    return {
        "input_ids": pad("input_ids", 0),
        "labels": pad("labels", -100),
        "attention_mask": torch.tensor(
            [[1] * len(r["input_ids"]) + [0] * (width - len(r["input_ids"])) for r in rows]
        ),
    }


def make_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=0.3,
            max_position_embeddings=64,
        )
    )


def train(rank, world, folder, loss_settings, accumulation, trainer_kind="transformers"):
    """(flat parameters after 3 SGD steps, token weights, group losses of the last step)."""
    from transformers import Trainer, TrainingArguments

    from gdrt_ds.integrations import GroupCollator, GroupDroLoss

    options = dict(
        output_dir=str(folder),
        use_cpu=True,
        max_steps=STEPS,
        per_device_train_batch_size=24 // (world * accumulation),
        optim="sgd",
        learning_rate=0.5,
        gradient_accumulation_steps=accumulation,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        remove_unused_columns=False,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        ddp_backend="gloo",
        seed=1,
        data_seed=1,
    )
    model, loss, extra = make_model(), None, {}
    if loss_settings is not None:
        loss = GroupDroLoss(G, **loss_settings)
        extra = {"compute_loss_func": loss, "callbacks": [loss]}
    collator = (
        GroupCollator(collate)
        if loss is not None
        else lambda rows: collate([{k: v for k, v in r.items() if k != "groups"} for r in rows])
    )
    if trainer_kind == "trl":
        import datasets
        from trl import SFTConfig, SFTTrainer

        args = SFTConfig(
            **options,
            bf16=False,
            gradient_checkpointing=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            max_length=None,
        )
        tokenizer = folder / "tokenizer"
        from transformers import AutoTokenizer

        trainer = SFTTrainer(
            model,
            args=args,
            train_dataset=datasets.Dataset.from_list(Rows().rows),
            data_collator=collator,
            processing_class=AutoTokenizer.from_pretrained(tokenizer),
            **extra,
        )
    else:
        trainer = Trainer(
            model, args=TrainingArguments(**options), train_dataset=Rows(), data_collator=collator, **extra
        )
    trainer.train()
    flat = torch.cat([p.detach().double().reshape(-1) for _, p in sorted(model.named_parameters())])
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "parameters": flat.tolist(),
        "weights": None if loss is None else loss.weights.tolist(),
        "group_loss": None if loss is None else loss.group_loss.tolist(),
        "logged": sorted(logged[-1]),
        "state": None if loss is None else loss.state(),
        "forward_hooks": len(model._forward_pre_hooks),
    }


def plain(tau: float, prior: str, estimate: str, rate: float = 0.1) -> dict:
    """The same three steps in plain torch over the whole data at once; every step sees all 24 rows."""
    model, rows = make_model(), Rows().rows
    batch = collate(rows)
    labels = batch["labels"][:, 1:]
    keep = labels != -100
    groups = torch.tensor([g for r in rows for g in r["groups"]])
    counts = torch.bincount(groups, minlength=G).double()
    p = counts / counts.sum() if prior == "token_share" else torch.full((G,), 1 / G, dtype=torch.float64)
    weights, memory, mass = torch.ones(G, dtype=torch.float64), torch.zeros(G, dtype=torch.float64), 0.0
    for _ in range(STEPS):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits[keep].double(), labels[keep], reduction="none")
        means = torch.stack([losses[groups == g].mean() for g in range(G)])
        if estimate == "batch":
            scalar = tau * torch.logsumexp(p.log() + means / tau, 0)
        else:
            scalar = (weights[groups] * losses).mean()
            memory, mass = (1 - rate) * memory + rate * means.detach(), (1 - rate) * mass + rate
            weights = torch.softmax(p.log() + memory / mass / tau, 0) / (counts / counts.sum())
        model.zero_grad()
        scalar.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.5 * parameter.grad
    flat = torch.cat([q.detach().double().reshape(-1) for _, q in sorted(model.named_parameters())])
    return {"parameters": flat.tolist(), "weights": weights.tolist(), "group_loss": means.tolist()}


CASES = {
    "batch": ({"tau": 0.5, "estimate": "batch"}, 1),
    "batch_uniform": ({"tau": 0.5, "estimate": "batch", "prior": "uniform"}, 1),
    "ema": ({"tau": 0.5, "estimate": "ema"}, 2),
    "sft": ({"tau": float("inf")}, 2),
}


def train_cases(rank, world, folder, names, with_trl):
    """One launch runs every case one after the other."""
    runs = {name: train(rank, world, folder, *CASES[name]) for name in names}
    if world == 1:
        runs["trainer_alone"] = train(rank, world, folder, None, 2)
        runs["plain"] = {
            name: plain(s["tau"], s.get("prior", "token_share"), s.get("estimate", "ema"))
            for name, (s, _) in CASES.items()
        }
    if with_trl:
        runs["trl"] = train(rank, world, folder, *CASES["ema"], "trl")
    return runs


def main(output, folder):
    folder = Path(folder)
    with_trl = importlib.util.find_spec("trl") is not None
    if with_trl:
        importlib.import_module("trl")  # before the ranks fork
        from gdrt_ds.models.built_in import make_tiny_model
        from gdrt_ds.models.source import load_tokenizer

        load_tokenizer(make_tiny_model(folder / "tiny", ["a b c"])).save_pretrained(folder / "tokenizer")
    one = run_ranks(1, train_cases, folder, list(CASES), with_trl, timeout_s=400)
    two = run_ranks(2, train_cases, folder, list(CASES), False, timeout_s=400)
    report = {
        name: {"plain": one[0]["plain"][name], "one": [r[name] for r in one], "two": [r[name] for r in two]}
        for name in CASES
    }
    report |= {"trainer_alone": [one[0]["trainer_alone"]], "trl": [one[0]["trl"]] if with_trl else None}
    Path(output).write_text(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
