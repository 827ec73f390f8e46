"""Pairs to blocks, batches, train steps, checkpoints and a model folder."""
