"""The experiment file: its schema, its overrides, and what makes two runs the same."""
