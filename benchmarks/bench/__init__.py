"""Measurements behind every printed figure. Seeded; CPU time on one thread; each table names what it compares with."""
