"""Scoring: texts to windows and pairs to sequences, for every way in; and files on the command line."""
