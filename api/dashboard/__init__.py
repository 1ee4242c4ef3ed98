"""The dashboard: pages, a process of its own, and of the rest of the service only what HTTP shows."""
