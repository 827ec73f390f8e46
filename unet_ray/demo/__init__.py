"""The driving log drawn by program, and the demo on it."""
