"""Faults made on purpose, and jobs that live through them."""
