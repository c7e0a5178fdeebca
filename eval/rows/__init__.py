"""Evaluates models of rows: prompt and completion (`data.format=sft`), without a catalogue.

subject.py    what is evaluated: model, rows, and the group of every target token
scoring.py    loss of every target token at every temperature, probabilities of listed answers
predict.py    scores what is missing and writes predictions.jsonl; ranks share the work
inputs.py     predictions as arrays; metrics.py makes statistics of them, measure.py results.json
sensitivity.py  the audit: prompts without their evidence, with another row's, blank
report.py     report.md and report.html
pipeline.py   from a subject to an evaluation folder; `eval.run` calls it

Intervals, calibration, comparison and pages are those of recommenders.
"""

KIND = "rows"
"""`kind` in results.json, which tells such evaluations from those of recommenders."""
