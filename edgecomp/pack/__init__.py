"""What a board needs to build its engines itself, in one archive: graphs, weights, job files, the runtime and a script."""
