"""What a step minimises: weights of the loss, ANT-UW, and the affinity of timesteps."""
