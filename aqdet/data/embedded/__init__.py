"""The embedded dataset, drawn on first use."""
