"""Fuzzing: inputs made by machines, a seed and a number for each, fed to everything that reads what others wrote.

``python -m tools.fuzz --inputs 20000`` runs all targets, ``python -m tools.fuzz TARGET --seed 0 --index 17`` one input.
"""
