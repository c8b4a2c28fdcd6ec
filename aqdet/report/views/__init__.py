"""The contents of a report's sections for its templates, one subject in each file."""
