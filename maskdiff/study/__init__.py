"""Studies: many runs that differ in one thing, and what they show side by side."""
