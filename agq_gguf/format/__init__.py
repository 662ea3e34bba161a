"""The AGQ4 format, in numpy."""
