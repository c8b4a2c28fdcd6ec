"""The same values for less memory and time."""
