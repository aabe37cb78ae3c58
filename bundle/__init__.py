"""The contract between all stages: manifest, tensor specs, pruning plan, profile, and the exception tree."""
