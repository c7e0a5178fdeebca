"""What is said and refused before anything is loaded.

    plan.py           the plan of a run: settings, batch, memory
    compatibility.py  combinations that compute wrong results, hang or crash
    largest.py        the largest micro-batch, which has to fit
    memory_plan.py    the peak of a rank's memory, from configs alone
    machine.py        what a machine has; facts only
    diagnosis.py      what a run would use there, and what is missing
    starter.py        the config that gdrt-init writes

Nothing here reads a weight.
"""
