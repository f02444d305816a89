"""What every training run does around its method: arguments, engine, packs, checkpoints, metrics."""
