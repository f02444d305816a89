"""A model answers: generation, HTTP routes and limits, and the two engines behind them."""
