"""Pruned nets in files: saved, loaded, told apart."""
