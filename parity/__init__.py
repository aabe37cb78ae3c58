"""The PyTorch reference, the comparison stage by stage, and the verdict."""
