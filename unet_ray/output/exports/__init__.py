"""The masks of a finished output as files for other tools, with their frames if asked for; `formats` is the table."""
