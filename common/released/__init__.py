"""Read the config files and weights that the papers' own repositories released."""
