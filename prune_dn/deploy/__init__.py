"""Files that other runtimes load: one module per format."""
