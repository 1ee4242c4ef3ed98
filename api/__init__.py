"""HTTP: one router a resource. Importable without torch."""
