"""Losses: of proxies, of pairs of images, of pytorch-metric-learning, and the registry of all."""
