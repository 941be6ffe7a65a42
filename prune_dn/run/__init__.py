"""Runs from recipes: phases, run folder, report; and what each command does."""
