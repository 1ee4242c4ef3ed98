"""The only place where torch is imported; knows nothing of the rest and runs by hand."""
