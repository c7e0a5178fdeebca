"""Audits that need a model: each file is one and binds `AUDIT`; its name is the file's (docs/audits.md)."""
