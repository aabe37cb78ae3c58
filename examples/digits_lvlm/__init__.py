"""A small LLaVA trained on canvases of real handwritten digits: the model that demos, tests and benchmarks run on."""
