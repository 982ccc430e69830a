"""The nodes of a process: their networks and losses, the rows of their parameters, and the engines that run them."""
