"""The engine: a pure scheduler that plans steps, and the code that executes and serves them."""
