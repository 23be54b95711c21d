"""What lies on disk, in and out: atomic writes, manifests, checkpoints, masks, calibrations, ratios, the cache."""
