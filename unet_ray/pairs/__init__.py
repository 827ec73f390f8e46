"""Frames and masks to checked pairs, split by drive."""
