"""What lies on the disk: models, runs, checkpoints, caches; whole, or not there."""
