"""Pictures for people: masks over frames, grids, curves, confusion."""
