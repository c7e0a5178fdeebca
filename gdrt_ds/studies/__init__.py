"""Grids of runs.

    grid.py             rows, settings and seeds of a study file, as numbered cells
    runner.py           trains and evaluates the cells
    keeping.py          a finished cell as one small file
    quickstart_runs.py  the commands of the quick start, shown and timed

The page about a study is made by eval/study.
"""
