"""transformers' plain attention, which writes the whole matrix of scores: slow, but every model has it."""

from gdrt_ds.models.attention.base import AttentionBackend

BACKEND = AttentionBackend("eager", dense_masks=True)
