"""Measurements anyone can run; nothing here is installed or asserted on."""
