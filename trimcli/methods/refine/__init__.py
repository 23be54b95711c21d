"""Refinements: masks that begin where a score and its rows end, and come nearer to the dense outputs."""
