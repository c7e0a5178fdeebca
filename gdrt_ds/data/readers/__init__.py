"""Readers of recommendation data, one file format family per module; each hands `base.Windows` or `base.Interactions` to `corpus`."""
