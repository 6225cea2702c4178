"""Graph rewrites: one technique a file, the record of what they did, and the structure they look for."""
