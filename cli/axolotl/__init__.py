"""Config files of axolotl, read as ours: one table of keys, what they mean where they differ, and what is not there. Imports no torch."""
