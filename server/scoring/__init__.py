"""Perplexities of files on the command line: reading, scoring here or by a server, comparing, and what is printed."""
