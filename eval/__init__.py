"""Evaluation of catalogue recommenders: exact scores, metrics, audits, reports (`python -m eval.run`)."""
