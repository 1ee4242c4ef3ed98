"""What every method shares while it trains: processes, loop, checkpoints, answers on the way."""
