"""Records of any known format become messages, token ids with labels, and samples on disk."""
