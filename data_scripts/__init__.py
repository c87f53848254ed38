"""Data: the data sets, the transforms, the batch sampler."""
