"""Models in memory: loaded, quantized, extended, started from what was trained before."""
