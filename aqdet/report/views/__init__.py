"""The contents of a report's sections, as its templates take them: one subject a file."""
