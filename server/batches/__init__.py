"""Durable batch jobs behind /v1/files and /v1/batches, and `lpa run-batch`.

`lines.py` reads what a job asks, `execute.py` answers a line with the application itself, `store.py` keeps files, jobs
and finished lines in a folder, `runner.py` works jobs off, `local.py` a file without a server. A line reaches its
route as any request does, through the application.
"""
