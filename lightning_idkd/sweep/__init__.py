"""W&B sweep files without a server: read a file, plan its cells, run them."""
