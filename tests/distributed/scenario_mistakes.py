"""Wrong uses of the training command behind test_train_cli.py.

Each in its own forked process, with what it printed and what it changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

from tests.distributed.launch import SMOKE, play, preload

SETTINGS = [
    "train.max_steps=6",
    "train.save_every=3",
    "train.eval_every=6",
    "train.log_every=1",
    "train.warmup_steps=1",
    "data.planted={num_train: 160, num_valid: 20, num_test: 20}",
]
SMALL = ["--config", SMOKE, *SETTINGS]


KEPT = {"life", ".life.lock", "logs", "cache"}  # what a failed start may leave
COUNTED = ("life", "config.yaml", "logs/stacks_rank_0.txt")  # a start counts its life


def contents(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def main(output: str, folder: str) -> None:
    preload()
    folder = Path(folder) / "mistakes"
    (folder / "finished").parent.mkdir(parents=True)
    report: dict[str, dict] = {}

    def run(case: str, arguments: list[str], watched: Path | None = None) -> dict:
        before = contents(watched) if watched else {}
        done = play(1, arguments, folder / "logs" / case.replace(" ", "_"), timeout_s=120)
        after = contents(watched) if watched else {}
        text = done.outputs[0]
        start = text.find("error: ")
        left = {p.name for p in (folder / "fresh").iterdir()} if (folder / "fresh").is_dir() else set()
        report[case] = {
            "status": done.statuses[0],
            "output": text,
            "error": text[start:] if start >= 0 else "",
            "left": sorted(left - KEPT),
            "lost": [name for name in before if after.get(name) != before[name] and name not in COUNTED],
        }
        return report[case]

    finished, foreign = folder / "finished", folder / "foreign"
    first = play(1, [*SMALL, f"run.dir={finished}"], folder / "logs" / "first")
    assert first.statuses == [0], first.text[-4000:]
    report["one rank"] = {
        "output": first.text,
        "metrics": [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()],
    }
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("three years of work")
    (folder / "empty_model").mkdir()
    (folder / "a_file").write_text("")
    fresh = f"run.dir={folder / 'fresh'}"
    (folder / "batch.json").write_text(
        json.dumps({"train_batch_size": 64, "zero_optimization": {"stage": 3}})
    )

    run("missing config", ["--config", "nowhere.yaml", fresh])
    run("unknown key", [*SMALL, fresh, "dro.taus=1"])
    run("wrong type", [*SMALL, fresh, "train.lr=fast"])
    run("tau not positive", [*SMALL, fresh, "dro.tau=0"])
    run("unknown objective", [*SMALL, fresh, "objective=gdrtt"])
    run("missing deepspeed config", [*SMALL, fresh, "--deepspeed_config", "ds_configs/zer3.json"])
    run("missing model folder", [*SMALL, fresh, f"model.path={folder / 'no_model_here'}"])
    run("unreadable model folder", [*SMALL, fresh, f"model.path={folder / 'empty_model'}"])
    run("missing data file", [*SMALL, fresh, f"data.path={folder / 'no_data_here.csv'}"])
    run("batch sizes of the two configs", [*SMALL, fresh, "--deepspeed_config", str(folder / "batch.json")])
    run("micro-batch over global batch", ["--plan", "--world", "2", *SMALL, fresh, "train.micro_batch=24"])
    run("more ranks than batch", ["--plan", "--world", "4", *SMALL, fresh, "train.global_batch=2"])
    run("folder not writable", [*SMALL, f"run.dir={folder / 'a_file' / 'run'}"])
    run("folder of a finished run", [*SMALL, f"run.dir={finished}"], finished)
    run("resume of a finished run", [*SMALL, f"run.dir={finished}", "resume=auto"], finished)
    run("folder with other files", [*SMALL, f"run.dir={foreign}"], foreign)
    run("overwrite of other files", [*SMALL, f"run.dir={foreign}", "run.overwrite=true"], foreign)
    (finished / "summary.json").rename(folder / "summary.json")
    kept = contents(finished)
    run("resume with other settings", [*SMALL, f"run.dir={finished}", "resume=auto", "train.lr=0.5"])[
        "lost"
    ] = _changed(kept, finished)
    run("resume of a missing checkpoint", [*SMALL, f"run.dir={finished}", "resume=step_77"])["lost"] = (
        _changed(kept, finished)
    )
    run("more groups than tokens", [*SMALL, f"run.dir={folder / 'many_groups'}", "groups.num=5000"])
    (folder / "summary.json").rename(finished / "summary.json")
    wrong = [*SMALL, f"run.dir={finished}", "run.overwrite=true", f"data.path={folder / 'no_data_here.csv'}"]
    run("overwrite with a mistake", wrong, finished)["hidden"] = [
        p.name for p in finished.iterdir() if p.name == ".overwritten"
    ]
    found = run(
        "overwrite of a finished run",
        [*SMALL, f"run.dir={finished}", "run.overwrite=true", "train.max_steps=2"],
    )
    found["steps"] = [
        json.loads(line)["step"] for line in (finished / "metrics.jsonl").read_text().splitlines()
    ]
    found["summary"] = json.loads((finished / "summary.json").read_text())["status"]
    found["checkpoints"] = sorted(p.name for p in (finished / "checkpoints").glob("step_*"))
    planned = folder / "planned"
    run("plan", ["--plan", "--world", "4", *SMALL, f"run.dir={planned}"])["folder_made"] = (
        planned / "config.yaml"
    ).exists()
    Path(output).write_text(json.dumps(report))


def _changed(before: dict[str, str], folder: Path) -> list[str]:
    after = contents(folder)
    return [name for name in before if after.get(name) != before[name] and name not in COUNTED]


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    main(*sys.argv[1:])
