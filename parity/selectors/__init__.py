"""Every selector once more, in plain float64 numpy: the formulas of METHODS, one sample at a time, sharing nothing with the graphs."""
