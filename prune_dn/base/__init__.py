"""What every room uses: files, limits, defaults, the console, signals."""
