"""What pruning cost: perplexity layer by layer, zero-shot tasks through lm-eval."""
