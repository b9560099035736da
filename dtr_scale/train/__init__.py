"""The training loop: its state, averages, evaluation on the way, the run directory."""
