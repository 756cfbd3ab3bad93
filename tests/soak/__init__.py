"""The soak: every kind of client at one server at once, well-behaved or not, for minutes; `python -m tests.soak`.

__main__.py the course of it · driver.py runs clients and counts · clients.py a function for each kind · broken.py what
is no request · machine.py the server's process, and Prometheus · checks.py what must hold · report.py
"""
