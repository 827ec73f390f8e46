"""Frames to chunks, decoded, through the network, to the parts of an output."""
