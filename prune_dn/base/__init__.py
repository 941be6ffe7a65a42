"""Helpers of every room: files, limits, defaults, the console, signals."""
