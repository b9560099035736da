"""The diffusion process: schedules, losses, timesteps and their clusters, samplers, guidance."""
