"""Everything that a model has during training alone: the scaffold."""
