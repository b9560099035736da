"""Pictures of samples, features and distances, FLOPs, and the comparison of runs."""
