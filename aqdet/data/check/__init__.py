"""The check of a dataset before training: what is found, what is then done, and the data as they will be used."""
