"""The command line: parsers and calls, no logic."""
