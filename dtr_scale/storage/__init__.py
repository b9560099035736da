"""Folders on a disk or on S3, read by ranges and written whole."""
