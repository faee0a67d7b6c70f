"""Appends keys and values to pages and keeps the bounds of their runs."""
