"""What a config costs, and what quantizers do to values and gradients."""
