"""Every stored result: what it is, what it was made on and with, and how it is kept."""
