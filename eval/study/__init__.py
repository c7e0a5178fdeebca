"""The page of a study: rows x metrics with intervals over users and seeds. `python -m eval.study` is the
entry.

reading.py  the study's grid.json, which cells are evaluated, and what their runs cost
blocks.py   one setting of a study: its rows, their differences to the baseline and to the controls
seeds.py    intervals over users and seeds
beside_floors.py  how far the rows are from the floors
page.py     study.md and study.html; figures.py draws, words.py writes metrics and values
batch.py    evaluates many runs in one process
"""
