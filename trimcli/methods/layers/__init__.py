"""Layer allocation: how much of the target each decoder layer, or each linear, is to lose."""
