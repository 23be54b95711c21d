"""Products straight from keep bits and kept values: `trim.packed/1`'s form, multiplied as it is."""
