"""Analysis of configs and detectors: costs, and the effect of quantizers on values and gradients."""
