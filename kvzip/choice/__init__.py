"""Which codec to take: what loading a cache costs in time and dollars, and `codec="auto"`."""
