"""A study of six small cells on planted data, for the tests of grids and of the runner."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STUDY = """
name: tiny
config: configs/planted.yaml
overrides:
  - train.max_steps=3
  - train.micro_batch=32
  - "data.planted={num_train: 96, num_valid: 8, num_test: 40}"
  - train.eval_every=3
seeds: [0, 1]
baseline: sft
controls: [frozen]
label: kind
rows:
  sft: [objective=sft]
  gdrt: [objective=gdrt]
  frozen: [objective=gdrt, "dro.frozen_weights={run:gdrt}"]
evaluate: [--bootstrap, "100", --batch-size, "64", --floors, "popularity,markov"]
"""


def study_file(folder: Path, text: str = STUDY) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(text, encoding="utf-8")
    return path
