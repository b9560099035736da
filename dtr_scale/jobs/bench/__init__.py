"""Measure this machine: training, sampling, data, checkpoints, attention, peers."""
