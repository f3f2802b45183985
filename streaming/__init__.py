"""Turns a portrait and a voice into an endless video, chunk by chunk: sources, the loop, sinks, command line."""
