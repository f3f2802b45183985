"""Turns a portrait and a voice into an endless video, chunk by chunk: sources, chunk loop, sinks, command line."""
