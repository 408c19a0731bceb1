"""The networks of an experiment: the backbone, those derived from it, and the registry of training methods."""
