"""Rows to token ids, as the model's own chat template writes them."""
