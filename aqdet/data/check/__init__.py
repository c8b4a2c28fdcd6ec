"""The check of a dataset before training: findings, the policy for each kind of them, and the data that remain."""
