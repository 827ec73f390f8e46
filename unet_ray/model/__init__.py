"""The network and the model folder: what is trained, saved and read again."""
