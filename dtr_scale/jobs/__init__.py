"""What each command starts, built of all the rooms; `api` is what Python programs call."""
