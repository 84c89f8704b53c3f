"""Model definitions in Flax NNX."""
