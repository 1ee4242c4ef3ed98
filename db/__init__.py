"""Everything that must survive a restart: rows, blobs, and the only place where state changes."""
