"""Outputs that are held to a grammar: what is asked for, its compilation, and the mask of each step."""
