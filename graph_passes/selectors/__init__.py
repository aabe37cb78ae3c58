"""One file per selector, and the registry that names them."""
