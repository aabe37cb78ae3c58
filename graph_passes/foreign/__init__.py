"""Decoders that other tools exported, brought into the form :func:`~sievert.graph_passes.decoder.find_decoder` reads."""
