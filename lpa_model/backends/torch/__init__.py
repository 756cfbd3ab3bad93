"""Plain torch: runs everywhere, and is the twin that every other backend is tested against."""
