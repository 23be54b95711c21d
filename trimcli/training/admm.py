"""Masks learned by ADMM: Budget.project(scores), Splitting.pull(optimizer), Splitting.push(optimizer)."""
