"""The commands that an installation brings beside `python -m`: thin, one file each.

    train.py        gdrt-train: starts the ranks, or trains in this process
    evaluation.py   gdrt-eval, gdrt-compare: the mains of eval, found behind our own packages
    init.py         gdrt-init: a starter config for the user's data, or the Slurm scripts
    doctor.py       gdrt-doctor: what this machine has, what a run would use, what is missing

gdrt-recommend, gdrt-serve, gdrt-study and gdrt-export are recommend.py, serve.py, study.py and export.py in
gdrt_ds/ themselves.
"""
