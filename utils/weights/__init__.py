"""Models and their weights: loaded, read tensor by tensor, adapted, merged, and compared with what was trained."""
