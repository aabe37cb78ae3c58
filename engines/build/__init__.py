"""Build a variant's engines: lower its graphs, lint them, hand them to a builder, record what was built."""
