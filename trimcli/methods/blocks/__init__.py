"""What works on a whole decoder layer: its blocks, found by structure, and LLM-Barber."""
