"""What `jaxmerge` does on the command line, a file for each command; `jaxmerge.cli` chooses."""
