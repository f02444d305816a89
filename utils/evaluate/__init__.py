"""Is a model any good? How likely it finds real replies, whether its own fit, and whether one would notice them."""
