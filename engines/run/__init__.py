"""Run: one session protocol for every runtime, the pipeline over a variant's graphs, and the generation loop."""
