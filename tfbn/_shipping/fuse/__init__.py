"""Fusing linear layers with the batch normalization after them, to fine-tune with frozen statistics."""
