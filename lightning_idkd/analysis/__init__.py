"""What is done with finished runs, load and evaluate and compare them, and the benchmark of a training step."""
