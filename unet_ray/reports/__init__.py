"""What people look at, from an output's rows."""
