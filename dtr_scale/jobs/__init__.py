"""A job for each command, built of all the rooms; Python programs call `api`."""
