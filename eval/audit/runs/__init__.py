"""Audits over evaluation folders, no model needed: each file is one and binds `AUDIT` (docs/audits.md)."""
