"""Untrusted models on their way in: checked as plain data before anything loads them."""
