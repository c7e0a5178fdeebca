"""Readers of recommendation data, one file format family per module.

Each hands `base.Windows` or `base.Interactions` to `corpus`.
"""
