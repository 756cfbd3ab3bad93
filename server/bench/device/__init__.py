"""`lpa bench device`: a GPU checked and measured part by part; `parts.py` runs them."""
