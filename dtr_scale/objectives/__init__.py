"""Objectives of training: weights of the loss, ANT-UW, and the affinity of timesteps."""
