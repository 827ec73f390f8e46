"""What a job is told: files, types, keywords of Python, the command line and its help."""
