"""Records of a run: the journal, attempts, and their mirror in MLflow."""
